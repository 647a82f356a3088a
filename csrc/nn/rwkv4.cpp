#include "csrc/nn/rwkv4.h"

#include <cmath>

#include "csrc/ops/wkv.h"

namespace xlstm::nn {

at::Tensor previous_token(const at::Tensor& x, const at::Tensor& last,
                          const std::optional<at::Tensor>& reset) {
  const int64_t length = x.size(1);
  const at::Tensor before =
      last.defined() ? last.to(x.scalar_type()) : at::zeros({x.size(0), 1, x.size(2)}, x.options());
  at::Tensor shifted = length > 1 ? at::cat({before, x.narrow(1, 0, length - 1)}, 1) : before;
  return reset ? shifted.masked_fill(reset->unsqueeze(-1), 0) : shifted;
}

at::Tensor last_token(const at::Tensor& x, const at::Tensor& last) {
  const int64_t length = x.size(1);
  if (length > 0) return x.narrow(1, length - 1, 1).clone();
  return last.defined() ? last.clone() : at::zeros({x.size(0), 1, x.size(2)}, x.options());
}

Rwkv4Block::Rwkv4Block(const BlockOptions& options, at::Device device) : options_(options) {
  const int64_t dim = options.dim;
  const auto norm = [&](const char* name) {
    return register_module(name,
                           std::make_shared<Norm>(dim, options.norm_eps, "layer", device, true));
  };
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, std::make_shared<Linear>(in, out, false, device));
  };
  const auto vector = [&](const char* name) {
    return register_parameter(
        name, at::zeros({dim}, at::TensorOptions().dtype(at::kFloat).device(device)));
  };
  norm_ = norm("norm"), ffn_norm_ = norm("ffn_norm");
  mix_k_ = vector("mix_k"), mix_v_ = vector("mix_v"), mix_r_ = vector("mix_r");
  decay_ = vector("decay"), first_ = vector("first");
  key_ = linear("key", dim, dim), value_ = linear("value", dim, dim);
  receptance_ = linear("receptance", dim, dim), output_ = linear("output", dim, dim);
  ffn_mix_k_ = vector("ffn_mix_k"), ffn_mix_r_ = vector("ffn_mix_r");
  ffn_key_ = linear("ffn_key", dim, 4 * dim), ffn_value_ = linear("ffn_value", 4 * dim, dim);
  ffn_receptance_ = linear("ffn_receptance", dim, dim);
  // Keys, values and receptances small, what is added to the residual stream by the depth.
  for (const auto& projection : {key_, value_, receptance_, ffn_key_, ffn_receptance_})
    small_init_(projection->weight, dim);
  for (const auto& projection : {output_, ffn_value_})
    wang_init_(projection->weight, dim, options.num_blocks);
  init_mixes();
}

/// The authors' initialisation: channels from slow to fast decay, more slow ones in later blocks; deeper blocks look less
/// at the token before.
void Rwkv4Block::init_mixes() {
  if (decay_.is_meta()) return;
  const at::NoGradGuard no_grad;
  const auto blocks = static_cast<double>(options_.num_blocks);
  const double depth = blocks > 1 ? static_cast<double>(options_.block_index) / (blocks - 1) : 0;
  const double left = 1 - static_cast<double>(options_.block_index) / blocks;
  const auto dim = static_cast<double>(options_.dim);
  const at::Tensor channel = at::arange(options_.dim, decay_.options());
  decay_.copy_(-5 + 8 * at::pow(channel / std::max(dim - 1, 1.0), 0.7 + 1.3 * depth));
  const at::Tensor zigzag = ((channel + 1).remainder(3) - 1) * 0.5;
  first_.copy_(zigzag + std::log(0.3));
  const at::Tensor mix = at::pow(channel / dim, left);
  mix_k_.copy_(mix), mix_v_.copy_(mix + 0.3 * depth),
      mix_r_.copy_(at::pow(channel / dim, 0.5 * left));
  ffn_mix_k_.copy_(mix), ffn_mix_r_.copy_(mix);
}

State Rwkv4Block::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  check_state(state, 5, "RWKV-4 block");
  const auto dropped = [&](const at::Tensor& t) {
    return apply_dropout(t, options_.dropout, is_training());
  };
  const auto mixed = [](const at::Tensor& now, const at::Tensor& before, const at::Tensor& mix) {
    return at::lerp(before, now, mix.to(now.scalar_type()));
  };
  const at::Tensor a = x.normed(*norm_), a_before = previous_token(a, state_at(state, 0), reset);
  const at::Tensor k = key_->forward(mixed(a, a_before, mix_k_));
  const at::Tensor v = value_->forward(mixed(a, a_before, mix_v_));
  const at::Tensor r = receptance_->forward(mixed(a, a_before, mix_r_));
  auto [wkv, sum, norm, exponent] =
      ops::wkv(k, v, at::exp(decay_), first_, optional_state(state, 1), optional_state(state, 2),
               optional_state(state, 3), reset);
  x.add(dropped(output_->forward(at::sigmoid(r) * wkv)));
  const at::Tensor b = x.normed(*ffn_norm_),
                   b_before = previous_token(b, state_at(state, 4), reset);
  const at::Tensor hidden = at::relu(ffn_key_->forward(mixed(b, b_before, ffn_mix_k_))).square();
  const at::Tensor gate = at::sigmoid(ffn_receptance_->forward(mixed(b, b_before, ffn_mix_r_)));
  x.add(dropped(gate * ffn_value_->forward(hidden)));
  return {last_token(a, state_at(state, 0)), sum, norm, exponent,
          last_token(b, state_at(state, 4))};
}

}  // namespace xlstm::nn
