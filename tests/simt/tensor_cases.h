#pragma once
// What the kernels under test with tensor copies and wgmma have in common.
#include <vector>

#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"
#include "tests/simt/cases.h"

namespace simt_test {

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

/// A wgmma operand of `mn` rows (or columns) and `depth` k, as tensor copies lay it down: strips as wide as the
/// swizzle, one behind the other. Transposed: [k][mn] in memory, else [mn][k].
struct Operand {
  bool transposed;
  prim::Swizzle mode;
  prim::u32 mn, depth;

  prim::u32 bytes() const { return 2 * mn * depth; }
  prim::u32 columns() const { return prim::swizzle_bytes(mode) / 2; }  // of a strip
  prim::u32 rows() const { return transposed ? depth : mn; }
  prim::u32 width() const { return transposed ? mn : depth; }
  prim::u32 strip_bytes() const { return 2 * rows() * columns(); }

  /// Of k 16j .. 16j+15; `start`: shared address of the operand.
  prim::u64 descriptor(prim::u32 start, prim::u32 j) const {
    const prim::u32 atom = 16 * columns();  // eight rows of a strip
    if (mode == prim::Swizzle::kNone) {
      return transposed
                 ? prim::wgmma_descriptor(start + 2 * j * atom, atom, strip_bytes(), mode)
                 : prim::wgmma_descriptor(start + 2 * j * strip_bytes(), strip_bytes(), atom, mode);
    }
    if (transposed) return prim::wgmma_descriptor(start + 2 * j * atom, strip_bytes(), atom, mode);
    const prim::u32 k = 16 * j;
    return prim::wgmma_descriptor(start + k / columns() * strip_bytes() + 2 * (k % columns()), 16,
                                  atom, mode);
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

/// Register v of thread t: row 16 (t / 32) + t % 32 / 4 + 8 (v / 2 % 2), column 8 (v / 4) + 2 (t % 4) + v % 2.
template <int kCount>
void store_accumulator(float* out, prim::u32 pitch, const float (&d)[kCount]) {
  const prim::u32 t = prim::thread_idx().x % 128;
  for (prim::u32 v = 0; v < kCount; ++v) {
    const prim::u32 row = 16 * (t / 32) + t % 32 / 4 + 8 * (v / 2 % 2);
    out[row * pitch + 8 * (v / 4) + 2 * (t % 4) + v % 2] = d[v];
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
