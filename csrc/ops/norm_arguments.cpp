#include "csrc/ops/norm_arguments.h"

#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "headwise_norm";

void check_channels(const OptionalTensor& tensor, const at::Tensor& x, std::string_view name) {
  if (!tensor) return;
  const int64_t channels = x.size(-2) * x.size(-1);
  TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == channels, kOp, ": ", name,
              ": expected shape (NH*DH) = (", channels, "), got ", tensor->sizes());
  check_device(kOp, name, *tensor, x.device());
}

}  // namespace

at::DimVector headwise_norm_sizes(const at::Tensor& x) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.back() *= x.size(-1);
  return sizes;
}

void check_headwise_rows(const at::Tensor& tensor, const at::Tensor& x, std::string_view name) {
  const at::DimVector expected = headwise_norm_sizes(x);
  TORCH_CHECK(tensor.sizes() == at::IntArrayRef(expected), kOp, ": ", name,
              ": expected shape (...,NH*DH) = ", at::IntArrayRef(expected), ", got ",
              tensor.sizes());
  check_device(kOp, name, tensor, x.device());
}

void check_headwise_norm(const HeadwiseNormArguments& a) {
  TORCH_CHECK(a.x.dim() >= 2, kOp, ": x: expected (...,NH,DH), got shape ", a.x.sizes());
  check_floating(kOp, "x", a.x);
  TORCH_CHECK(a.kind == "layer" || a.kind == "rms", kOp,
              ": kind: expected \"layer\" or \"rms\", got \"", a.kind, "\"");
  TORCH_CHECK(a.gate_activation == "silu" || a.gate_activation == "sigmoid", kOp,
              ": gate_activation: expected \"silu\" or \"sigmoid\", got \"", a.gate_activation,
              "\"");
  TORCH_CHECK(a.skip.has_value() == a.skip_weight.has_value(), kOp,
              ": skip and skip_weight come together, got only ", a.skip ? "skip" : "skip_weight");
  check_channels(a.weight, a.x, "weight");
  check_channels(a.bias, a.x, "bias");
  check_channels(a.skip_weight, a.x, "skip_weight");
  if (a.skip) check_headwise_rows(*a.skip, a.x, "skip");
  if (a.gate) check_headwise_rows(*a.gate, a.x, "gate");
}

}  // namespace xlstm::ops
