#include "csrc/nn/rwkv5.h"

#include <ATen/OpMathType.h>

#include <algorithm>
#include <cmath>

#include "csrc/nn/mixer_block.h"
#include "csrc/ops/gated_linear_attention.h"

namespace xlstm::nn {
namespace {

constexpr int64_t kMixRank = 32, kDecayRank = 64;
// The authors divide the heads' outputs by 8 before a norm with the usual epsilon.
constexpr double kHeadNormEps = 64;

at::Tensor parameter_values(at::IntArrayRef sizes, at::Device device) {
  return at::zeros(sizes, at::TensorOptions().dtype(at::kFloat).device(device));
}

/// Where a block stands, as the authors' initialisation counts.
struct Depth {
  explicit Depth(const Rwkv5BlockOptions& o)
      : done(o.num_blocks > 1
                 ? static_cast<double>(o.block_index) / static_cast<double>(o.num_blocks - 1)
                 : 0),
        left(1 - static_cast<double>(o.block_index) / static_cast<double>(o.num_blocks)),
        reached(static_cast<double>(o.block_index + 1) / static_cast<double>(o.num_blocks)) {}
  double done, left, reached;
};

/// The share of this token in a mix: less of the one before in deeper blocks.
at::Tensor share(const at::Tensor& like, double exponent) {
  const auto dim = static_cast<double>(like.size(-1));
  return at::pow(at::arange(like.size(-1), like.options()) / dim, exponent);
}

}  // namespace

TokenMix::TokenMix(const Rwkv5BlockOptions& options, at::Device device)
    : data_dependent_(options.data_dependent) {
  const int64_t dim = options.dim;
  const auto names = data_dependent_
                         ? std::vector<std::string>{"decay", "key", "value", "receptance", "gate"}
                         : std::vector<std::string>{"key", "value", "receptance", "gate"};
  for (const std::string& name : names)
    mixes_.push_back(register_parameter(name, parameter_values({dim}, device)));
  if (data_dependent_) {
    const auto count = static_cast<int64_t>(mixes_.size());
    mix_x_ = register_parameter("x", parameter_values({dim}, device));
    down_ = register_module("down", std::make_shared<Linear>(dim, count * kMixRank, false, device));
    up_ = register_parameter("up", parameter_values({count, kMixRank, dim}, device));
  }
  init(options);
}

void TokenMix::init(const Rwkv5BlockOptions& options) {
  if (mixes_[0].is_meta()) return;
  const at::NoGradGuard no_grad;
  const Depth depth(options);
  const at::Tensor plain = share(mixes_[0], depth.left), weak = share(mixes_[0], 0.5 * depth.left);
  std::vector<at::Tensor> shares = {plain, plain + 0.3 * depth.done, weak, weak};
  if (data_dependent_) shares.insert(shares.begin(), plain);
  for (size_t i = 0; i < mixes_.size(); ++i)
    mixes_[i].copy_(data_dependent_ ? 1 - shares[i] : shares[i]);
  if (!data_dependent_) return;
  mix_x_.copy_(1 - plain);
  uniform_init_(up_, 0.01);
}

std::vector<at::Tensor> TokenMix::forward(const at::Tensor& now, const at::Tensor& before) const {
  const auto type = now.scalar_type();
  std::vector<at::Tensor> out;
  if (!data_dependent_) {
    for (const at::Tensor& mix : mixes_) out.push_back(at::lerp(before, now, mix.to(type)));
    return out;
  }
  const auto count = static_cast<int64_t>(mixes_.size());
  const at::Tensor middle = at::lerp(now, before, mix_x_.to(type));
  const at::Tensor codes =
      at::tanh(down_->forward(middle)).flatten(0, 1).unflatten(-1, {count, kMixRank});
  const at::Tensor changes = at::matmul(codes.transpose(0, 1), up_);  // (5,B*T,D)
  const at::Tensor difference = before - now;
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor change = changes[i].view(now.sizes()).to(type);
    out.push_back(now + difference * (mixes_[i].to(type) + change));
  }
  return out;
}

Rwkv5Block::Rwkv5Block(const Rwkv5BlockOptions& options, at::Device device) : options_(options) {
  const int64_t dim = options.dim;
  check_heads(dim, options.num_heads, "embedding_dim");
  const int64_t hidden = options.data_dependent ? dim * 7 / 2 / 32 * 32 : 4 * dim;
  TORCH_CHECK(hidden > 0, "embedding_dim: expected at least 10 for RWKV-6, got ", dim);
  const auto norm = [&](const char* name, double eps) {
    return register_module(name, std::make_shared<Norm>(dim, eps, "layer", device, true));
  };
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, std::make_shared<Linear>(in, out, false, device));
  };
  const auto vector = [&](const char* name) {
    return register_parameter(name, parameter_values({dim}, device));
  };
  norm_ = norm("norm", options.norm_eps), ffn_norm_ = norm("ffn_norm", options.norm_eps);
  head_norm_ = norm("head_norm", kHeadNormEps * options.norm_eps);
  mix_ = register_module("mix", std::make_shared<TokenMix>(options, device));
  decay_ = vector("decay"), first_ = vector("first");
  if (options.data_dependent)
    decay_down_ = linear("decay_down", dim, kDecayRank),
    decay_up_ = linear("decay_up", kDecayRank, dim);
  key_ = linear("key", dim, dim), value_ = linear("value", dim, dim);
  receptance_ = linear("receptance", dim, dim), gate_ = linear("gate", dim, dim);
  output_ = linear("output", dim, dim);
  ffn_mix_k_ = vector("ffn_mix_k"), ffn_mix_r_ = vector("ffn_mix_r");
  ffn_key_ = linear("ffn_key", dim, hidden), ffn_value_ = linear("ffn_value", hidden, dim);
  ffn_receptance_ = linear("ffn_receptance", dim, dim);
  init();
}

