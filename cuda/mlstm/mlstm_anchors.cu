// anchors of the two-phase backward pass: C is set aside between the two state passes, dC multiplied into it after the
// second. Eight blocks per anchor and head, 256 threads each.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_twophase.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kParts = kAnchorWarps;

/// Where the state of a slot lies, in 16-byte pieces of its planes, and n.
struct SlotState {
  Bytes16* c;
  float* n;
};
DEVICE_FUNCTION SlotState state_of(const AnchorParams& p, int64_t index) {
  const int64_t numbers = int64_t{p.planes} * padded(p.dqk) * padded(p.dv);
  return {reinterpret_cast<Bytes16*>(static_cast<bf16*>(p.states) + index * numbers),
          p.state_n + index * padded(p.dqk)};
}

DEVICE_FUNCTION float product_of(const Bytes16& a, const Bytes16& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sum +=
        low_half(a.words[i]) * low_half(b.words[i]) + high_half(a.words[i]) * high_half(b.words[i]);
  return sum;
}

DEVICE_FUNCTION float block_sum(float x) {
  float* const parts = reinterpret_cast<float*>(prim::dynamic_shared());
  const int thread = static_cast<int>(prim::thread_idx().x);
#pragma unroll
  for (u32 lanes = 16; lanes > 0; lanes /= 2)
    x += prim::float_of(prim::shfl_xor(prim::bits_of(x), lanes));
  if (thread % 32 == 0) parts[thread / 32] = x;
  prim::sync_block();
  x = 0;
  for (int i = 0; i < kWarps; ++i) x += parts[i];
  return x;
}

KERNEL_FUNCTION(kThreads)
mlstm_anchors(const GRID_CONSTANT AnchorParams p) {
  const int block = static_cast<int>(prim::block_idx().x), part = block % kParts;
  const int anchor = block / kParts % p.anchors.count, head = block / kParts / p.anchors.count;
  const int slot = anchor * p.chunks.anchor;
  if (slot >= p.chunks.slots) return;
  const SlotRange at = slot_at(p.chunks, slot);
  if (!at.used || anchor_at(p.chunks, at.sequence, at.chunk) < 0) return;
  const int64_t plane = int64_t{padded(p.dqk)} * padded(p.dv) / 8;  // pieces
  const int rows = padded(p.dqk);
  const int64_t own = int64_t{head} * p.anchors.count + anchor;
  float* const kept_n = p.anchors.states + own * (p.planes * plane * 4 + rows);
  Bytes16* const kept = reinterpret_cast<Bytes16*>(kept_n + rows);
  // dC is written where it enters a chunk in its own direction: at the end of the chunk before.
  const SlotState state = state_of(p, int64_t{head} * p.chunks.slots + (p.dot ? slot - 1 : slot));
  const int first = part * kThreads + static_cast<int>(prim::thread_idx().x);
  constexpr int kStep = kParts * kThreads;
  float sum = 0;
  for (int64_t i = first; i < plane; i += kStep) {
    for (int a = 0; a < p.planes; ++a) {
      if (!p.dot) kept[a * plane + i] = state.c[a * plane + i];
      for (int b = 0; b < p.planes && p.dot; ++b)
        sum += product_of(kept[a * plane + i], state.c[b * plane + i]);
    }
  }
  for (int i = first; i < rows; i += kStep) {
    if (!p.dot) kept_n[i] = state.n[i];
    if (p.dot) sum += kept_n[i] * state.n[i];
  }
  if (!p.dot) return;
  sum = block_sum(sum);
  if (prim::thread_idx().x == 0) p.anchors.dots[own * kParts + part] = sum;
}

}  // namespace

int anchor_numbers(int dqk, int dv, int planes) {
  return planes * padded(dqk) * padded(dv) / 2 + padded(dqk);
}

void launch_anchors(const AnchorParams& params, Stream stream) {
  const u32 blocks = static_cast<u32>(kParts * params.anchors.count * params.chunks.num_heads);
  prim::launch("mlstm_anchors", mlstm_anchors, {blocks, kThreads, kWarps * sizeof(float)}, params,
               stream);
}

}  // namespace xlstm::cuda
