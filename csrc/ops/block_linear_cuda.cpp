// block_linear on CUDA: small square blocks by the kernels of cuda/block_linear, all others as batched products by ATen.
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/block_linear.h"
#include "csrc/ops/block_linear_products.h"
#include "csrc/ops/common.h"
#include "csrc/ops/cuda_device.h"
#include "csrc/ops/rows.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/kernel_tensors.h"
#include "cuda/block_linear/block_linear.h"
#endif

namespace xlstm::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

#ifdef XLSTM_CUDA

bool supported(const at::Tensor& x, const at::Tensor& weight) {
  std::string lack = cuda_kernels_lack(x.device());
  const int64_t size = weight.size(1);
  if (lack.empty() && x.scalar_type() == at::kDouble) lack = "float64";
  if (lack.empty() &&
      (size != weight.size(2) ||
       !cuda::block_linear_supported(weight.size(0), size, kernel_dtype(x.scalar_type()))))
    lack = std::to_string(weight.size(0)) + " blocks of " + std::to_string(size) + " by " +
           std::to_string(weight.size(2));
  return takes_kernels("block_linear", lack) && x.numel() > 0;
}

bool movable(const cuda::RowView& view, const at::Tensor& x) {
  return cuda::block_linear_aligned(view, kernel_dtype(x.scalar_type()));
}

/// The rows of x; a packed copy where 16 bytes cannot be moved at a time.
cuda::RowView row_view(at::Tensor& x) {
  const auto view = [&] {
    const cpu::Rows rows = rows_of(x);
    return cuda::RowView{const_cast<void*>(rows.data), rows.inner_rows, rows.inner_stride,
                         rows.outer_stride};
  };
  const cuda::RowView first = view();
  if (movable(first, x)) return first;
  x = x.clone(at::MemoryFormat::Contiguous);
  return view();
}

at::Tensor kernel_forward(const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias) {
  at::Tensor y = at::empty(x.sizes(), x.options()), rows = x;
  const at::Tensor weights = packed(weight), biases = bias ? packed(*bias) : at::Tensor();
  cuda::BlockLinearParams p;
  p.rows = x.numel() / x.size(-1);
  p.blocks = static_cast<int32_t>(weight.size(0)), p.size = static_cast<int32_t>(weight.size(1));
  p.dtype = kernel_dtype(x.scalar_type());
  p.x = row_view(rows), p.y = row_view(y);
  p.weight = weights.const_data_ptr(), p.bias = data_or_null(biases);
  run_kernels("block_linear", [&] { launch_block_linear(p, current_stream(x.device())); });
  return y;
}

Gradients kernel_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                          bool has_bias) {
  at::Tensor dx = at::empty(x.sizes(), x.options()), x_rows = x, dy_rows = dy;
  const at::Tensor dweight = at::empty(weight.sizes(), x.options()), weights = packed(weight);
  const at::Tensor dbias = at::empty({has_bias ? x.size(-1) : 0}, x.options());
  cuda::BlockLinearGradientParams p;
  p.rows = x.numel() / x.size(-1);
  p.blocks = static_cast<int32_t>(weight.size(0)), p.size = static_cast<int32_t>(weight.size(1));
  p.dtype = kernel_dtype(x.scalar_type());
  p.x = row_view(x_rows), p.dy = row_view(dy_rows), p.dx = row_view(dx);
  p.weight = weights.const_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = has_bias ? dbias.mutable_data_ptr() : nullptr;
  const at::Tensor partials =
      at::empty({cuda::block_linear_partials(p)}, x.options().dtype(at::kFloat));
  p.partials = partials.mutable_data_ptr<float>();
  run_kernels("block_linear",
              [&] { launch_block_linear_gradients(p, current_stream(x.device())); });
  return {dx, dweight, dbias};
}

#else

bool supported(const at::Tensor& x, const at::Tensor&) {
  return takes_kernels("block_linear", cuda_kernels_lack(x.device()));
}

#endif

at::Tensor block_linear_cuda(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias) {
  check_block_linear(x, weight, bias);
  const c10::DeviceGuard guard(x.device());
#ifdef XLSTM_CUDA
  if (supported(x, weight)) return kernel_forward(x, weight, bias);
#else
  supported(x, weight);
#endif
  return block_linear_products(x, weight, bias);
}

Gradients block_linear_backward_cuda(const at::Tensor& dy, const at::Tensor& x,
                                     const at::Tensor& weight, bool has_bias) {
  check_block_linear_gradient(dy, x, weight);
  const c10::DeviceGuard guard(x.device());
  const at::Tensor upstream = dy.to(x.scalar_type());
#ifdef XLSTM_CUDA
  if (supported(x, weight)) return kernel_backward(upstream, x, weight, has_bias);
#else
  supported(x, weight);
#endif
  return block_linear_products_backward(upstream, x, weight, has_bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("block_linear", block_linear_cuda);
  m.impl("block_linear_backward", block_linear_backward_cuda);
}

}  // namespace xlstm::ops
