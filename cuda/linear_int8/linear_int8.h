#pragma once
// Linear map with a matrix of 8 bits for few rows of x, y[m,o] = scale[o] sum_i weight[o,i] x[m,i] + bias[o]: the time of
// reading the integers once.
#include "cuda/tensors.h"

namespace xlstm::cuda {

constexpr int32_t kMostLinearInt8Rows = 16;  ///< of x

/// weight and x begin at multiples of 16 bytes. Columns are a multiple of 16: behind those of the matrix come zeros.
struct LinearInt8Params {
  int32_t rows = 0;  ///< of x, at most kMostLinearInt8Rows
  int32_t columns = 0, out = 0;
  Dtype dtype = Dtype::kFloat32;  ///< of x and y
  const int8_t* weight =
      nullptr;  ///< (out, columns + 16): 16 bytes behind the integers begin with the scale, float32
  const void* x = nullptr;     ///< (rows, columns) contiguous
  const void* bias = nullptr;  ///< (out) contiguous, or null
  Dtype bias_dtype = Dtype::kFloat32;
  void* y = nullptr;  ///< (rows, out) contiguous
};

/// A row of y has the same bits whatever rows it is computed with.
void launch_linear_int8(const LinearInt8Params& params, Stream stream);

}  // namespace xlstm::cuda
