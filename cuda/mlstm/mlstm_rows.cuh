#pragma once
// Rows of numbers in any of the three types, eight at a time: 16-byte accesses where the memory allows them.
#include "cuda/mlstm/mlstm_tiles.cuh"
#include "cuda/pieces.cuh"

namespace xlstm::cuda {

/// Numbers [col, col + 8) of the row at element offset `base`; those beyond the width are 0.
DEVICE_FUNCTION void load_eight(const Operand& x, int64_t base, int col, float (&out)[8]) {
  if (x.vector && col + 8 <= x.width) return load_eight(x.data, base + col, x.dtype, out);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    out[i] = col + i < x.width ? load_number(x.data, base + (col + i) * x.inner, x.dtype) : 0.0F;
}

DEVICE_FUNCTION void store_eight(const Operand& x, int64_t base, int col,
                                 const float (&values)[8]) {
  if (x.vector && col + 8 <= x.width) return store_eight(x.data, base + col, x.dtype, values);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (col + i < x.width) store_number(x.data, base + (col + i) * x.inner, x.dtype, values[i]);
}

}  // namespace xlstm::cuda
