#include "csrc/ops/causal_conv1d_arguments.h"

#include <ATen/MemoryOverlap.h>

#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "causal_conv1d", kStepOp = "causal_conv1d_step";

void check_parameters(std::string_view op, const at::Tensor& x, const at::Tensor& weight,
                      const OptionalTensor& bias) {
  const int64_t channels = x.size(-1);
  check_floating(op, "x", x);
  check_rank(op, "weight", weight, 2);
  check_shape(op, "weight", weight, {channels, weight.size(1)}, "(C,W)");
  TORCH_CHECK(weight.size(1) >= 2 && weight.size(1) <= 8, op,
              ": weight: expected a width W of 2 to 8, got ", weight.size(1));
  check_floating(op, "weight", weight);
  if (!bias) return;
  check_shape(op, "bias", *bias, {channels}, "(C)");
  check_floating(op, "bias", *bias);
}

void check_state(std::string_view op, std::string_view name, const at::Tensor& state,
                 const CausalConv1dSizes& sizes) {
  check_shape(op, name, state, {sizes.num_sequences, sizes.width - 1, sizes.channels},
              "(B or N,W-1,C)");
}

}  // namespace

void check_causal_conv1d_devices(const CausalConv1dArguments& a) {
  check_devices(kOp, a.x.device(),
                {{"weight", a.weight},
                 {"bias", a.bias},
                 {"state0", a.state0},
                 {"reset", a.reset},
                 {"cu_seqlens", a.cu_seqlens}});
}

void check_causal_conv1d_step_devices(const at::Tensor& x, const at::Tensor& weight,
                                      const OptionalTensor& bias, const at::Tensor& state) {
  check_devices(kStepOp, x.device(), {{"weight", weight}, {"bias", bias}, {"state", state}});
}

CausalConv1dSizes check_causal_conv1d(const CausalConv1dArguments& a) {
  check_causal_conv1d_devices(a);
  TORCH_CHECK(a.x.dim() == 3, kOp, ": x: expected (B,T,C), got shape ", a.x.sizes());
  check_parameters(kOp, a.x, a.weight, a.bias);
  CausalConv1dSizes sizes{a.x.size(0), a.x.size(1), a.x.size(2), a.weight.size(1), a.x.size(0)};
  if (a.cu_seqlens) {
    check_cu_seqlens(kOp, *a.cu_seqlens, sizes.batch);
    sizes.num_sequences = a.cu_seqlens->size(0) - 1;
    TORCH_CHECK(sizes.num_sequences > 0 || sizes.time == 0, kOp,
                ": cu_seqlens: expected to end at T = ", sizes.time, ", got 0 sequences");
  }
  if (a.state0) {
    check_state(kOp, "state0", *a.state0, sizes);
    check_floating(kOp, "state0", *a.state0);
  }
  check_reset(kOp, a.reset, sizes.batch, sizes.time);
  return sizes;
}

void check_causal_conv1d_gradients(const CausalConv1dArguments& a, const CausalConv1dSizes& sizes,
                                   const OptionalTensor& dy, const OptionalTensor& dstate) {
  check_devices(kOp, a.x.device(), {{"dy", dy}, {"dstate", dstate}});
  if (dy) check_shape(kOp, "dy", *dy, a.x.sym_sizes(), "x's shape");
  if (dstate) check_state(kOp, "dstate", *dstate, sizes);
}

CausalConv1dSizes check_causal_conv1d_step(const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& bias, const at::Tensor& state) {
  check_causal_conv1d_step_devices(x, weight, bias, state);
  TORCH_CHECK(x.dim() == 2, kStepOp, ": x: expected (B,C), got shape ", x.sizes());
  check_parameters(kStepOp, x, weight, bias);
  const CausalConv1dSizes sizes{x.size(0), 1, x.size(1), weight.size(1), x.size(0)};
  check_state(kStepOp, "state", state, sizes);
  check_dtype(kStepOp, "state", state, x.scalar_type());
  at::assert_no_internal_overlap(state);
  at::assert_no_overlap(state, x);
  return sizes;
}

}  // namespace xlstm::ops
