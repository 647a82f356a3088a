// mlstm_step_inputs: arguments, the CPU and what no kernel takes by the operators that it stands for, Autograd, Meta.
#include "csrc/ops/mlstm_step_inputs.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "csrc/ops/autocast.h"
#include "csrc/ops/autograd_support.h"
#include "csrc/ops/block_linear.h"
#include "csrc/ops/causal_conv1d.h"
#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

constexpr std::string_view kOp = MlstmStepInputsArguments::kName;

/// Calls f with the name and the tensor of every parameter.
template <class F>
void for_each_parameter(const MlstmInputParameters& p, const F& f) {
  for (const NamedTensor& each :
       {NamedTensor("conv_weight", p.conv_weight), NamedTensor("conv_bias", p.conv_bias),
        NamedTensor("q_weight", p.q_weight), NamedTensor("q_bias", p.q_bias),
        NamedTensor("k_weight", p.k_weight), NamedTensor("k_bias", p.k_bias),
        NamedTensor("v_weight", p.v_weight), NamedTensor("v_bias", p.v_bias),
        NamedTensor("igate_weight", p.igate_weight), NamedTensor("igate_bias", p.igate_bias),
        NamedTensor("fgate_weight", p.fgate_weight), NamedTensor("fgate_bias", p.fgate_bias)})
    if (each.tensor != nullptr) f(each.name, *each.tensor);
}

/// x and the parameters: of what is not a state.
bool anything_recorded(const MlstmStepInputsArguments& a) {
  bool found = recording(a.x);
  for_each_parameter(a.parameters, [&](std::string_view, const Tensor& tensor) {
    found = recording(tensor) || found;
  });
  return found;
}

MlstmStepInputsResults step_inputs_op(const MlstmStepInputsArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_step_inputs", "")
                             .typed<decltype(mlstm_step_inputs_kernel<step_inputs_op>)>();
  const MlstmInputParameters& p = a.parameters;
  return op.call(a.x, p.conv_weight, p.conv_bias, p.q_weight, p.q_bias, p.k_weight, p.k_bias,
                 p.v_weight, p.v_bias, p.igate_weight, p.igate_bias, p.fgate_weight, p.fgate_bias,
                 a.window);
}

MlstmStepInputsResults step_inputs_cpu(const MlstmStepInputsArguments& a) {
  check_mlstm_step_inputs(a);
  return mlstm_step_inputs_generic(a);
}

/// The results join the graph, so that a backward pass through them is an error and not a silent zero.
class StepInputs : public torch::autograd::Function<StepInputs> {
 public:
  static variable_list forward(torch::autograd::AutogradContext*, at::TensorList,
                               const MlstmStepInputsArguments& a) {
    const at::AutoDispatchBelowAutograd guard;
    const auto [conv, q, k, v, igate, fgate] = step_inputs_op(a);
    return {conv, q, k, v, igate, fgate};
  }
  static variable_list backward(torch::autograd::AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, kOp,
                " has no derivative: train with causal_conv1d, block_linear and a linear map");
  }
};

MlstmStepInputsResults step_inputs_autograd(const MlstmStepInputsArguments& a) {
  TORCH_CHECK(!recording(a.window), kOp,
              ": window: expected a state without gradient, which is written in place");
  if (anything_recorded(a)) {
    variable_list inputs = {a.x};
    for_each_parameter(a.parameters,
                       [&](std::string_view, const Tensor& tensor) { inputs.push_back(tensor); });
    const variable_list out = StepInputs::apply(at::TensorList(inputs), a);
    return {out[0], out[1], out[2], out[3], out[4], out[5]};
  }
  const at::AutoDispatchBelowAutograd guard;
  return step_inputs_op(a);
}

MlstmStepInputsResults step_inputs_in_place(const MlstmStepInputsArguments& a) {
  return write_in_place(kOp, {{"window", a.window}}, [&] { return step_inputs_op(a); });
}

MlstmStepInputsResults step_inputs_meta(const MlstmStepInputsArguments& a) {
  check_mlstm_step_inputs_devices(a);
  check_rank(kOp, "x", a.x, 2);
  check_rank(kOp, "igate_weight", a.parameters.igate_weight, 2);
  const auto empty = [&a](const c10::SymInt& width) {
    return at::empty_symint({a.x.sym_size(0), width}, a.x.options());
  };
  const c10::SymInt channels = a.x.sym_size(1), heads = a.parameters.igate_weight.sym_size(0);
  return {empty(channels), empty(channels), empty(channels),
          empty(channels), empty(heads),    empty(heads)};
}

}  // namespace

void check_mlstm_step_inputs_devices(const MlstmStepInputsArguments& a) {
  const at::Device device = a.x.device();
  for_each_parameter(a.parameters, [&](std::string_view name, const Tensor& tensor) {
    check_device(kOp, name, tensor, device);
  });
  check_device(kOp, "window", a.window, device);
}

