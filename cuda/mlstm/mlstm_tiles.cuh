#pragma once
// Tiles in shared memory and their products on tensor cores (mma.sync), for the mLSTM kernels of sm_80 and later.
//
// A number is kept as kPlanes bfloat16 planes: one for bfloat16 operands; two, high part and rest, for float32 and float16
// ones (16 significant bits, more than float16 has). A product of two-plane numbers is high*high + high*rest + rest*high:
// float32 to about 2^-17, where tf32 would give 2^-11.
#include "cuda/mlstm/mlstm_chunks.cuh"

namespace xlstm::cuda {

/// kRows x kCols numbers, kCols a multiple of 64. The 16-byte pieces of a row are permuted so that ldmatrix meets no bank
/// twice: piece c of row r lies at c ^ (r % 8).
template <int kRows, int kCols, int kPlanes>
struct Tile {
  static_assert(kCols % 64 == 0);
  bf16 data[kPlanes][kRows * kCols];

  static DEVICE_FUNCTION int offset(int row, int col) {
    return row * kCols + ((((col >> 3) ^ (row & 7)) << 3) | (col & 7));
  }
  DEVICE_FUNCTION bf16* at(int plane, int row, int col) { return &data[plane][offset(row, col)]; }
};

// Numbers and planes --------------------------------------------------------------------------------------------------

DEVICE_FUNCTION float low_half(u32 pair) { return prim::float_of(pair << 16); }
DEVICE_FUNCTION float high_half(u32 pair) { return prim::float_of(pair & 0xffff0000U); }

/// Two neighbours as packed planes.
template <int kPlanes>
DEVICE_FUNCTION void split(float low, float high, u32 (&planes)[kPlanes]) {
  planes[0] = prim::pack_bf16x2(low, high);
  if constexpr (kPlanes == 2)
    planes[1] = prim::pack_bf16x2(low - low_half(planes[0]), high - high_half(planes[0]));
}

/// Stores two neighbouring numbers (col even).
template <int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION void store_pair(Tile<kRows, kCols, kPlanes>& tile, int row, int col, float low,
                                float high) {
  u32 planes[kPlanes];
  split(low, high, planes);
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) *reinterpret_cast<u32*>(tile.at(p, row, col)) = planes[p];
}

/// The number at (row, col), planes summed.
template <int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION float number_at(Tile<kRows, kCols, kPlanes>& tile, int row, int col) {
  float sum = to_float(*tile.at(0, row, col));
  if constexpr (kPlanes == 2) sum += to_float(*tile.at(1, row, col));
  return sum;
}

// Loading ---------------------------------------------------------------------------------------------------------------

/// Element offset of column 0 of a token.
DEVICE_FUNCTION int64_t token_offset(const Operand& x, int batch, int64_t token, int head) {
  return batch * x.batch + token * x.time + head * x.head;
}

/// Rows [0, rows) of an operand, columns from `col`, into a tile; everything else becomes zero. `base`: token_offset of
/// row 0. With one plane the operand is bfloat16, and with `vector` the copies are asynchronous: the caller commits and waits.
/// All threads of the block.
template <int kThreads, int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION void load_tile(Tile<kRows, kCols, kPlanes>& tile, const Operand& x, int64_t base,
                               int rows, int col) {
  // A thread keeps its 8 columns and walks down the rows.
  constexpr int kStep = kThreads * 8 / kCols;
  static_assert(kThreads * 8 % kCols == 0);
  const int thread = static_cast<int>(prim::thread_idx().x);
  const int first = thread / (kCols / 8), c = thread % (kCols / 8) * 8;
  const int left = x.width - col - c;  // numbers of this piece, may be <= 0 or > 8
  const int valid = left < 0 ? 0 : left > 8 ? 8 : left;
  if constexpr (kPlanes == 1) {
    if (x.vector) {
      const bf16* data = static_cast<const bf16*>(x.data);
      const bf16* from = data + (valid > 0 ? base + first * x.time + col + c : 0);
      const int64_t step = valid > 0 ? kStep * x.time : 0;
      if (rows >= kRows) {
#pragma unroll
        for (int row = 0; row < kRows; row += kStep, from += step)
          if (kRows % kStep == 0 || first + row < kRows)
            prim::cp_async16(tile.at(0, first + row, c), from, static_cast<u32>(2 * valid));
      } else {
#pragma unroll 1
        for (int row = first; row < kRows; row += kStep, from += step)
          prim::cp_async16(tile.at(0, row, c), row < rows ? from : data,
                           static_cast<u32>(row < rows ? 2 * valid : 0));
      }
      return;
    }
  }
#pragma unroll 1
  for (int row = first; row < kRows; row += kStep) {
    const int count = row < rows ? valid : 0;
    const int64_t from = base + row * x.time + (col + c) * x.inner;
    if constexpr (kPlanes == 1) {
      const u16* data = static_cast<const u16*>(x.data);
#pragma unroll 1
      for (int i = 0; i < 8; ++i)
        tile.at(0, row, c + i)->bits = i < count ? data[from + i * x.inner] : u16{0};
    } else {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float low = i < count ? load_number(x.data, from + i * x.inner, x.dtype) : 0.0F;
        const float high =
            i + 1 < count ? load_number(x.data, from + (i + 1) * x.inner, x.dtype) : 0.0F;
        store_pair(tile, row, c + i, low, high);
      }
    }
  }
}

