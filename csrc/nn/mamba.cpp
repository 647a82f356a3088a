#include "csrc/nn/mamba.h"

#include <algorithm>
#include <cmath>

#include "csrc/ops/selective_scan.h"

namespace xlstm::nn {
namespace {

constexpr int64_t kStates = 16;

}  // namespace

MambaBlock::MambaBlock(const MambaBlockOptions& options, at::Device device)
    : options_(options), inner_(2 * options.dim), rank_((options.dim + 15) / 16) {
  const auto linear = [&](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, std::make_shared<Linear>(in, out, bias, device));
  };
  norm_ =
      register_module("norm", std::make_shared<Norm>(options.dim, options.norm_eps, "rms", device));
  in_proj_ = linear("in_proj", options.dim, 2 * inner_, false);
  conv_ = register_module("conv", std::make_shared<CausalConv1d>(inner_, options.conv_kernel_size,
                                                                 options.fused, device));
  x_proj_ = linear("x_proj", inner_, rank_ + 2 * kStates, false);
  dt_proj_ = linear("dt_proj", rank_, inner_, true);
  const auto parameters = at::TensorOptions().dtype(at::kFloat).device(device);
  a_log_ = register_parameter("a_log", at::zeros({inner_, kStates}, parameters));
  skip_ = register_parameter("skip", at::ones({inner_}, parameters));
  out_proj_ = linear("out_proj", inner_, options.dim, false);
  init();
}

/// a = -1 .. -16; steps delta spread logarithmically over [0.001, 0.1]; the matrices as torch.nn.Linear draws them, the last
/// one less by the depth of the model.
void MambaBlock::init() {
  for (const auto& projection : {in_proj_, x_proj_})
    uniform_init_(projection->weight,
                  1 / std::sqrt(static_cast<double>(projection->weight.size(1))));
  uniform_init_(out_proj_->weight,
                1 / std::sqrt(static_cast<double>(inner_ * options_.num_blocks)));
  uniform_init_(dt_proj_->weight, 1 / std::sqrt(static_cast<double>(rank_)));
  if (a_log_.is_meta()) return;
  const at::NoGradGuard no_grad;
  a_log_.copy_(at::arange(1, kStates + 1, a_log_.options()).log().expand({inner_, kStates}));
  const double low = std::log(1e-3), high = std::log(1e-1);
  at::Tensor drawn = at::zeros_like(dt_proj_->bias);
  uniform_init_(drawn, 0, 1);
  const at::Tensor steps = (drawn * (high - low) + low).exp().clamp_min(1e-4);
  dt_proj_->bias.copy_(steps + at::log(-at::expm1(-steps)));  // softplus of it is steps
}

State MambaBlock::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  check_state(state, 2, "Mamba block");
  const auto halves = in_proj_->forward(x.normed(*norm_)).chunk(2, -1);
  auto [u, window] = conv_->forward(halves[0], state_at(state, 0), reset);
  const auto parts = x_proj_->forward(u).split_with_sizes({rank_, kStates, kStates}, -1);
  const at::Tensor delta = at::softplus(dt_proj_->forward(parts[0]));
  auto [y, h] = ops::selective_scan(u, delta, -at::exp(a_log_), parts[1], parts[2], skip_,
                                    optional_state(state, 1), reset);
  const at::Tensor out = out_proj_->forward(y * at::silu(halves[1]));
  x.add(apply_dropout(out, options_.dropout, is_training()));
  return {window, h};
}

}  // namespace xlstm::nn
