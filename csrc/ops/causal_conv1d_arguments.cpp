#include "csrc/ops/causal_conv1d_arguments.h"

#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "causal_conv1d", kStepOp = "causal_conv1d_step";

void check_parameters(std::string_view op, const at::Tensor& x, const at::Tensor& weight,
                      const OptionalTensor& bias) {
  const int64_t channels = x.size(-1);
  check_floating(op, "x", x);
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == channels, op,
              ": weight: expected shape (C,W) = (", channels, ",W), got ", weight.sizes());
  TORCH_CHECK(weight.size(1) >= 2 && weight.size(1) <= 8, op,
              ": weight: expected a width W of 2 to 8, got ", weight.size(1));
  check_floating(op, "weight", weight);
  check_device(op, "weight", weight, x.device());
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": bias: expected shape (C) = (",
              channels, "), got ", bias->sizes());
  check_floating(op, "bias", *bias);
  check_device(op, "bias", *bias, x.device());
}

void check_state(const at::Tensor& state, std::string_view name, const CausalConv1dSizes& sizes,
                 at::Device device) {
  TORCH_CHECK(state.dim() == 3 && state.size(0) == sizes.num_sequences &&
                  state.size(1) == sizes.width - 1 && state.size(2) == sizes.channels,
              kOp, ": ", name, ": expected shape (N,W-1,C) = (", sizes.num_sequences, ",",
              sizes.width - 1, ",", sizes.channels, "), got ", state.sizes());
  check_device(kOp, name, state, device);
}

}  // namespace

CausalConv1dSizes check_causal_conv1d(const CausalConv1dArguments& a) {
  TORCH_CHECK(a.x.dim() == 3, kOp, ": x: expected (B,T,C), got shape ", a.x.sizes());
  check_parameters(kOp, a.x, a.weight, a.bias);
  CausalConv1dSizes sizes{a.x.size(0), a.x.size(1), a.x.size(2), a.weight.size(1), a.x.size(0)};
  if (a.cu_seqlens) {
    TORCH_CHECK(sizes.batch == 1, kOp,
                ": x: expected B = 1 with cu_seqlens, got B = ", sizes.batch);
    TORCH_CHECK(a.cu_seqlens->dim() == 1 && a.cu_seqlens->size(0) >= 1 &&
                    a.cu_seqlens->scalar_type() == at::kInt,
                kOp, ": cu_seqlens: expected int32 (N+1), got ", a.cu_seqlens->scalar_type(), " ",
                a.cu_seqlens->sizes());
    check_device(kOp, "cu_seqlens", *a.cu_seqlens, a.x.device());
    sizes.num_sequences = a.cu_seqlens->size(0) - 1;
    TORCH_CHECK(sizes.num_sequences > 0 || sizes.time == 0, kOp,
                ": cu_seqlens: expected to end at T = ", sizes.time, ", got 0 sequences");
  }
  if (a.state0) check_state(*a.state0, "state0", sizes, a.x.device());
  if (a.reset) {
    TORCH_CHECK(a.reset->dim() == 2 && a.reset->size(0) == sizes.batch &&
                    a.reset->size(1) == sizes.time && a.reset->scalar_type() == at::kBool,
                kOp, ": reset: expected bool (B,T) = (", sizes.batch, ",", sizes.time, "), got ",
                a.reset->scalar_type(), " ", a.reset->sizes());
    check_device(kOp, "reset", *a.reset, a.x.device());
  }
  return sizes;
}

void check_causal_conv1d_gradients(const CausalConv1dArguments& a, const CausalConv1dSizes& sizes,
                                   const OptionalTensor& dy, const OptionalTensor& dstate) {
  if (dy) {
    TORCH_CHECK(dy->sizes() == a.x.sizes(), kOp, ": dy: expected x's shape ", a.x.sizes(), ", got ",
                dy->sizes());
    check_device(kOp, "dy", *dy, a.x.device());
  }
  if (dstate) check_state(*dstate, "dstate", sizes, a.x.device());
}

CausalConv1dSizes check_causal_conv1d_step(const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& bias, const at::Tensor& state) {
  TORCH_CHECK(x.dim() == 2, kStepOp, ": x: expected (B,C), got shape ", x.sizes());
  check_parameters(kStepOp, x, weight, bias);
  const CausalConv1dSizes sizes{x.size(0), 1, x.size(1), weight.size(1), x.size(0)};
  TORCH_CHECK(
      state.dim() == 3 && state.size(0) == sizes.batch && state.size(1) == sizes.width - 1 &&
          state.size(2) == sizes.channels && state.scalar_type() == x.scalar_type(),
      kStepOp, ": state: expected ", x.scalar_type(), " (B,W-1,C) = (", sizes.batch, ",",
      sizes.width - 1, ",", sizes.channels, "), got ", state.scalar_type(), " ", state.sizes());
  check_device(kStepOp, "state", state, x.device());
  return sizes;
}

}  // namespace xlstm::ops
