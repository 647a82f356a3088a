#pragma once
// What the kernels under test with tensor copies and wgmma have in common.
#include <vector>

#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"
#include "tests/cuda/operand.h"
#include "tests/simt/cases.h"

namespace simt_test {

using conformance::Operand;
using conformance::store_accumulator;

/// Bytes before the first tile: barriers live there.
inline constexpr prim::u32 kTile = 1024;

struct LaunchOptions {
  std::uint64_t seed = 0;
  prim::u32 offset = 0;
};

/// Rows of 16-bit numbers, `pitch` apart; boxes of `box_width` x `box_height`.
inline prim::TensorMap matrix_map(void* base, prim::u32 width, prim::u32 height, prim::u32 pitch,
                                  prim::u32 box_width, prim::u32 box_height, prim::Swizzle mode) {
  return prim::make_tensor_map(
      {base, 2, {width, height}, {2, prim::u64{2} * pitch}, {box_width, box_height}, 2, mode});
}

/// 64 x 64 numbers and boxes of 32 rows.
struct Picture {
  std::vector<prim::u16> data = std::vector<prim::u16>(64 * 64);
  prim::TensorMap map = matrix_map(data.data(), 64, 64, 64, 64, 32, prim::Swizzle::k128);
  Picture() {
    for (prim::u32 i = 0; i < data.size(); ++i) data[i] = static_cast<prim::u16>(i);
  }
};

/// An operand in global memory, and its tensor map.
struct Matrix {
  Operand operand;
  std::vector<prim::u16> data;
  prim::TensorMap map;

  explicit Matrix(const Operand& shape, prim::u32 salt = 0)
      : operand(shape), data(shape.mn * shape.depth) {
    for (prim::u32 i = 0; i < data.size(); ++i)
      data[i] = prim::float_to_bf16(small_value(i + 1000 * salt));
    map = matrix_map(data.data(), shape.width(), shape.rows(), shape.width(), shape.columns(),
                     shape.rows(), shape.mode);
  }
  float at(prim::u32 mn, prim::u32 k) const {
    return prim::bf16_to_float(
        data[operand.transposed ? k * operand.mn + mn : mn * operand.depth + k]);
  }
};

inline void load_strips(unsigned char* tile, const Matrix& matrix, prim::u64* bar) {
  const Operand& operand = matrix.operand;
  for (prim::u32 strip = 0; strip < operand.width() / operand.columns(); ++strip) {
    prim::tma_load_2d(tile + strip * operand.strip_bytes(), matrix.map,
                      static_cast<int>(strip * operand.columns()), 0, bar);
  }
}

/// out (64 x n) = a b, by plain loops.
inline void expect_product(const std::vector<float>& out, const Matrix& a, const Matrix& b,
                           prim::u32 n) {
  for (prim::u32 i = 0; i < 64 * n; ++i) {
    double want = 0;
    for (prim::u32 k = 0; k < a.operand.depth; ++k) want += double{a.at(i / n, k)} * b.at(i % n, k);
    expect_near(&out[i], &want, 1, 1e-3, "product");
  }
}

}  // namespace simt_test
