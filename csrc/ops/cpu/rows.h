#pragma once
// Plain types shared by the kernels and the glue of the operators that work on rows of channels.
#include <cstdint>

namespace xlstm::cpu {

enum class Dtype : uint8_t { kFloat, kDouble, kBFloat16, kHalf };

/// The rows of a strided tensor whose last dimension has unit stride: row r starts at data +
/// offset(r) elements. Two strides describe a slice of a batch (x[:, a:b]) and a slice of channels
/// (x[..., a:b]) without a copy.
struct Rows {
  const void* data = nullptr;  // null: the tensor is absent
  int64_t inner_rows = 1;      // rows that are inner_stride apart
  int64_t inner_stride = 0;
  int64_t outer_stride = 0;  // from one group of inner_rows to the next

  __attribute__((always_inline)) int64_t offset(int64_t r) const {
    if (r < inner_rows) return r * inner_stride;
    return r / inner_rows * outer_stride + r % inner_rows * inner_stride;
  }
  template <class T>
  __attribute__((always_inline)) const T* row(int64_t r) const {
    return static_cast<const T*>(data) + offset(r);
  }
};

}  // namespace xlstm::cpu
