// prep: G = dh / N and z before the backward sweeps. A block takes some tokens of a chunk and head; as many lanes per token
// as its values keep busy.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_rows.cuh"
#include "cuda/prim/launch.h"
#include "cuda/prim/store16.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kFewestTokens = 32;

/// Of a token: a power of two, of which the pieces of 8 values leave none idle if possible.
PRIM_FUNCTION constexpr int lanes_of(int width) {
  const int pieces = divide_up(width, 8);
  int lanes = 32;
  while (lanes > 1 && lanes / 2 >= pieces) lanes /= 2;
  while (lanes > 8 && pieces % lanes != 0) lanes /= 2;
  return lanes;
}
/// Of a block; whole warps of them, and they divide a chunk.
PRIM_FUNCTION constexpr int tokens_of(const Chunks& chunks, int lanes) {
  const int tokens = kThreads / lanes > kFewestTokens ? kThreads / lanes : kFewestTokens;
  return tokens < chunks.length ? tokens : chunks.length;
}

/// What a token's normaliser was made of.
struct Normalizer {
  float product, floor;
};

/// kPacked: h, dh and G are bfloat16 and move 16 bytes at a time.
template <bool kPacked>
class PrepBlock {
 public:
  DEVICE_FUNCTION explicit PrepBlock(const PrepParams& params) : p(params) {
    lanes = lanes_of(p.g.width);
    const int tokens = tokens_of(p.chunks, lanes), parts = p.chunks.length / tokens;
    // Neighbouring blocks take the heads of the same tokens, which lie side by side in memory.
    const int block = static_cast<int>(prim::block_idx().x), part = block / p.chunks.num_heads;
    const int slot = part / parts;
    head = block % p.chunks.num_heads;
    at = slot_at(p.chunks, slot);
    position = (int64_t{head} * p.chunks.slots + slot) * p.chunks.length;
    const int thread = static_cast<int>(prim::thread_idx().x);
    lane = thread % lanes;
    first = part % parts * tokens + thread / lanes;
    end = (part % parts + 1) * tokens;
  }

  DEVICE_FUNCTION void run() const {
    if (!at.used) return;
    const int step = kThreads / lanes;
    Normalizer next = normalizer(first);
#pragma unroll 1
    for (int row = first; row < end; row += step) {
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
    return row < end && at.chunk * p.chunks.length + row < at.sequence.length;
  }
  DEVICE_FUNCTION int64_t token(int row) const {
    return at.sequence.begin + int64_t{at.chunk} * p.chunks.length + row;
  }

  DEVICE_FUNCTION Normalizer normalizer(int row) const {
    if (!p.normalize || !has(row)) return {0, 1};
    const int64_t owner = int64_t{at.sequence.batch} * p.chunks.time + token(row);
    return {p.product[owner * p.chunks.num_heads + head], p.records[position + row].floor};
  }

  /// G of one token, and this lane's part of z. h is not read where the floor is the normaliser.
  DEVICE_FUNCTION float prepare(int row, const Normalizer& of) const {
    float factor = 1, sign = 0;
    if (p.normalize) {
      const float size = of.product < 0 ? -of.product : of.product;
      if (size > of.floor) sign = of.product < 0 ? -1.0F : 1.0F;
      factor = 1.0F / ((size <= of.floor ? of.floor : size) + p.eps);  // NaN stays NaN
    }
    const int64_t from = token_offset(p.dh, at.sequence.batch, token(row), head),
                  h = token_offset(p.h, at.sequence.batch, token(row), head),
                  to = token_offset(p.g, at.sequence.batch, token(row), head);
    if constexpr (kPacked)
      return -sign * prepare_packed(pieces_at(p.dh, from), pieces_at(p.h, h), pieces_at(p.g, to),
                                    factor, sign != 0);
    float z = 0;
#pragma unroll 1
    for (int col = 8 * lane; col < p.g.width; col += 8 * lanes) {
      float g[8], values[8] = {};
      if (sign != 0) load_eight(p.h, h, col, values);
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

  using Eight = Piece<bf16>;
  static DEVICE_FUNCTION Eight* pieces_at(const Operand& x, int64_t offset) {
    return reinterpret_cast<Eight*>(static_cast<bf16*>(x.data) + offset);
  }

  /// All loads of several pieces are on their way before the first is used.
  DEVICE_FUNCTION float prepare_packed(const Eight* dh, const Eight* h, Eight* g, float factor,
                                       bool has_z) const {
    constexpr int kPieces = 4;
    const int pieces = p.g.width / Eight::kNumbers;
    float z = 0;
#pragma unroll 1
    for (int first_piece = lane; first_piece < pieces; first_piece += kPieces * lanes) {
      Eight slopes[kPieces] = {}, values[kPieces] = {};
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (first_piece + i * lanes < pieces) slopes[i] = dh[first_piece + i * lanes];
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (has_z && first_piece + i * lanes < pieces) values[i] = h[first_piece + i * lanes];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        float out[Eight::kNumbers];
#pragma unroll
        for (int e = 0; e < Eight::kNumbers; e += 2) {
          out[e] = factor * slopes[i][e], out[e + 1] = factor * slopes[i][e + 1];
          if (has_z) z += out[e] * values[i][e] + out[e + 1] * values[i][e + 1];
        }
        Eight piece;
        piece.set(out);
        if (first_piece + i * lanes < pieces)
          prim::store16(g + first_piece + i * lanes, piece.bytes.words);
      }
    }
    return z;
  }

  const PrepParams& p;
  int head, lanes, lane, first, end;  ///< first, end: tokens of the chunk
  SlotRange at;
  int64_t position;
};

template <bool kPacked>
KERNEL_FUNCTION(kThreads, kPacked ? 3 : 4)
mlstm_prep(const GRID_CONSTANT PrepParams p) {
  PrepBlock<kPacked>(p).run();
}

bool is_packed(const Operand& x) {
  return x.dtype == Dtype::kBFloat16 && x.vector && x.width % 8 == 0;
}

}  // namespace

void launch_prep(const PrepParams& params, Stream stream) {
  const int parts = params.chunks.length / tokens_of(params.chunks, lanes_of(params.g.width));
  const u32 blocks = static_cast<u32>(params.chunks.slots * params.chunks.num_heads * parts);
  const bool packed = is_packed(params.h) && is_packed(params.dh) && is_packed(params.g);
  prim::launch("mlstm_prep", packed ? mlstm_prep<true> : mlstm_prep<false>, {blocks, kThreads},
               params, stream);
}

}  // namespace xlstm::cuda