/// The authors' initialisation: orthogonal matrices; output_, ffn_value_ and ffn_receptance_ zero, so that a block starts as
/// the identity. Decays from slow to fast over the channels, more slow ones in later blocks; the input-dependent parts start
/// at nothing.
void Rwkv5Block::init() {
  for (const auto& projection : {value_, receptance_, ffn_key_})
    orthogonal_init_(projection->weight, 1);
  for (const auto& projection : {key_, gate_}) orthogonal_init_(projection->weight, 0.1);
  if (decay_.is_meta()) return;
  const at::NoGradGuard no_grad;
  const Depth depth(options_);
  head_norm_->weight.fill_(std::pow(depth.reached, 0.7));
  const at::Tensor channel = at::arange(options_.dim, decay_.options());
  const at::Tensor part = channel / std::max(static_cast<double>(options_.dim) - 1, 1.0);
  decay_.copy_(-6 + 5 * at::pow(part, 0.7 + 1.3 * depth.done));
  const at::Tensor zigzag = ((channel + 1).remainder(3) - 1) * 0.1;
  first_.copy_(depth.done * (1 - part) + zigzag);
  const at::Tensor plain = share(ffn_mix_k_, depth.left);
  ffn_mix_k_.copy_(options_.data_dependent ? 1 - plain : plain);
  ffn_mix_r_.copy_(ffn_mix_k_);
  if (decay_up_) uniform_init_(decay_up_->weight, 0.01);
}

at::Tensor Rwkv5Block::mixed(const at::Tensor& now, const at::Tensor& before,
                             const at::Tensor& mix) const {
  const at::Tensor weight = mix.to(now.scalar_type());
  return options_.data_dependent ? at::lerp(now, before, weight) : at::lerp(before, now, weight);
}

std::pair<at::Tensor, at::Tensor> Rwkv5Block::time_mix(
    const at::Tensor& now, const at::Tensor& before, const State& state,
    const std::optional<at::Tensor>& reset) const {
  const int64_t heads = options_.num_heads;
  const auto split = [&](const at::Tensor& t) {
    return t.unflatten(-1, {heads, options_.dim / heads});
  };
  const std::vector<at::Tensor> inputs = mix_->forward(now, before);
  const size_t at_key = options_.data_dependent ? 1 : 0;
  const auto wide = at::toOpMathType(now.scalar_type());
  at::Tensor decay = decay_.to(wide);
  if (options_.data_dependent)
    decay = decay + decay_up_->forward(at::tanh(decay_down_->forward(inputs[0]))).to(wide);
  const at::Tensor log_decay = -at::exp(decay);
  ops::GatedLinearAttentionOptions op;
  op.reset = reset;
  op.scale = 1;
  auto [h, next] = ops::gated_linear_attention(
      split(receptance_->forward(inputs[at_key + 2])), split(key_->forward(inputs[at_key])),
      split(value_->forward(inputs[at_key + 1])), split(log_decay.expand(now.sizes())),
      split(first_), optional_state(state, 1), op);
  const at::Tensor y =
      gated_norm(h, head_norm_->weight, head_norm_->bias, gate_->forward(inputs[at_key + 3]),
                 {head_norm_->eps, "layer", "silu", options_.fused});
  return {output_->forward(y), next};
}

at::Tensor Rwkv5Block::channel_mix(const at::Tensor& now, const at::Tensor& before) const {
  const at::Tensor hidden = at::relu(ffn_key_->forward(mixed(now, before, ffn_mix_k_))).square();
  const at::Tensor gate = at::sigmoid(ffn_receptance_->forward(mixed(now, before, ffn_mix_r_)));
  return gate * ffn_value_->forward(hidden);
}

State Rwkv5Block::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  check_state(state, 3, "RWKV block");
  const auto dropped = [&](const at::Tensor& t) {
    return apply_dropout(t, options_.dropout, is_training());
  };
  const at::Tensor a = x.normed(*norm_), a_last = state_at(state, 0);
  auto [mix, next] = time_mix(a, previous_token(a, a_last, reset), state, reset);
  x.add(dropped(mix));
  const at::Tensor b = x.normed(*ffn_norm_), b_last = state_at(state, 2);
  x.add(dropped(channel_mix(b, previous_token(b, b_last, reset))));
  return {last_token(a, a_last), next, last_token(b, b_last)};
}

}  // namespace xlstm::nn
