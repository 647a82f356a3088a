// A block has 16 rows of the matrix, its warps parts of their columns; a warp loads much of its part before it uses any. The
// products are those of the tensor cores, to which up to 8 rows of x cost the same, so that the time is that of the loads.
// Integers are exact in the types of 16 bits. Which column of the product a number is in is free as long as both factors
// agree, so each lane loads 16 neighbouring integers and numbers and keeps them: nothing is exchanged.
#include "cuda/linear_int8/linear_int8.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/pieces.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kOut = 16;         // rows of the matrix in a block
constexpr int kOwn = 16;         // neighbouring columns of a lane
constexpr int kStep = 4 * kOwn;  // columns of a warp at once
constexpr int kMostWarps = 8;
constexpr int kTile = 8;  // rows of x in a product
/// Steps of a warp that are on their way at once: what the registers of two blocks per multiprocessor hold. The order of sums
/// depends on it, so it does not on the rows of x.
template <class T>
constexpr int kLoad = sizeof(T) == 4 ? 4 : 8;

/// The first two integers of a word as numbers of 16 bits, then the last two. The low seven bits stand at the end of a power of
/// two whose last place is worth 1; it is subtracted with the sign's 128. Exact.
template <class T>
DEVICE_FUNCTION void pairs_of_integers(u32 word, u32& first, u32& last) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  constexpr u32 kPower = kHalf ? 0x64646464U : 0x43434343U;  // upper bytes of 1024 or 128
  const u32 low = word & 0x7f7f7f7fU, sign = word & 0x80808080U;
  const auto pair = [&](u32 bytes) {
    const u32 raised = prim::byte_perm(low, kPower, bytes),
              offset = prim::byte_perm(sign, kPower | 0x80808080U, bytes);
    return kHalf ? prim::add_f16x2(raised, offset) : prim::add_bf16x2(raised, offset);
  };
  first = pair(0x4140), last = pair(0x4342);
}

/// The bfloat16 number that x begins with.
DEVICE_FUNCTION float leading(float x) { return prim::float_of(prim::bits_of(x) & 0xffff0000U); }

/// The numbers of a row of x that meet a lane's integers.
template <class T>
struct Own {
  /// Summands of each number that are exact in 16 bits.
  static constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kPieces = kOwn / Piece<T>::kNumbers;
  Piece<T> pieces[kPieces];

  DEVICE_FUNCTION void load(const void* data, int64_t at, bool wanted) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i].load(data, at + i * Piece<T>::kNumbers, wanted);
  }

  /// The first two and the last two of those that meet a word of integers.
  DEVICE_FUNCTION void pairs(int word, u32 (&out)[kPlanes][2]) const {
    if constexpr (kPlanes == 1) {
#pragma unroll
      for (int i = 0; i < 2; ++i) out[0][i] = pieces[word / 2].bytes.words[word % 2 * 2 + i];
    } else {
      float rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[i] = pieces[word][i];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          out[plane][i] =
              prim::byte_perm(prim::bits_of(rest[2 * i]), prim::bits_of(rest[2 * i + 1]), 0x7632);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float part = leading(rest[i]);
          rest[i] = rest[i] == part ? 0.0f : rest[i] - part;  // infinity leaves nothing
        }
      }
    }
  }
};

/// d (16 rows of the matrix, 8 rows of x) += a b
template <class T>
DEVICE_FUNCTION void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if constexpr (std::is_same_v<T, f16>) {
    prim::mma_f16(d, a, b[0], b[1]);
  } else {
    prim::mma_bf16(d, a, b[0], b[1]);
  }
}

