#pragma once
// Sums of partial sums, in an order that depends on their number alone: what kernels leave per block becomes the gradient
// of a parameter.
#include "cuda/tensors.h"

namespace xlstm::cuda {

/// out[i * stride] = sum over rows of rows[row * pitch + first + i], for every part and i < size.
struct ColumnSums {
  static constexpr int kMostParts = 9;
  struct Part {
    int64_t first = 0, size = 0;
    void* out = nullptr;
    int64_t stride = 1;
    Dtype dtype = Dtype::kFloat32;
  };

  const float* rows = nullptr;
  int64_t count = 0, pitch = 0;
  Part parts[kMostParts] = {};
  int32_t num_parts = 0;

  void add(const Part& part) { parts[num_parts++] = part; }
};

void launch_column_sums(const ColumnSums& params, Stream stream);

}  // namespace xlstm::cuda
