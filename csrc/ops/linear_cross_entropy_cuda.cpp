// linear_cross_entropy on CUDA: products by cuBLAS, the loss of a block of rows by the kernel of cuda/loss; float64 and
// builds without nvcc in ATen calls. Nothing is checked that the host would have to wait for: a target outside of the
// vocabulary makes its loss NaN.
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/cuda_device.h"
#include "csrc/ops/linear_cross_entropy_blocks.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/kernel_tensors.h"
#include "cuda/loss/softmax_cross_entropy.h"
#endif

namespace xlstm::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

#ifdef XLSTM_CUDA

std::pair<at::Tensor, at::Tensor> kernel_block(const CrossEntropyBlock& b) {
  const at::Tensor loss = at::empty({b.logits.size(0)}, b.logits.options());
  cuda::SoftmaxCrossEntropyParams p;
  p.rows = b.logits.size(0), p.vocab = b.logits.size(1);
  p.logits = b.logits.const_data_ptr<float>();
  p.targets = b.targets.const_data_ptr<int64_t>();
  p.ignore_index = b.ignore_index, p.soft_cap = static_cast<float>(b.soft_cap);
  p.loss = loss.mutable_data_ptr<float>();
  p.scale = b.scale.defined() ? b.scale.const_data_ptr<float>() : nullptr;
  p.row_scales = b.row_scales.defined() ? b.row_scales.const_data_ptr<float>() : nullptr;
  at::Tensor gradient;
  if (b.gradient) {
    gradient = b.gradient_type == at::kFloat
                   ? b.logits
                   : at::empty(b.logits.sizes(), b.logits.options().dtype(b.gradient_type));
    p.gradient = gradient.mutable_data_ptr();
    p.dtype = kernel_dtype(b.gradient_type);
  }
  run_kernels("linear_cross_entropy",
              [&] { launch_softmax_cross_entropy(p, current_stream(b.logits.device())); });
  return {loss, gradient};
}

#endif

CrossEntropyBlockFunction block_function(const at::Tensor& x) {
  std::string lack = cuda_kernels_lack(x.device());
  if (lack.empty() && x.scalar_type() == at::kDouble) lack = "float64";
#ifdef XLSTM_CUDA
  if (takes_kernels("linear_cross_entropy", lack)) return kernel_block;
#else
  takes_kernels("linear_cross_entropy", lack);
#endif
  return cross_entropy_block;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward_cuda(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
    double soft_cap, std::string_view reduction, bool need_dx, bool need_dweight) {
  check_linear_cross_entropy_devices(x, weight, target);  // x itself may be what is not on the GPU
  const c10::DeviceGuard guard(x.device());
  return linear_cross_entropy_blocks(
      {x, weight, target, ignore_index, soft_cap, reduction, {}, need_dx, need_dweight},
      block_function(x));
}

at::Tensor linear_cross_entropy_cuda(const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& target, int64_t ignore_index,
                                     double soft_cap, std::string_view reduction) {
  return std::get<0>(linear_cross_entropy_forward_cuda(x, weight, target, ignore_index, soft_cap,
                                                       reduction, false, false));
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
    const OptionalTensor& dx, const OptionalTensor& dweight, int64_t ignore_index, double soft_cap,
    std::string_view reduction) {
  check_linear_cross_entropy_devices(x, weight, target);
  const c10::DeviceGuard guard(x.device());
  const at::ScalarType type = x.scalar_type();
  if (reduction != "none") {
    const auto scaled = [&](const OptionalTensor& unit) {
      return unit ? at::mul(*unit, grad).to(type) : at::empty({0}, x.options());
    };
    return {scaled(dx), scaled(dweight)};
  }
  auto [loss, all_dx, all_dweight] = linear_cross_entropy_blocks(
      {x, weight, target, ignore_index, soft_cap, reduction, grad, true, true}, block_function(x));
  return {all_dx.to(type), all_dweight.to(type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_cuda);
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward_cuda);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_cuda);
}

}  // namespace xlstm::ops
