#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/cpu/norm_params.h"
#include "csrc/ops/norm.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_channels(const OptionalTensor& tensor, int64_t channels, std::string_view name) {
  if (!tensor) return;
  TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == channels, "headwise_norm: ", name,
              ": expected shape (NH*DH) = (", channels, "), got ", tensor->sizes());
}

void check_rows(const at::Tensor& tensor, const at::Tensor& x, std::string_view name) {
  std::vector<int64_t> expected = x.sizes().vec();
  expected.pop_back();
  expected.back() = x.size(-2) * x.size(-1);
  TORCH_CHECK(tensor.sizes() == at::IntArrayRef(expected), "headwise_norm: ", name,
              ": expected shape (...,NH*DH) = ", at::IntArrayRef(expected), ", got ",
              tensor.sizes());
}

// The tensors the kernel reads, alive while it runs; undefined where absent.
struct Inputs {
  at::Tensor x, weight, bias, skip, skip_weight, gate;
};

cpu::HeadwiseNormParams make_params(Inputs& in, const at::Tensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& skip,
                                    const OptionalTensor& skip_weight, const OptionalTensor& gate,
                                    double eps, std::string_view kind,
                                    std::string_view gate_activation) {
  TORCH_CHECK(x.dim() >= 2, "headwise_norm: x: expected (...,NH,DH), got shape ", x.sizes());
  TORCH_CHECK(kind == "layer" || kind == "rms",
              "headwise_norm: kind: expected \"layer\" or \"rms\", got \"", kind, "\"");
  TORCH_CHECK(gate_activation == "silu" || gate_activation == "sigmoid",
              "headwise_norm: gate_activation: expected \"silu\" or \"sigmoid\", got \"",
              gate_activation, "\"");
  TORCH_CHECK(skip.has_value() == skip_weight.has_value(),
              "headwise_norm: skip and skip_weight come together, got only ",
              skip ? "skip" : "skip_weight");
  cpu::HeadwiseNormParams p;
  p.heads = x.size(-2);
  p.dim = x.size(-1);
  const int64_t channels = p.heads * p.dim;
  check_channels(weight, channels, "weight");
  check_channels(bias, channels, "bias");
  check_channels(skip_weight, channels, "skip_weight");
  if (skip) check_rows(*skip, x, "skip");
  if (gate) check_rows(*gate, x, "gate");
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

std::vector<int64_t> output_sizes(const at::Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.back() *= x.size(-1);
  return sizes;
}

at::Tensor headwise_norm_cpu(const at::Tensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& skip,
                             const OptionalTensor& skip_weight, const OptionalTensor& gate,
                             double eps, std::string_view kind, std::string_view gate_activation) {
  Inputs in;
  cpu::HeadwiseNormParams p =
      make_params(in, x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
  at::Tensor y = at::empty(output_sizes(x), x.options());
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
  check_rows(dy, x, "dy");
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
