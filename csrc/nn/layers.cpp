#include "csrc/nn/layers.h"

#include <torch/nn/init.h>

#include <cmath>
#include <utility>

#include "csrc/nn/no_dropout.h"
#include "csrc/ops/block_linear.h"
#include "csrc/ops/causal_conv1d.h"
#include "csrc/ops/norm.h"

namespace xlstm::nn {
namespace {

at::Tensor filled(at::IntArrayRef sizes, double value, at::Device device) {
  return at::full(sizes, value, at::TensorOptions().dtype(at::kFloat).device(device));
}

thread_local bool skip_drawing = false;

bool is_drawn(const at::Tensor& tensor) { return !tensor.is_meta() && !skip_drawing; }

}  // namespace

SkipDrawing::SkipDrawing() : before_(std::exchange(skip_drawing, true)) {}
SkipDrawing::~SkipDrawing() { skip_drawing = before_; }
bool SkipDrawing::lives() { return skip_drawing; }

void normal_init_(at::Tensor& tensor, double std) {
  at::NoGradGuard no_grad;
  if (is_drawn(tensor)) tensor.normal_(0, std);
}

void small_init_(at::Tensor& tensor, int64_t dim) {
  normal_init_(tensor, std::sqrt(2.0 / (5.0 * static_cast<double>(dim))));
}

void wang_init_(at::Tensor& tensor, int64_t dim, int64_t num_blocks) {
  normal_init_(tensor, 2.0 / static_cast<double>(num_blocks) / std::sqrt(static_cast<double>(dim)));
}

void uniform_init_(at::Tensor& tensor, double low, double high) {
  at::NoGradGuard no_grad;
  if (is_drawn(tensor)) tensor.uniform_(low, high);
}

void uniform_init_(at::Tensor& tensor, double bound) { uniform_init_(tensor, -bound, bound); }

void orthogonal_init_(at::Tensor& tensor, double gain) {
  if (is_drawn(tensor)) torch::nn::init::orthogonal_(tensor, gain);
}

void linspace_init_(at::Tensor& tensor, double first, double last) {
  at::NoGradGuard no_grad;
  if (!tensor.is_meta()) tensor.copy_(at::linspace(first, last, tensor.size(-1), tensor.options()));
}

void Residual::add(const at::Tensor& branch) {
  x_ = sum();
  if (fused_) {
    waiting_ = branch;
  } else {
    x_ = x_ + branch;
  }
}

at::Tensor Residual::normed(const Norm& norm) {
  if (!waiting_.defined()) return norm.forward(x_);
  auto [sum, y] =
      ops::residual_norm(x_, waiting_, norm.weight, given(norm.bias), norm.eps, norm.kind);
  replace(sum);
  return y;
}

at::Tensor Residual::sum() {
  if (waiting_.defined()) replace(x_ + waiting_);
  return x_;
}

void Residual::replace(at::Tensor y) {
  x_ = std::move(y);
  waiting_ = at::Tensor();
}

Result Block::forward(const at::Tensor& x, const State& state,
                      const std::optional<at::Tensor>& reset, bool fused) {
  Residual stream(x, fused);
  State next = advance(stream, state, reset);
  return {stream.sum(), std::move(next)};
}

BlockLinear::BlockLinear(int64_t features, int64_t num_blocks, bool with_bias, at::Device device) {
  TORCH_CHECK(num_blocks > 0 && features % num_blocks == 0,
              "BlockLinear: expected features to be a multiple of ", num_blocks, " blocks, got ",
              features);
  const int64_t block = features / num_blocks;
  weight = register_parameter("weight", filled({num_blocks, block, block}, 0, device));
  if (with_bias) bias = register_parameter("bias", filled({features}, 0, device));
}

at::Tensor BlockLinear::forward(const at::Tensor& x) const {
  if (weight.size(0) == 1) return at::linear(x, weight.select(0, 0), given(bias));
  return ops::block_linear(x, weight, given(bias));
}

Norm::Norm(int64_t features, double eps_, std::string kind_, at::Device device, bool with_bias)
    : eps(eps_), kind(std::move(kind_)) {
  weight = register_parameter("weight", filled({features}, 1, device));
  if (with_bias) bias = register_parameter("bias", filled({features}, 0, device));
}

at::Tensor Norm::forward(const at::Tensor& x) const {
  return ops::headwise_norm(x.unsqueeze(-2), weight, given(bias), {}, {}, {}, eps, kind);
}

CausalConv1d::CausalConv1d(int64_t channels, int64_t kernel_size, bool fused_, at::Device device)
    : fused(fused_) {
  weight = register_parameter("weight", filled({channels, kernel_size}, 0, device));
  bias = register_parameter("bias", filled({channels}, 0, device));
  const double bound = 1.0 / std::sqrt(static_cast<double>(kernel_size));  // fan-in of one channel
  uniform_init_(weight, bound);
  uniform_init_(bias, bound);
}

std::pair<at::Tensor, at::Tensor> CausalConv1d::forward(
    const at::Tensor& x, const at::Tensor& window, const std::optional<at::Tensor>& reset) const {
  if (window.defined() && is_decode_step(x, reset)) {
    at::Tensor next = writable_state(window);
    at::Tensor y = ops::causal_conv1d_step(x.select(1, 0), weight, bias, next, fused);
    return {(fused ? y : at::silu(y)).unsqueeze(1), next};
  }
  auto [y, next] = ops::causal_conv1d(x, weight, bias, given(window), reset, {}, fused);
  return {fused ? y : at::silu(y), next};
}

std::pair<at::Tensor, at::Tensor> convolved(const std::shared_ptr<CausalConv1d>& conv,
                                            const at::Tensor& x, const at::Tensor& window,
                                            const std::optional<at::Tensor>& reset) {
  if (conv) return conv->forward(x, window, reset);
  return {x, at::zeros({x.size(0), 0, x.size(2)}, x.options())};
}

FeedForward::FeedForward(const FeedForwardOptions& options, at::Device device)
    : act_fn_(options.act_fn), gated_(options.gated) {
  const int64_t up = options.gated ? 2 * options.hidden_dim : options.hidden_dim;
  proj_up_ =
      register_module("proj_up", std::make_shared<Linear>(options.dim, up, options.bias, device));
  proj_down_ = register_module(
      "proj_down", std::make_shared<Linear>(options.hidden_dim, options.dim, options.bias, device));
  small_init_(proj_up_->weight, options.dim);
  wang_init_(proj_down_->weight, options.dim, options.num_blocks);
}

at::Tensor FeedForward::forward(const at::Tensor& x) const {
  if (!gated_) return proj_down_->forward(activation(proj_up_->forward(x), act_fn_));
  // One split rather than two slices: its backward is a single concatenation.
  const auto parts = proj_up_->forward(x).chunk(2, -1);
  return proj_down_->forward(activation(parts[0], act_fn_) * parts[1]);
}

at::Tensor activation(const at::Tensor& x, const std::string& act_fn) {
  if (act_fn == "gelu") return at::gelu(x);
  if (act_fn == "silu") return at::silu(x);
  if (act_fn == "relu2") return at::relu(x).square();
  TORCH_CHECK(act_fn == "relu",
              "act_fn: expected \"gelu\", \"silu\", \"relu\" or \"relu2\", got \"", act_fn, "\"");
  return at::relu(x);
}

at::Tensor gated_norm(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& gate, const GatedNormOptions& options,
                      const at::Tensor& skip, const at::Tensor& skip_weight) {
  if (options.fused)
    return ops::headwise_norm(h, given(weight), given(bias), given(skip), given(skip_weight), gate,
                              options.eps, options.kind, options.act);
  at::Tensor y =
      ops::headwise_norm(h, given(weight), given(bias), {}, {}, {}, options.eps, options.kind);
  if (skip.defined()) y = y + skip_weight * skip;
  return y * (options.act == "silu" ? at::silu(gate) : at::sigmoid(gate));
}

namespace {
thread_local bool no_dropout = false;
}

NoDropout::NoDropout() : before_(std::exchange(no_dropout, true)) {}
NoDropout::~NoDropout() { no_dropout = before_; }

at::Tensor apply_dropout(const at::Tensor& x, double p, bool training) {
  return training && p > 0 && !no_dropout ? at::dropout(x, p, true) : x;
}

bool is_decode_step(const at::Tensor& x, const std::optional<at::Tensor>& reset) {
  return x.size(1) == 1 && !reset.has_value() && !at::GradMode::is_enabled();
}

namespace {
thread_local const InPlaceStateGuard* in_place_state = nullptr;
}

InPlaceStateGuard::InPlaceStateGuard(std::optional<bool> lazy_fold)
    : before_(std::exchange(in_place_state, this)), lazy_fold_(lazy_fold) {}
InPlaceStateGuard::~InPlaceStateGuard() { in_place_state = before_; }
const InPlaceStateGuard* InPlaceStateGuard::current() { return in_place_state; }

std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

at::Tensor writable_state(const at::Tensor& state) {
  return in_place_state != nullptr ? state : state.clone();
}

void check_state(const State& state, size_t expected, const char* who) {
  TORCH_CHECK(state.empty() || state.size() == expected, who, ": expected a state of ", expected,
              " tensors or an empty one, got ", state.size());
}

at::Tensor state_at(const State& state, size_t i) {
  return state.empty() ? at::Tensor() : state[i];
}

std::optional<at::Tensor> optional_state(const State& state, size_t i) {
  return given(state_at(state, i));
}

}  // namespace xlstm::nn
