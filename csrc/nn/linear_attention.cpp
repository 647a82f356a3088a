#include "csrc/nn/linear_attention.h"

#include <ATen/OpMathType.h>

#include <cmath>

#include "csrc/nn/mlstm.h"
#include "csrc/nn/transformer.h"
#include "csrc/ops/gated_linear_attention.h"

namespace xlstm::nn {
namespace {

constexpr double kDecayRoot = 16;
constexpr int64_t kDecayRank = 16;
constexpr double kRopeTheta = 1e4;

at::Tensor split_heads(const at::Tensor& x, int64_t num_heads) {
  return x.unflatten(-1, {num_heads, x.size(-1) / num_heads});
}

/// A gate's pre-activations (NH) for all tokens of x (B,T,...), (B,T,NH).
at::Tensor fixed_gate(const at::Tensor& preactivations, const at::Tensor& x) {
  return preactivations.expand({x.size(0), x.size(1), preactivations.size(0)});
}

at::TensorOptions gate_options(const at::Tensor& x) {
  return x.options().dtype(at::toOpMathType(x.scalar_type()));
}

/// Places of the next tokens within their documents (B,T) and the count behind the last one (B), int64.
std::pair<at::Tensor, at::Tensor> places(const at::Tensor& count, const at::Tensor& x,
                                         const std::optional<at::Tensor>& reset) {
  const int64_t batch = x.size(0), length = x.size(1);
  const auto options = at::TensorOptions().dtype(at::kLong).device(x.device());
  const at::Tensor past = count.defined() ? count : at::zeros({batch}, options);
  const at::Tensor index = at::arange(length, options);
  at::Tensor place = past.unsqueeze(-1) + index;
  if (length == 0) return {place, past};
  if (reset) {
    const at::Tensor first =
        std::get<0>(at::where(*reset, index, at::full({}, -1, options)).cummax(1));
    place = at::where(first >= 0, index - first, place);
  }
  return {place, place.select(1, length - 1) + 1};
}

}  // namespace

LinearAttention::LinearAttention(const MixerOptions& options, at::Device device)
    : options_(options) {
  const int64_t dim = options.dim;
  check_heads(dim, options.num_heads, "embedding_dim");
  q_ = projection("q", dim, dim, device), k_ = projection("k", dim, dim, device);
  v_ = projection("v", dim, dim, device), out_ = projection("out", dim, dim, device);
  wang_init_(out_->weight, dim, options.num_blocks);
}

Result LinearAttention::forward(const at::Tensor& x, const State& state,
                                const std::optional<at::Tensor>& reset) {
  check_mlstm_state(state, 0, "linear attention");
  const auto features = [&](const std::shared_ptr<Linear>& linear) {
    return at::elu(split_heads(linear->forward(x), options_.num_heads)) + 1;
  };
  const at::Tensor q = features(q_), k = features(k_);
  const at::Tensor v = split_heads(v_->forward(x), options_.num_heads);
  // The sum of the keys is one more column of the state: that of values which are all one.
  const at::Tensor extended = at::constant_pad_nd(v, {0, 1}, 1);
  const at::Tensor open = fixed_gate(at::full({options_.num_heads}, kOpenGate, gate_options(x)), x);
  auto [h, next] = mlstm_cell(q, k, extended, open, open, state, reset,
                              {"sigmoid", false, 0, options_.chunk_size, 1.0});
  const int64_t width = v.size(-1);
  const at::Tensor y = h.narrow(-1, 0, width) / (h.narrow(-1, width, 1) + options_.norm_eps);
  return {out_->forward(y.flatten(2)), std::move(next)};
}

Retention::Retention(const MixerOptions& options, at::Device device) : options_(options) {
  const int64_t dim = options.dim;
  check_heads(dim, options.num_heads, "embedding_dim");
  TORCH_CHECK(dim / options.num_heads % 2 == 0,
              "num_heads: expected one that leaves heads of an even width, got ", options.num_heads,
              " for embedding_dim ", dim);
  q_ = projection("q", dim, dim, device), k_ = projection("k", dim, dim, device);
  v_ = projection("v", dim, 2 * dim, device), gate_ = projection("gate", dim, 2 * dim, device);
  out_ = projection("out", 2 * dim, dim, device);
  wang_init_(out_->weight, dim, options.num_blocks);
}

Result Retention::forward(const at::Tensor& x, const State& state,
                          const std::optional<at::Tensor>& reset) {
  check_mlstm_state(state, 1, "retention");
  const int64_t heads = options_.num_heads;
  const auto [place, count] = places(state.empty() ? at::Tensor() : state.back(), x, reset);
  const auto rotated = [&, &place = place](const std::shared_ptr<Linear>& linear) {
    const at::Tensor by_head = split_heads(linear->forward(x), heads).transpose(1, 2);
    return rotate(by_head, place, kRopeTheta).transpose(1, 2);
  };
  // logit(1 - 2^{-5-h}) = log(2^{5+h} - 1)
  const at::Tensor open = at::full({heads}, kOpenGate, gate_options(x));
  const at::Tensor forget = (at::exp2(at::arange(heads, open.options()) + 5) - 1).log();
  const State cell = state.empty() ? State{} : State(state.begin(), state.end() - 1);
  auto [h, next] = mlstm_cell(rotated(q_), rotated(k_), split_heads(v_->forward(x), heads),
                              fixed_gate(open, x), fixed_gate(forget, x), cell, reset,
                              {"sigmoid", false, 0, options_.chunk_size, {}});
  next.push_back(count);
  const at::Tensor y = gated_norm(h, {}, {}, gate_->forward(x),
                                  {options_.norm_eps, "layer", "silu", options_.fused});
  return {out_->forward(y), std::move(next)};
}

GatedLinearAttention::GatedLinearAttention(const MixerOptions& options, at::Device device)
    : options_(options) {
  const int64_t dim = options.dim, keys = dim / 2;
  check_heads(dim, 2 * options.num_heads, "embedding_dim, twice the heads");
  q_ = projection("q", dim, keys, device), k_ = projection("k", dim, keys, device);
  v_ = projection("v", dim, dim, device), gate_ = projection("gate", dim, dim, device);
  decay_down_ = projection("decay_down", dim, kDecayRank, device);
  decay_up_ = register_module("decay_up", std::make_shared<Linear>(kDecayRank, keys, true, device));
  uniform_init_(decay_up_->weight, 1 / std::sqrt(static_cast<double>(kDecayRank)));
  head_norm_ = register_module(
      "head_norm",
      std::make_shared<Norm>(dim / options.num_heads, options.norm_eps, "rms", device));
  out_ = projection("out", dim, dim, device);
  wang_init_(out_->weight, dim, options.num_blocks);
}

Result GatedLinearAttention::forward(const at::Tensor& x, const State& state,
                                     const std::optional<at::Tensor>& reset) {
  check_state(state, 1, "gated linear attention");
  const int64_t heads = options_.num_heads;
  const at::Tensor logits = decay_up_->forward(decay_down_->forward(x)).to(gate_options(x));
  ops::GatedLinearAttentionOptions op;
  op.reset = reset;
  auto [h, next] = ops::gated_linear_attention(
      split_heads(q_->forward(x), heads), split_heads(k_->forward(x), heads),
      split_heads(v_->forward(x), heads), split_heads(at::log_sigmoid(logits) / kDecayRoot, heads),
      {}, optional_state(state, 0), op);
  const at::Tensor y = gated_norm(h, head_norm_->weight.repeat({heads}), {}, gate_->forward(x),
                                  {options_.norm_eps, "rms", "silu", options_.fused});
  return {out_->forward(y), {next}};
}

}  // namespace xlstm::nn