MlstmStepInputsSizes check_mlstm_step_inputs(const MlstmStepInputsArguments& a) {
  check_mlstm_step_inputs_devices(a);
  const MlstmInputParameters& p = a.parameters;
  TORCH_CHECK(a.x.dim() == 2, kOp, ": x: expected (B,C), got shape ", a.x.sizes());
  check_floating(kOp, "x", a.x);
  check_rank(kOp, "conv_weight", p.conv_weight, 2);
  check_rank(kOp, "q_weight", p.q_weight, 3);
  check_rank(kOp, "igate_weight", p.igate_weight, 2);
  const MlstmStepInputsSizes sizes{a.x.size(0), a.x.size(1), p.igate_weight.size(0),
                                   p.conv_weight.size(1), p.q_weight.size(2)};
  const auto& [batch, channels, heads, width, size] = sizes;
  TORCH_CHECK(width >= 2 && width <= 8, kOp, ": conv_weight: expected a width W of 2 to 8, got ",
              width);
  TORCH_CHECK(size > 0 && channels % size == 0, kOp,
              ": q_weight: expected blocks (C/S,S,S) whose size S divides C = ", channels,
              ", got shape ", p.q_weight.sizes());
  check_shape(kOp, "conv_weight", p.conv_weight, {channels, width}, "(C,W)");
  if (p.conv_bias) check_shape(kOp, "conv_bias", *p.conv_bias, {channels}, "(C)");
  for (const NamedTensor& each :
       {NamedTensor("q_weight", p.q_weight), {"k_weight", p.k_weight}, {"v_weight", p.v_weight}})
    check_shape(kOp, each.name, *each.tensor, {channels / size, size, size}, "(C/S,S,S)");
  for (const NamedTensor& each :
       {NamedTensor("q_bias", p.q_bias), {"k_bias", p.k_bias}, {"v_bias", p.v_bias}})
    if (each.tensor != nullptr) check_shape(kOp, each.name, *each.tensor, {channels}, "(C)");
  for (const NamedTensor& each :
       {NamedTensor("igate_weight", p.igate_weight), {"fgate_weight", p.fgate_weight}})
    check_shape(kOp, each.name, *each.tensor, {heads, 3 * channels}, "(NH,3*C)");
  for (const NamedTensor& each :
       {NamedTensor("igate_bias", p.igate_bias), {"fgate_bias", p.fgate_bias}})
    check_shape(kOp, each.name, *each.tensor, {heads}, "(NH)");
  for_each_parameter(p, [&](std::string_view name, const Tensor& tensor) {
    if (name == "conv_weight" || name == "conv_bias") return check_floating(kOp, name, tensor);
    check_dtype(kOp, name, tensor, a.x.scalar_type());
  });
  check_shape(kOp, "window", a.window, {batch, width - 1, channels}, "(B,W-1,C)");
  check_dtype(kOp, "window", a.window, a.x.scalar_type());
  at::assert_no_internal_overlap(a.window);
  at::assert_no_overlap(a.window, a.x);
  return sizes;
}

MlstmStepInputsResults mlstm_step_inputs_generic(const MlstmStepInputsArguments& a) {
  const WithoutAutocast no_autocast;
  const MlstmInputParameters& p = a.parameters;
  const Tensor conv = causal_conv1d_step(a.x, p.conv_weight, p.conv_bias, a.window, /*silu=*/true);
  const Tensor q = block_linear(conv, p.q_weight, p.q_bias),
               k = block_linear(conv, p.k_weight, p.k_bias),
               v = block_linear(a.x, p.v_weight, p.v_bias);
  const Tensor weight = at::cat({p.igate_weight, p.fgate_weight}),
               bias = at::cat({p.igate_bias, p.fgate_bias});
  const std::vector<Tensor> gates = at::linear(at::cat({q, k, v}, 1), weight, bias).chunk(2, 1);
  const auto own = [](const Tensor& part) { return part.clone(at::MemoryFormat::Contiguous); };
  return {conv, q, k, v, own(gates[0]), own(gates[1])};
}

MlstmStepInputs mlstm_step_inputs(const Tensor& x, const MlstmInputParameters& parameters,
                                  Tensor& window) {
  auto [a, q, k, v, igate, fgate] = step_inputs_op({x, parameters, window});
  return {a, q, k, v, igate, fgate};
}

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("mlstm_step_inputs", mlstm_step_inputs_kernel<step_inputs_cpu>);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("mlstm_step_inputs", mlstm_step_inputs_kernel<step_inputs_autograd>);
}

TORCH_LIBRARY_IMPL(xlstm, ADInplaceOrView, m) {
  m.impl("mlstm_step_inputs", mlstm_step_inputs_kernel<step_inputs_in_place>);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("mlstm_step_inputs", mlstm_step_inputs_kernel<step_inputs_meta>);
}

}  // namespace xlstm::ops
