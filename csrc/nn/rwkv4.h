#pragma once
// RWKV-4 (arXiv 2305.13048), as compared with in arXiv 2405.04517.
#include "csrc/nn/layers.h"

namespace xlstm::nn {

/// What enters a mix of this token and the one before: x_t m + x_{t-1} (1 - m); zero before the first token. State: the
/// last x (B,1,D).
at::Tensor previous_token(const at::Tensor& x, const at::Tensor& last,
                          const std::optional<at::Tensor>& reset);

/// The state that previous_token takes next: the last of x (B,T,D), or `last` itself where x is empty.
at::Tensor last_token(const at::Tensor& x, const at::Tensor& last);

/// x + time_mix(norm(x)), then x + channel_mix(ffn_norm(x)).
///   time mix: r, k, v = W (mix of tokens), wkv_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same
///   without v), out = W_o (sigmoid(r) wkv);  w = e^{decay} per channel.
///   channel mix: sigmoid(W_r .) (W_v relu(W_k .)^2).
/// State: last x of the time mix (B,1,D), numerator, denominator and their exponent (B,D) float32, last x of the channel mix.
class Rwkv4Block : public Block {
 public:
  Rwkv4Block(const BlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  void init_mixes();

  const BlockOptions options_;
  std::shared_ptr<Norm> norm_, ffn_norm_;
  std::shared_ptr<Linear> key_, value_, receptance_, output_, ffn_key_, ffn_value_, ffn_receptance_;
  at::Tensor mix_k_, mix_v_, mix_r_, decay_, first_, ffn_mix_k_, ffn_mix_r_;  ///< (D)
};

}  // namespace xlstm::nn