/// y of kTiles tiles of x.
template <class T, int kTiles>
KERNEL_FUNCTION(32 * kMostWarps, 2)
linear_int8_rows(const GRID_CONSTANT LinearInt8Params p) {
  using Inputs = Own<T>;
  constexpr int kPlanes = Inputs::kPlanes, kChains = kPlanes == 1 ? 2 : kPlanes;
  constexpr int kPitch = kTiles * kTile + 1;
  const int thread = static_cast<int>(prim::thread_idx().x), lane = thread % 32, warp = thread / 32,
            warps = static_cast<int>(prim::block_dim().x) / 32, group = lane / 4;
  const int64_t first = int64_t{prim::block_idx().x} * kOut, pitch = int64_t{p.columns} + 16;
  const int32_t steps = divide_up(p.columns, kStep);
  // What lies beyond the last row repeats it; nothing becomes of it.
  const auto within = [](int64_t row, int64_t rows) { return row < rows ? row : rows - 1; };

  // Long before they are needed: the parameters of the thread's row of y^T.
  const int64_t own_out = within(first + thread % kOut, p.out);
  const float scale = *reinterpret_cast<const float*>(p.weight + own_out * pitch + p.columns);
  const float bias = p.bias == nullptr ? 0.0f : load_number(p.bias, own_out, p.bias_dtype);

  const int8_t* integers[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    integers[half] = p.weight + within(first + 8 * half + group, p.out) * pitch;
  int64_t inputs[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    inputs[tile] = within(tile * kTile + group, p.rows) * p.columns;

  float sums[kTiles][kChains][4] = {};
#pragma unroll 1
  for (int32_t begin = kLoad<T> * warp; begin < steps; begin += kLoad<T> * warps) {
    Bytes16 loaded[kLoad<T>][2];
    const auto column = [&](int i) { return (begin + i) * kStep + lane % 4 * kOwn; };
#pragma unroll
    for (int i = 0; i < kLoad<T>; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        loaded[i][half] = column(i) < p.columns
                              ? *reinterpret_cast<const Bytes16*>(integers[half] + column(i))
                              : Bytes16{};
#pragma unroll
    for (int i = 0; i < kLoad<T>; ++i) {
      if (begin + i >= steps) break;
      Inputs x[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        x[tile].load(p.x, inputs[tile] + column(i), column(i) < p.columns);
#pragma unroll
      for (int word = 0; word < kOwn / 4; ++word) {
        u32 a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          pairs_of_integers<T>(loaded[i][half].words[word], a[half], a[half + 2]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          u32 b[kPlanes][2];
          x[tile].pairs(word, b);
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane)
            multiply<T>(sums[tile][kPlanes == 1 ? word % 2 : plane], a, b[plane]);
        }
      }
    }
  }

  float* const s = reinterpret_cast<float*>(prim::dynamic_shared());
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float sum = sums[tile][0][r];
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) sum += sums[tile][chain][r];
      const int row = r / 2 * 8 + group, at = tile * kTile + lane % 4 * 2 + r % 2;
      s[(warp * kOut + row) * kPitch + at] = sum;
    }
  prim::sync_block();
  if (first + thread % kOut >= p.out) return;
  for (int row = thread / kOut; row < p.rows; row += 2 * warps) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += s[(w * kOut + thread % kOut) * kPitch + row];
    from_float(static_cast<T*>(p.y)[row * int64_t{p.out} + own_out], scale * sum + bias);
  }
}

template <class T, int kTiles>
void launch_tiles(const LinearInt8Params& p, Stream stream) {
  const int warps = std::clamp<int>(divide_up(p.columns, kLoad<T> * kStep), 1, kMostWarps);
  prim::launch("linear_int8_rows", linear_int8_rows<T, kTiles>,
               {static_cast<u32>(divide_up(p.out, kOut)), 32 * static_cast<u32>(warps),
                sizeof(float) * kOut * (kTiles * kTile + 1) * warps},
               p, stream);
}

}  // namespace

void launch_linear_int8(const LinearInt8Params& p, Stream stream) {
  if (p.rows == 0) return;
  if (p.rows < 0 || p.rows > kMostLinearInt8Rows)
    throw std::runtime_error("linear_int8: expected at most " +
                             std::to_string(kMostLinearInt8Rows) + " rows, got " +
                             std::to_string(p.rows));
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    p.rows <= kTile ? launch_tiles<T, 1>(p, stream) : launch_tiles<T, 2>(p, stream);
  });
}

}  // namespace xlstm::cuda
