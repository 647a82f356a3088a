#include "csrc/ops/linear_cross_entropy_blocks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/ops/common.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

constexpr const char* kOp = "linear_cross_entropy";
constexpr int64_t kMostLogits = int64_t{1} << 26;  // of a block: 256 MB in float32

/// a b in the dtype of accumulation, with factors in their own.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType accumulate) {
  if (a.scalar_type() == accumulate) return at::mm(a, b);
  if (a.is_cuda()) return at::mm(a, b, accumulate);
  return at::mm(a.to(accumulate), b.to(accumulate));
}

/// sum += a b, without a tensor for the product where the factors' dtype allows it.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == sum.scalar_type()) {
    sum.addmm_(a, b);
  } else if (a.is_cuda()) {
    at::addmm_out(sum, sum, a, b, sum.scalar_type());
  } else {
    sum.add_(product(a, b, sum.scalar_type()));
  }
}

}  // namespace

void check_linear_cross_entropy_devices(const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& target) {
  check_devices(kOp, x.device(), {{"weight", weight}, {"target", target}});
}

void check_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& target, double soft_cap,
                                std::string_view reduction) {
  check_linear_cross_entropy_devices(x, weight, target);
  TORCH_CHECK(x.dim() >= 1, kOp, ": x: expected (...,D), got a scalar");
  check_rank(kOp, "weight", weight, 2);
  check_shape(kOp, "weight", weight, {weight.size(0), x.size(-1)}, "(V,D)");
  check_dtype(kOp, "weight", weight, x.scalar_type());
  check_dtype(kOp, "target", target, at::kLong);
  check_shape(kOp, "target", target, x.sym_sizes().slice(0, x.dim() - 1), "x's shape but for D");
  TORCH_CHECK(soft_cap >= 0 && std::isfinite(soft_cap), kOp,
              ": soft_cap: expected a number >= 0 (0: none), got ", soft_cap);
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", kOp,
              ": reduction: expected \"mean\", \"sum\" or \"none\", got \"", reduction, "\"");
}

std::pair<at::Tensor, at::Tensor> cross_entropy_block(const CrossEntropyBlock& b) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const int64_t vocab = b.logits.size(1);
  const at::Tensor ignored = b.targets == b.ignore_index;
  const at::Tensor unknown = ((b.targets < 0) | (b.targets >= vocab)) & ignored.logical_not();
  const at::Tensor index = b.targets.clamp(0, vocab - 1).unsqueeze(1);
  const at::Tensor tanh = b.soft_cap > 0 ? (b.logits / b.soft_cap).tanh() : at::Tensor();
  const at::Tensor logits = b.soft_cap > 0 ? tanh * b.soft_cap : b.logits;
  const at::Tensor log_sum = logits.logsumexp(1, /*keepdim=*/true);
  const at::Tensor loss = (log_sum - logits.gather(1, index))
                              .squeeze(1)
                              .masked_fill(unknown, nan)
                              .masked_fill(ignored, 0);
  if (!b.gradient) return {loss, at::Tensor()};
  at::Tensor gradient = (logits - log_sum).exp();
  gradient.scatter_add_(1, index, at::full({1, 1}, -1, logits.options()).expand_as(index));
  if (b.soft_cap > 0) gradient.mul_(1 - tanh.square());
  if (b.scale.defined()) gradient.mul_(b.scale);
  if (b.row_scales.defined()) gradient.mul_(b.row_scales.unsqueeze(1));
  gradient.masked_fill_(unknown.unsqueeze(1), nan).masked_fill_(ignored.unsqueeze(1), 0);
  return {loss, gradient.to(b.gradient_type)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_blocks(
    const LinearCrossEntropyCall& call, const CrossEntropyBlockFunction& function) {
  check_linear_cross_entropy(call.x, call.weight, call.target, call.soft_cap, call.reduction);
  if (call.row_scales.defined()) check_device(kOp, "grad", call.row_scales, call.x.device());
  const int64_t rows = call.target.numel(), width = call.x.size(-1), vocab = call.weight.size(0);
  const at::ScalarType type = call.x.scalar_type(), accumulate = accumulate_type(type);
  dtype_code(call.x, "linear_cross_entropy: x");
  const at::TensorOptions options = call.x.options().dtype(accumulate);
  const at::Tensor x = call.x.reshape({rows, width}),
                   target = call.target.reshape({rows}).contiguous();
  const at::Tensor row_scales = call.row_scales.defined()
                                    ? call.row_scales.reshape({rows}).to(accumulate).contiguous()
                                    : at::Tensor();
  CrossEntropyBlock block;
  block.ignore_index = call.ignore_index, block.soft_cap = call.soft_cap;
  block.gradient = call.need_dx || call.need_dweight, block.gradient_type = type;
  at::Tensor scale;
  if (call.reduction == "mean")
    scale = (target != call.ignore_index).sum().clamp_min(1).to(accumulate).reciprocal();
  // A share of the mean is too small a number for float16: there the sums are scaled.
  const bool scales_sums = scale.defined() && type == at::kHalf;
  if (!scales_sums) block.scale = scale;

  const at::Tensor losses = at::empty({rows}, options);
  const at::Tensor dx = at::empty({call.need_dx ? rows : 0, width}, options);
  at::Tensor dweight =
      call.need_dweight ? at::zeros(call.weight.sizes(), options) : at::empty({0}, options);
  if (vocab == 0) {  // every target that counts is unknown
    losses.fill_(std::numeric_limits<double>::quiet_NaN());
    losses.masked_fill_(target == call.ignore_index, 0);
    dx.zero_();
  }
  const int64_t step = std::max<int64_t>(64, kMostLogits / std::max<int64_t>(1, vocab));
  for (int64_t first = 0; first < rows && vocab > 0; first += step) {
    const int64_t count = std::min(step, rows - first);
    const at::Tensor some = x.narrow(0, first, count);
    block.targets = target.narrow(0, first, count);
    block.logits = product(some, call.weight.t(), accumulate);
    if (row_scales.defined()) block.row_scales = row_scales.narrow(0, first, count);
    const auto [loss, gradient] = function(block);
    losses.narrow(0, first, count).copy_(loss);
    if (call.need_dx) dx.narrow(0, first, count).copy_(product(gradient, call.weight, accumulate));
    if (!call.need_dweight) continue;
    // Whatever an ignored row holds reaches no gradient.
    const at::Tensor counted =
        some.masked_fill((block.targets == call.ignore_index).unsqueeze(1), 0);
    add_product(dweight, gradient.t(), counted);
  }
  if (scales_sums) dx.mul_(scale), dweight.mul_(scale);
  at::Tensor loss = losses.reshape(call.target.sizes());
  if (call.reduction != "none") loss = losses.sum(at::kDouble).to(accumulate);
  if (call.reduction == "mean") loss = loss * scale;
  return {loss, call.need_dx ? dx.view(call.x.sizes()) : at::empty({0}, options), dweight};
}

}  // namespace xlstm::ops
