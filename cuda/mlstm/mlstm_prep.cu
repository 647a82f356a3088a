// prep: G = dh / N and z before the backward sweeps. One block per chunk and head; as many lanes per token as its values
// keep busy.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_rows.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256;

/// What a token's normaliser was made of.
struct Normalizer {
  float product, floor;
};

class PrepBlock {
 public:
  DEVICE_FUNCTION explicit PrepBlock(const PrepParams& params) : p(params) {
    // Neighbouring blocks take the heads of the same tokens, which lie side by side in memory.
    const int block = static_cast<int>(prim::block_idx().x);
    const int slot = block / p.chunks.num_heads;
    head = block % p.chunks.num_heads;
    at = slot_at(p.chunks, slot);
    position = (int64_t{head} * p.chunks.slots + slot) * p.chunks.length;
    lanes = 32;
    while (lanes > 1 && lanes / 2 * 8 >= p.g.width) lanes /= 2;
    const int thread = static_cast<int>(prim::thread_idx().x);
    lane = thread % lanes;
    first = thread / lanes;
  }

  DEVICE_FUNCTION void run() const {
    if (!at.used) return;
    const int step = kThreads / lanes;
    Normalizer next = normalizer(first);
#pragma unroll 1
    for (int row = first; row < p.chunks.length; row += step) {
      const Normalizer own = next;
      next = normalizer(row + step);
      float z = has(row) ? prepare(row, own) : 0.0F;
#pragma unroll 1
      for (int distance = lanes / 2; distance > 0; distance /= 2)
        z += prim::float_of(prim::shfl_xor(prim::bits_of(z), static_cast<u32>(distance)));
      if (p.z != nullptr && lane == 0) p.z[position + row] = z;
    }
  }

 private:
  DEVICE_FUNCTION bool has(int row) const {
    return row < p.chunks.length && at.chunk * p.chunks.length + row < at.sequence.length;
  }
  DEVICE_FUNCTION int64_t token(int row) const {
    return at.sequence.begin + int64_t{at.chunk} * p.chunks.length + row;
  }

  DEVICE_FUNCTION Normalizer normalizer(int row) const {
    if (!p.normalize || !has(row)) return {0, 1};
    const int64_t owner = int64_t{at.sequence.batch} * p.chunks.time + token(row);
    return {p.product[owner * p.chunks.num_heads + head], p.records[position + row].floor};
  }

  /// G of one token, and this lane's part of z.
  DEVICE_FUNCTION float prepare(int row, const Normalizer& of) const {
    float factor = 1, sign = 0;
    if (p.normalize) {
      // The sweep's lower bound: where exp(-m) underflows and q is zero, h is zero and not 0 / 0.
      constexpr float kSmallest = 1.17549435e-38F;
      const float size = of.product < 0 ? -of.product : of.product;
      if (size > of.floor) sign = of.product < 0 ? -1.0F : 1.0F;
      const float floor = fmaxf(of.floor, kSmallest);
      factor = 1.0F / ((size <= floor ? floor : size) + p.eps);  // NaN stays NaN
    }
    const int64_t from = token_offset(p.dh, at.sequence.batch, token(row), head),
                  h = token_offset(p.h, at.sequence.batch, token(row), head),
                  to = token_offset(p.g, at.sequence.batch, token(row), head);
    float z = 0;
#pragma unroll 1
    for (int col = 8 * lane; col < p.g.width; col += 8 * lanes) {
      float g[8], values[8] = {};
      if (sign != 0) load_eight(p.h, h, col, values);  // not read where the floor is the normaliser
      load_eight(p.dh, from, col, g);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        g[i] *= factor;
        if (sign != 0) z += g[i] * values[i];
      }
      store_eight(p.g, to, col, g);
    }
    return -z * sign;
  }

  const PrepParams& p;
  int head, lanes, lane, first;
  SlotRange at;
  int64_t position;
};

KERNEL_FUNCTION(kThreads, 4)
mlstm_prep(const GRID_CONSTANT PrepParams p) { PrepBlock(p).run(); }

}  // namespace

void launch_prep(const PrepParams& params, Stream stream) {
  const u32 blocks = static_cast<u32>(params.chunks.slots * params.chunks.num_heads);
  prim::launch("mlstm_prep", mlstm_prep, {blocks, kThreads}, params, stream);
}

}  // namespace xlstm::cuda
