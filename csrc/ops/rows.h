#pragma once
// From tensors to the plain views of csrc/ops/cpu/rows.h.
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "csrc/ops/cpu/rows.h"

namespace xlstm::ops {

/// float64 -> double, float32 -> float, bfloat16, float16; other dtypes are an error naming the
/// argument.
cpu::Dtype dtype_code(const at::Tensor& tensor, std::string_view name);

/// The dtype of accumulation: float64 for float64, else float32.
at::ScalarType accumulate_type(at::ScalarType type);

/// Parameters of a pointwise kernel: contiguous, in the dtype of accumulation. Undefined where
/// absent.
at::Tensor parameter(const std::optional<at::Tensor>& tensor, at::ScalarType accumulate);

/// Whether products in this dtype are best left to at::mm: bfloat16 where the CPU has a matrix unit
/// for it (AMX), 3 to 10 times faster than float32 there. Elsewhere tiles are converted to float32.
bool has_matrix_unit(at::ScalarType type);

/// Null where the tensor is undefined.
const void* data_or_null(const at::Tensor& tensor);

/// The rows of `tensor` without its last `trailing` dimensions (1 or 2). The trailing dimensions
/// need a unit inner stride; the leading ones must merge into two. Where they do not, `tensor` is
/// replaced by a contiguous copy.
cpu::Rows rows_of(at::Tensor& tensor, int64_t trailing = 1);

/// Number of fixed blocks that per-row sums of parameter gradients are split into, and the rows of
/// each: a function of the sizes alone, so that results do not depend on the number of threads.
struct RowBlocks {
  int64_t count = 0;
  int64_t rows = 1;
};
RowBlocks row_blocks(int64_t rows, int64_t least_rows);

}  // namespace xlstm::ops
