#pragma once
// Small products C += A P with C a few rows by up to four vectors, held in registers over all of k. Every entry of C is
// one chain of multiply-adds in the order of k: the other rows never change its bits.
#include "csrc/ops/cpu/slstm_vector.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

/// A[row * row_stride + k * k_stride], P[k * p_stride + column], C[row * c_stride + column].
template <class Real>
struct Product {
  const Real* a;
  int64_t row_stride, k_stride;
  const Real* p;
  int64_t p_stride, depth;
  Real* c;
  int64_t c_stride;
};

template <class Real, int kRows, int kVectors>
void product_tile(const Product<Real>& t) {
  constexpr int width = Simd<Real>::kWidth;
  Real* const c = t.c;
  const int64_t c_stride = t.c_stride;
  Vec<Real> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * c_stride + v * width);
  const Real* a = t.a;
  const Real* p = t.p;
  int64_t k = t.depth;  // at least 1
  do {
    Vec<Real> operand[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) operand[v] = load(p + v * width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Real factor = a[r * t.row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += operand[v] * factor;
    }
    a += t.k_stride;
    p += t.p_stride;
  } while (--k > 0);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * width, sum[r][v]);
}

template <class Real, int kVectors>
void product_rows(int64_t rows, const Product<Real>& t) {
  switch (rows) {
    case 1:
      return product_tile<Real, 1, kVectors>(t);
    case 2:
      return product_tile<Real, 2, kVectors>(t);
    case 3:
      return product_tile<Real, 3, kVectors>(t);
  }
  if constexpr (kTileRows > 3) {
    switch (rows) {
      case 4:
        return product_tile<Real, 4, kVectors>(t);
      case 5:
        return product_tile<Real, 5, kVectors>(t);
      case 6:
        return product_tile<Real, 6, kVectors>(t);
    }
  }
}

template <class Real>
void product_panel(int64_t rows, int64_t vectors, const Product<Real>& t) {
  switch (vectors) {
    case 1:
      return product_rows<Real, 1>(rows, t);
    case 2:
      return product_rows<Real, 2>(rows, t);
    case 3:
      return product_rows<Real, 3>(rows, t);
    default:
      return product_rows<Real, 4>(rows, t);
  }
}

/// Any number of rows, one panel of `vectors` <= 4 vectors. The panel is walked in pieces of half the L1 cache, each
/// used by all rows before the next.
template <class Real>
void multiply_add(int64_t rows, int64_t vectors, Product<Real> t) {
  if (rows == 0 || t.depth == 0) return;
  constexpr int64_t kPanelBytes = 32768;
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  const int64_t depth = t.depth;
  const int64_t piece = blocks == 1 ? depth : kPanelBytes / (vectors * kVectorBytes);
  const Product<Real> whole = t;
  for (int64_t k = 0; k < depth; k += piece) {
    t.depth = depth - k < piece ? depth - k : piece;
    t.p = whole.p + k * t.p_stride;
    for (int64_t block = 0, row = 0; block < blocks; ++block) {
      const int64_t count = (rows - row + blocks - block - 1) / (blocks - block);
      t.a = whole.a + row * t.row_stride + k * t.k_stride;
      t.c = whole.c + row * t.c_stride;
      product_panel(count, vectors, t);
      row += count;
    }
  }
}

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
