#include "csrc/ops/rows.h"

#include <algorithm>

#include "csrc/ops/cpu/capability.h"

namespace xlstm::ops {

cpu::Dtype dtype_code(const at::Tensor& tensor, std::string_view name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cpu::Dtype::kFloat;
    case at::kDouble:
      return cpu::Dtype::kDouble;
    case at::kBFloat16:
      return cpu::Dtype::kBFloat16;
    case at::kHalf:
      return cpu::Dtype::kHalf;
    default:
      TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got ",
                  tensor.scalar_type());
  }
}

at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor parameter(const std::optional<at::Tensor>& tensor, at::ScalarType accumulate) {
  if (!tensor.has_value() || !tensor->defined()) return {};
  return tensor->to(accumulate).contiguous();
}

bool has_matrix_unit(at::ScalarType type) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const bool amx =
      cpu::cpu_capability() == cpu::Capability::kAvx512 && __builtin_cpu_supports("amx-bf16");
  return amx && type == at::kBFloat16;
#else
  (void)type;
  return false;
#endif
}

const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

namespace {

// Merges the leading dimensions from the right; false where they need more than two strides.
bool merge_rows(const at::Tensor& tensor, int64_t trailing, cpu::Rows& rows) {
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};
  int groups = 0;
  for (int64_t d = tensor.dim() - trailing - 1; d >= 0; --d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (groups > 0 && stride == strides[groups - 1] * sizes[groups - 1]) {
      sizes[groups - 1] *= size;
      continue;
    }
    if (groups == 2) return false;
    sizes[groups] = size;
    strides[groups] = stride;
    ++groups;
  }
  rows.inner_rows = sizes[0];
  rows.inner_stride = strides[0];
  rows.outer_stride = strides[1];
  return true;
}

}  // namespace

cpu::Rows rows_of(at::Tensor& tensor, int64_t trailing) {
  cpu::Rows rows;
  const int64_t last = tensor.dim() - 1;
  const bool unit = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  if (!unit || !merge_rows(tensor, trailing, rows)) {
    tensor = tensor.contiguous();
    merge_rows(tensor, trailing, rows);
  }
  rows.data = tensor.const_data_ptr();
  return rows;
}

RowBlocks row_blocks(int64_t rows, int64_t least_rows) {
  constexpr int64_t kMostBlocks = 64;
  RowBlocks blocks;
  blocks.rows = std::max(least_rows, (rows + kMostBlocks - 1) / kMostBlocks);
  blocks.count = (rows + blocks.rows - 1) / blocks.rows;
  return blocks;
}

}  // namespace xlstm::ops
