#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/cpu/norm_params.h"
#include "csrc/ops/norm_arguments.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

// The tensors the kernel reads, alive while it runs; undefined where absent.
struct Inputs {
  at::Tensor x, weight, bias, skip, skip_weight, gate;
};

cpu::HeadwiseNormParams make_params(Inputs& in, const HeadwiseNormArguments& a) {
  check_headwise_norm(a);
  const at::Tensor& x = a.x;
  cpu::HeadwiseNormParams p;
  p.heads = x.size(-2);
  p.dim = x.size(-1);
  const int64_t channels = p.heads * p.dim;
  p.dtype = dtype_code(x, "headwise_norm: x");
  p.rows = channels == 0 ? 0 : x.numel() / channels;
  p.eps = a.eps;
  p.rms = a.is_rms();
  p.sigmoid_gate = a.is_sigmoid();
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  in.x = x;
  p.x = rows_of(in.x, 2);
  p.x_head_stride = in.x.stride(-2);
  in.weight = parameter(a.weight, accumulate);
  in.bias = parameter(a.bias, accumulate);
  in.skip_weight = parameter(a.skip_weight, accumulate);
  p.weight = data_or_null(in.weight);
  p.bias = data_or_null(in.bias);
  p.skip_weight = data_or_null(in.skip_weight);
  if (a.skip) p.skip = rows_of(in.skip = a.skip->to(x.scalar_type()));
  if (a.gate) p.gate = rows_of(in.gate = a.gate->to(x.scalar_type()));
  return p;
}

at::Tensor run_forward(cpu::HeadwiseNormParams& p, const at::Tensor& x) {
  at::Tensor y = at::empty(headwise_norm_sizes(x), x.options());
  p.y = y.mutable_data_ptr();
  cpu::headwise_norm(p);
  return y;
}

at::Tensor grad_like(const OptionalTensor& input, const at::Tensor& x) {
  return at::empty(input ? input->sizes() : at::IntArrayRef{0}, x.options());
}

HeadwiseNormGradients run_backward(const at::Tensor& dy, const HeadwiseNormArguments& a,
                                   const OptionalTensor& dsum = {}) {
  Inputs in;
  const at::Tensor& x = a.x;
  cpu::HeadwiseNormParams p = make_params(in, a);
  check_headwise_rows(a, dy, "dy");
  at::Tensor dy_rows = dy.to(x.scalar_type()), dsum_rows;
  p.dy = rows_of(dy_rows);
  if (dsum) p.dsum = rows_of(dsum_rows = dsum->to(x.scalar_type()));
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor dskip = grad_like(a.skip, x), dgate = grad_like(a.gate, x);
  const RowBlocks blocks = row_blocks(p.rows, 16);
  const int64_t channels = p.heads * p.dim;
  const auto accumulate = x.options().dtype(accumulate_type(x.scalar_type()));
  const at::Tensor partials = at::empty({blocks.count, 3, channels}, accumulate);
  const OptionalTensor* const parameters[3] = {&a.weight, &a.bias, &a.skip_weight};
  at::Tensor grads[3];
  for (int i = 0; i < 3; ++i) {
    const bool present = parameters[i]->has_value();
    grads[i] = present ? at::empty({channels}, accumulate) : at::empty({0}, x.options());
    p.parameter_grads[i] = present ? grads[i].mutable_data_ptr() : nullptr;
  }
  p.dx = dx.mutable_data_ptr();
  p.dskip = a.skip ? dskip.mutable_data_ptr() : nullptr;
  p.dgate = a.gate ? dgate.mutable_data_ptr() : nullptr;
  p.block_count = blocks.count;
  p.block_rows = blocks.rows;
  p.partials = partials.mutable_data_ptr();
  cpu::headwise_norm_backward(p);
  for (int i = 0; i < 3; ++i)
    if (*parameters[i]) grads[i] = grads[i].to((*parameters[i])->scalar_type());
  if (a.skip) dskip = dskip.to(a.skip->scalar_type());
  if (a.gate) dgate = dgate.to(a.gate->scalar_type());
  return {dx, grads[0], grads[1], dskip, grads[2], dgate};
}

at::Tensor headwise_norm_cpu(const at::Tensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& skip,
                             const OptionalTensor& skip_weight, const OptionalTensor& gate,
                             double eps, std::string_view kind, std::string_view gate_activation) {
  Inputs in;
  cpu::HeadwiseNormParams p =
      make_params(in, {x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation});
  return run_forward(p, x);
}

HeadwiseNormGradients headwise_norm_backward_cpu(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& skip, const OptionalTensor& skip_weight,
    const OptionalTensor& gate, double eps, std::string_view kind,
    std::string_view gate_activation) {
  return run_backward(dy, {x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation});
}

ResidualNormResult residual_norm_cpu(const at::Tensor& x, const at::Tensor& branch,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     double eps, std::string_view kind) {
  const at::Tensor sum = empty_residual_sum(x, branch);
  const SumNorm norm(sum, weight, bias, eps, kind);
  Inputs in;
  cpu::HeadwiseNormParams p = make_params(in, norm.arguments());
  at::Tensor terms[2] = {x.to(sum.scalar_type()), branch.to(sum.scalar_type())};
  for (int i = 0; i < 2; ++i) p.terms[i] = rows_of(terms[i]);
  p.sum = sum.mutable_data_ptr();
  return {sum, run_forward(p, norm.arguments().x)};
}

ResidualNormGradients residual_norm_backward_cpu(const OptionalTensor& dsum, const at::Tensor& dy,
                                                 const at::Tensor& sum,
                                                 const OptionalTensor& weight,
                                                 const OptionalTensor& bias, double eps,
                                                 std::string_view kind) {
  const SumNorm norm(sum, weight, bias, eps, kind);
  if (dsum) check_headwise_rows(norm.arguments(), *dsum, "dsum");
  return residual_gradients(sum, run_backward(dy, norm.arguments(), dsum));
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("headwise_norm", headwise_norm_cpu);
  m.impl("headwise_norm_backward", headwise_norm_backward_cpu);
  m.impl("residual_norm", residual_norm_cpu);
  m.impl("residual_norm_backward", residual_norm_backward_cpu);
}

}  // namespace xlstm::ops
