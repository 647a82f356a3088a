#pragma once
// Operands of the wgmma cases in global and shared memory (sm_90a).
#include <cmath>

#include "tests/cuda/conformance.h"
#include "tests/cuda/operand.h"

namespace conformance {

enum class Fill {
  kWhole,     ///< small whole numbers
  kIdentity,  ///< 1 where k = mn
  kCoded,     ///< a number that tells (mn, k)
  kFraction,  ///< anything in [-1, 1)
  kAdder,  ///< 1 and a second term that is 2^-m in row m of the product, negative in its odd columns
};

inline float filled(Fill fill, u32 salt, u32 mn, u32 k) {
  switch (fill) {
    case Fill::kIdentity:
      return mn == k ? 1.0F : 0.0F;
    case Fill::kCoded:
      return static_cast<float>(static_cast<int>((17 * mn + 101 * k) % 509) % 256 - 128);
    case Fill::kFraction:
      return fraction(100000 * salt + 1000 * mn + k);
    case Fill::kAdder:
      if (k > 1) return 0;
      return k == 0        ? 1.0F
             : salt == 0   ? std::ldexp(1.0F, -static_cast<int>(mn))
             : mn % 2 == 0 ? 1.0F
                           : -1.0F;
    default:
      return whole(100000 * salt + 1000 * mn + k);
  }
}

/// An operand in global memory, and its tensor map of one box per strip.
struct Matrix {
  Operand operand;
  Buffer<u16> data;
  TensorMap map;

  Matrix(const Operand& shape, Fill fill, u32 salt, bool half)
      : operand(shape), data(shape.mn * shape.depth) {
    for (u32 mn = 0; mn < shape.mn; ++mn) {
      for (u32 k = 0; k < shape.depth; ++k) {
        const float value = filled(fill, salt, mn, k);
        data[shape.transposed ? k * shape.mn + mn : mn * shape.depth + k] =
            half ? f16_bits(value) : bf16_bits(value);
      }
    }
    map = matrix_map(data.upload(), shape.width(), shape.rows(), shape.width(), shape.columns(),
                     shape.rows(), shape.mode);
  }
};

DEVICE_FUNCTION void load_strips(unsigned char* tile, const Operand& operand, const TensorMap& map,
                                 u64* bar) {
  for (u32 strip = 0; strip < operand.width() / operand.columns(); ++strip) {
    prim::tma_load_2d(tile + strip * operand.strip_bytes(), map,
                      static_cast<int>(strip * operand.columns()), 0, bar);
  }
}

struct Product {
  TensorMap map_a, map_b;
  Operand a, b;
  const u16* rows_a;   ///< A as [m][k], for the form with A in registers
  u64 flip_a, flip_b;  ///< bits of the descriptors that must not matter
  float* out;
};

/// Both operands in shared memory, A at tiles(), B behind it. All threads call it.
DEVICE_FUNCTION void load_operands(const Product& p, bool load_a) {
  u64* bar = barriers();
  const u32 bytes_a = load_a ? p.a.bytes() : 0;
  if (prim::thread_idx().x == 0) {
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
    prim::mbar_arrive_expect_tx(bar, bytes_a + p.b.bytes());
    if (load_a) load_strips(tiles(), p.a, p.map_a, bar);
    load_strips(tiles() + bytes_a, p.b, p.map_b, bar);
  }
  prim::sync_block();
  prim::mbar_wait(bar, 0);
}

/// Register r of k slice j of an A operand in registers.
DEVICE_FUNCTION u32 fragment(const Product& p, u32 j, u32 r) {
  const u32 t = prim::thread_idx().x % 128;
  const u32 row = 16 * (t / 32) + t % 32 / 4 + 8 * (r % 2), k = 16 * j + 2 * (t % 4) + 8 * (r / 2);
  const u16* at = p.rows_a + row * p.a.depth + k;
  return at[0] | static_cast<u32>(at[1]) << 16;
}

}  // namespace conformance
