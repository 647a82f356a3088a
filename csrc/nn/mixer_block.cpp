#include "csrc/nn/mixer_block.h"

namespace xlstm::nn {

std::shared_ptr<Linear> Mixer::projection(const char* name, int64_t in, int64_t out,
                                          at::Device device) {
  auto linear = register_module(name, std::make_shared<Linear>(in, out, false, device));
  small_init_(linear->weight, in);
  return linear;
}

MixerBlock::MixerBlock(const MixerOptions& options, std::shared_ptr<Mixer> mixer, at::Device device)
    : dropout_(options.dropout) {
  const auto norm = [&](const char* name) {
    return register_module(name,
                           std::make_shared<Norm>(options.dim, options.norm_eps, "rms", device));
  };
  norm_ = norm("norm");
  mixer_ = register_module("mixer", std::move(mixer));
  ffn_norm_ = norm("ffn_norm");
  ffn_ = register_module(
      "ffn", std::make_shared<SwiGlu>(options.dim, options.ffn_dim, options.num_blocks, device));
}

State MixerBlock::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  const auto dropped = [&](const at::Tensor& t) {
    return apply_dropout(t, dropout_, is_training());
  };
  auto [y, next] = mixer_->forward(x.normed(*norm_), state, reset);
  x.add(dropped(y));
  x.add(dropped(ffn_->forward(x.normed(*ffn_norm_))));
  return std::move(next);
}

void check_heads(int64_t width, int64_t num_heads, const char* what) {
  TORCH_CHECK(num_heads > 0 && width > 0 && width % num_heads == 0,
              "num_heads: expected a divisor of ", what, " ", width, ", got ", num_heads);
}

}  // namespace xlstm::nn
