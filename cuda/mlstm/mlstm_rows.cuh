#pragma once
// Rows of numbers in any of the three types, eight at a time: 16-byte accesses where the memory allows them.
#include "cuda/mlstm/mlstm_tiles.cuh"

namespace xlstm::cuda {

DEVICE_FUNCTION float half_of(u32 word, int half, Dtype dtype) {
  const u16 bits = static_cast<u16>(half == 0 ? word : word >> 16);
  return dtype == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
}

/// Numbers [col, col + 8) of the row at element offset `base`; those beyond the width are 0.
DEVICE_FUNCTION void load_eight(const Operand& x, int64_t base, int col, float (&out)[8]) {
  if (x.vector && col + 8 <= x.width) {
    const bool wide = x.dtype == Dtype::kFloat32;
    const char* from = static_cast<const char*>(x.data) + (base + col) * (wide ? 4 : 2);
    const Bytes16 first = *reinterpret_cast<const Bytes16*>(from);
    if (wide) {
      const Bytes16 second = *reinterpret_cast<const Bytes16*>(from + 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[i] = prim::float_of(first.words[i]);
        out[4 + i] = prim::float_of(second.words[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = half_of(first.words[i / 2], i % 2, x.dtype);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    out[i] = col + i < x.width ? load_number(x.data, base + (col + i) * x.inner, x.dtype) : 0.0F;
}

DEVICE_FUNCTION void store_eight(const Operand& x, int64_t base, int col,
                                 const float (&values)[8]) {
  if (x.vector && col + 8 <= x.width) {
    const bool wide = x.dtype == Dtype::kFloat32;
    char* to = static_cast<char*>(x.data) + (base + col) * (wide ? 4 : 2);
    Bytes16 first, second;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (wide) {
        first.words[i] = prim::bits_of(values[i]);
        second.words[i] = prim::bits_of(values[4 + i]);
      } else {
        first.words[i] = x.dtype == Dtype::kBFloat16
                             ? prim::pack_bf16x2(values[2 * i], values[2 * i + 1])
                             : prim::pack_f16x2(values[2 * i], values[2 * i + 1]);
      }
    }
    *reinterpret_cast<Bytes16*>(to) = first;
    if (wide) *reinterpret_cast<Bytes16*>(to + 16) = second;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (col + i < x.width) store_number(x.data, base + (col + i) * x.inner, x.dtype, values[i]);
}

}  // namespace xlstm::cuda
