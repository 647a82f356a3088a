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

cpu::HeadwiseNormParams make_params(Inputs& in, const at::Tensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& skip,
                                    const OptionalTensor& skip_weight, const OptionalTensor& gate,
                                    double eps, std::string_view kind,
                                    std::string_view gate_activation) {
  check_headwise_norm({x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation});
  cpu::HeadwiseNormParams p;
  p.heads = x.size(-2);
  p.dim = x.size(-1);
  const int64_t channels = p.heads * p.dim;
  p.dtype = dtype_code(x, "headwise_norm: x");
  p.rows = channels == 0 ? 0 : x.numel() / channels;
  p.eps = eps;
  p.rms = kind == "rms";
  p.sigmoid_gate = gate_activation == "sigmoid";
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  in.x = x;
  p.x = rows_of(in.x, 2);
  p.x_head_stride = in.x.stride(-2);
  in.weight = parameter(weight, accumulate);
  in.bias = parameter(bias, accumulate);
  in.skip_weight = parameter(skip_weight, accumulate);
  p.weight = data_or_null(in.weight);
  p.bias = data_or_null(in.bias);
  p.skip_weight = data_or_null(in.skip_weight);
  if (skip) p.skip = rows_of(in.skip = skip->to(x.scalar_type()));
  if (gate) p.gate = rows_of(in.gate = gate->to(x.scalar_type()));
  return p;
}

at::Tensor headwise_norm_cpu(const at::Tensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& skip,
                             const OptionalTensor& skip_weight, const OptionalTensor& gate,
                             double eps, std::string_view kind, std::string_view gate_activation) {
  Inputs in;
  cpu::HeadwiseNormParams p =
      make_params(in, x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
  at::Tensor y = at::empty(headwise_norm_sizes(x), x.options());
  p.y = y.mutable_data_ptr();
  cpu::headwise_norm(p);
  return y;
}

at::Tensor grad_like(const OptionalTensor& input, const at::Tensor& x) {
  return at::empty(input ? input->sizes() : at::IntArrayRef{0}, x.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
headwise_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& skip,
                           const OptionalTensor& skip_weight, const OptionalTensor& gate,
                           double eps, std::string_view kind, std::string_view gate_activation) {
  Inputs in;
  cpu::HeadwiseNormParams p =
      make_params(in, x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
  check_headwise_rows(dy, x, "dy");
  at::Tensor dy_rows = dy.to(x.scalar_type());
  p.dy = rows_of(dy_rows);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor dskip = grad_like(skip, x), dgate = grad_like(gate, x);
  const RowBlocks blocks = row_blocks(p.rows, 16);
  const int64_t channels = p.heads * p.dim;
  const auto accumulate = x.options().dtype(accumulate_type(x.scalar_type()));
  const at::Tensor partials = at::empty({blocks.count, 3, channels}, accumulate);
  const OptionalTensor* const parameters[3] = {&weight, &bias, &skip_weight};
  at::Tensor grads[3];
  for (int i = 0; i < 3; ++i) {
    const bool present = parameters[i]->has_value();
    grads[i] = present ? at::empty({channels}, accumulate) : at::empty({0}, x.options());
    p.parameter_grads[i] = present ? grads[i].mutable_data_ptr() : nullptr;
  }
  p.dx = dx.mutable_data_ptr();
  p.dskip = skip ? dskip.mutable_data_ptr() : nullptr;
  p.dgate = gate ? dgate.mutable_data_ptr() : nullptr;
  p.block_count = blocks.count;
  p.block_rows = blocks.rows;
  p.partials = partials.mutable_data_ptr();
  cpu::headwise_norm_backward(p);
  for (int i = 0; i < 3; ++i)
    if (*parameters[i]) grads[i] = grads[i].to((*parameters[i])->scalar_type());
  if (skip) dskip = dskip.to(skip->scalar_type());
  if (gate) dgate = dgate.to(gate->scalar_type());
  return {dx, grads[0], grads[1], dskip, grads[2], dgate};
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("headwise_norm", headwise_norm_cpu);
  m.impl("headwise_norm_backward", headwise_norm_backward_cpu);
}

}  // namespace xlstm::ops