// Fragments of mma.m16n8k16 ---------------------------------------------------------------------------------------------
// l: lane. Accumulator d[i] of a 16x8 tile is row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2.

/// A (16x16 at [m][k]).
template <int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION void fragment_a(u32 (&a)[kPlanes][4], Tile<kRows, kCols, kPlanes>& tile, int m0,
                                int k0) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
#pragma unroll
  for (int p = 0; p < kPlanes; ++p)
    prim::ldmatrix_x4(a[p], tile.at(p, m0 + l % 16, k0 + 8 * (l / 16)));
}

/// A (16x16) of the transposed tile: memory is [k][m].
template <int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION void fragment_a_transposed(u32 (&a)[kPlanes][4], Tile<kRows, kCols, kPlanes>& tile,
                                           int m0, int k0) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
#pragma unroll
  for (int p = 0; p < kPlanes; ++p)
    prim::ldmatrix_x4_trans(a[p], tile.at(p, k0 + l % 8 + 8 * (l / 16), m0 + 8 * (l / 8 % 2)));
}

/// Two neighbouring B tiles (16 x 8 at n0 and n0 + 8) from memory [n][k]: b[p][0..1] and b[p][2..3].
template <int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION void fragment_b(u32 (&b)[kPlanes][4], Tile<kRows, kCols, kPlanes>& tile, int n0,
                                int k0) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
#pragma unroll
  for (int p = 0; p < kPlanes; ++p)
    prim::ldmatrix_x4(b[p], tile.at(p, n0 + l % 8 + 8 * (l / 16), k0 + 8 * (l / 8 % 2)));
}

/// The same from memory [k][n].
template <int kRows, int kCols, int kPlanes>
DEVICE_FUNCTION void fragment_b_transposed(u32 (&b)[kPlanes][4], Tile<kRows, kCols, kPlanes>& tile,
                                           int n0, int k0) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
#pragma unroll
  for (int p = 0; p < kPlanes; ++p)
    prim::ldmatrix_x4_trans(b[p], tile.at(p, k0 + l % 16, n0 + 8 * (l / 16)));
}

/// d += a b for the B tile at b[.][first], b[.][first + 1]; small terms first.
template <int kPlanes>
DEVICE_FUNCTION void multiply_add(float (&d)[4], const u32 (&a)[kPlanes][4],
                                  const u32 (&b)[kPlanes][4], int first) {
  if constexpr (kPlanes == 2) {
    prim::mma_bf16(d, a[0], b[1][first], b[1][first + 1]);
    prim::mma_bf16(d, a[1], b[0][first], b[0][first + 1]);
  }
  prim::mma_bf16(d, a[0], b[0][first], b[0][first + 1]);
}

/// Multiplies the columns (k) of an A fragment by factors: `pairs` are those of k0 + 2 (l % 4) + {0, 1} and + {8, 9}.
template <int kPlanes>
DEVICE_FUNCTION void scale_columns(u32 (&a)[kPlanes][4], const float (&pairs)[4]) {
  if constexpr (kPlanes == 1) {
    const u32 near = prim::pack_bf16x2(pairs[0], pairs[1]),
              far = prim::pack_bf16x2(pairs[2], pairs[3]);
#pragma unroll
    for (int r = 0; r < 4; ++r) a[0][r] = prim::mul_bf16x2(a[0][r], r < 2 ? near : far);
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float low = (low_half(a[0][r]) + low_half(a[1][r])) * pairs[r < 2 ? 0 : 2];
      const float high = (high_half(a[0][r]) + high_half(a[1][r])) * pairs[r < 2 ? 1 : 3];
      u32 planes[2];
      split(low, high, planes);
      a[0][r] = planes[0];
      a[1][r] = planes[1];
    }
  }
}

// Gates of one chunk ------------------------------------------------------------------------------------------------------

/// Copies `count` records (16-byte pieces) asynchronously; the caller commits.
template <int kThreads>
DEVICE_FUNCTION void load_records(GateRecord* to, const GateRecord* from, int count) {
  for (int i = static_cast<int>(prim::thread_idx().x); i < 2 * count; i += kThreads)
    prim::cp_async16(reinterpret_cast<char*>(to) + 16 * i,
                     reinterpret_cast<const char*>(from) + 16 * i);
}

/// Weight of token s in row t, both positions of one chunk; 0 by selection where s > t or a reset lies between.
DEVICE_FUNCTION float decay(const GateRecord& row, int t, const GateRecord& column, int s) {
  const float d = prim::ex2((column.alpha - row.peak) + (column.alpha_rest - row.peak_rest));
  return s <= t && s >= row.start ? d : 0.0F;
}

}  // namespace xlstm::cuda
