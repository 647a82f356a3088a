#pragma once
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// Rows of integers with their scale behind them, as csrc/ops/linear_int8.h describes them.
struct Int8Matrix {
  int64_t in = 0, out = 0, row_bytes = 0;
  int8_t* data = nullptr;  // (out, row_bytes)

  int8_t* row(int64_t o) const { return data + o * row_bytes; }
  float* scale(int64_t o) const { return reinterpret_cast<float*>(row(o + 1) - 16); }
  int32_t* columns(int64_t o) const { return reinterpret_cast<int32_t*>(row(o + 1) - 12); }
};

/// From or to a packed matrix (out, in).
struct Int8ConversionParams {
  Dtype dtype = Dtype::kFloat;
  Int8Matrix matrix;
  void* values = nullptr;
};

struct LinearInt8Params {
  Dtype dtype = Dtype::kFloat;  // of y; not double
  Int8Matrix matrix;
  int64_t rows = 0;
  const float* x = nullptr;     // packed rows
  const float* bias = nullptr;  // (out) or null
  void* y = nullptr;            // packed rows
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(quantize_int8, Int8ConversionParams)
XLSTM_CPU_KERNEL(dequantize_int8, Int8ConversionParams)
XLSTM_CPU_KERNEL(linear_int8, LinearInt8Params)
