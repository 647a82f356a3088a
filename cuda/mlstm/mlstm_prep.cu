// prep: G = dh / N and z before the backward sweeps. One block per chunk and head, a warp per token.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_rows.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256;

/// Both G and z of one token.
DEVICE_FUNCTION float prepare_token(const PrepParams& p, const GateRecord& record, int batch,
                                    int64_t token, int head) {
  const int lane = static_cast<int>(prim::thread_idx().x) % 32;
  float factor = 1, sign = 0;
  if (p.normalize) {
    // The sweep's lower bound: where exp(-m) underflows and q is zero, h is zero and not 0 / 0.
    constexpr float kSmallest = 1.17549435e-38F;
    const float product =
        p.product[(int64_t{batch} * p.chunks.time + token) * p.chunks.num_heads + head];
    const float size = product < 0 ? -product : product;
    if (size > record.floor) sign = product < 0 ? -1.0F : 1.0F;
    const float floor = fmaxf(record.floor, kSmallest);
    factor = 1.0F / ((size <= floor ? floor : size) + p.eps);  // NaN stays NaN
  }
  const int64_t from = token_offset(p.dh, batch, token, head),
                h = token_offset(p.h, batch, token, head);
  const int64_t to = token_offset(p.g, batch, token, head);
  float dot = 0;
  for (int col = 8 * lane; col < p.g.width; col += 8 * 32) {
    float g[8], values[8];
    load_eight(p.dh, from, col, g);
    load_eight(p.h, h, col, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      g[i] *= factor;
      dot += g[i] * values[i];
    }
    store_eight(p.g, to, col, g);
  }
  return -warp_sum(dot) * sign;
}

KERNEL_FUNCTION(kThreads, 4)
mlstm_prep(const GRID_CONSTANT PrepParams p) {
  const int thread = static_cast<int>(prim::thread_idx().x);
  const int block = static_cast<int>(prim::block_idx().x);
  const int slot = block % p.chunks.slots, head = block / p.chunks.slots;
  const SlotRange at = slot_at(p.chunks, slot);
  if (!at.used) return;
  const int64_t position = (int64_t{head} * p.chunks.slots + slot) * p.chunks.length;
  for (int row = thread / 32; row < p.chunks.length; row += kThreads / 32) {
    const int t = at.chunk * p.chunks.length + row;
    float z = 0;
    if (t < at.sequence.length)
      z = prepare_token(p, p.records[position + row], at.sequence.batch, at.sequence.begin + t,
                        head);
    if (p.z != nullptr && thread % 32 == 0) p.z[position + row] = z;
  }
}

}  // namespace

void launch_prep(const PrepParams& params, Stream stream) {
  const u32 blocks = static_cast<u32>(params.chunks.slots * params.chunks.num_heads);
  prim::launch("mlstm_prep", mlstm_prep, {blocks, kThreads}, params, stream);
}

}  // namespace xlstm::cuda
