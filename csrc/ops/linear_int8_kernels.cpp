#include "csrc/ops/linear_int8_kernels.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include "csrc/ops/kernel_tensors.h"
#include "csrc/ops/rows.h"
#include "cuda/linear_int8/linear_int8.h"

namespace xlstm::ops {
namespace {

/// x (rows, columns) as the kernel reads it: packed, zeros behind its own columns.
at::Tensor rows_for(const at::Tensor& x, int64_t rows, int64_t columns) {
  const at::Tensor flat = x.reshape({rows, x.size(-1)});
  if (columns != x.size(-1)) return at::constant_pad_nd(flat, {0, columns - x.size(-1)});
  return packed(flat);
}

}  // namespace

std::string linear_int8_kernels_lack(const at::Tensor& x, const at::Tensor& weight) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (x.scalar_type() == at::kDouble) return "float64";
  if (x.numel() > cuda::kMostLinearInt8Rows * x.size(-1))
    return "more than " + std::to_string(cuda::kMostLinearInt8Rows) + " rows";
  if (x.size(-1) > kMost || weight.size(0) > kMost)
    return "a matrix of more than 2^30 rows or columns";
  if (!weight.is_contiguous() || !aligned(weight))
    return "a matrix that is not packed from a multiple of 16 bytes on";
  return "";
}

at::Tensor linear_int8_kernels_forward(const at::Tensor& x, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias, cuda::Stream stream) {
  const int64_t rows = x.numel() / x.size(-1), columns = weight.size(1) - 16;
  const at::Tensor inputs = rows_for(x, rows, columns),
                   biases = bias ? kernel_parameter(*bias).contiguous() : at::Tensor();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  cuda::LinearInt8Params p;
  p.rows = static_cast<int32_t>(rows), p.columns = static_cast<int32_t>(columns);
  p.out = static_cast<int32_t>(weight.size(0));
  p.dtype = kernel_dtype(x.scalar_type());
  p.weight = weight.const_data_ptr<int8_t>(), p.x = inputs.const_data_ptr();
  p.bias = data_or_null(biases);
  if (bias) p.bias_dtype = kernel_dtype(biases.scalar_type());
  p.y = y.mutable_data_ptr();
  run_kernels("linear_int8", [&] { launch_linear_int8(p, stream); });
  return y;
}

}  // namespace xlstm::ops
