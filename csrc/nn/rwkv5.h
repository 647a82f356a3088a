#pragma once
// RWKV-5 and RWKV-6 (arXiv 2404.05892), as compared with in arXiv 2405.04517.
#include "csrc/nn/rwkv4.h"

namespace xlstm::nn {

struct Rwkv5BlockOptions : BlockOptions {
  int64_t num_heads = 4;
  bool data_dependent = false;  ///< RWKV-6: decay and mixes of tokens depend on the input
};

/// How much of the token before enters each input of a time mix: RWKV-5 takes mix_i of this token and 1 - mix_i of the one
/// before. RWKV-6 takes 1 - m_i and m_i of them, m_i = mix_i + (tanh(W_1 (the tokens mixed by mix_x)) W_2)_i of rank 32.
/// Inputs in the order decay (RWKV-6 alone), key, value, receptance, gate.
class TokenMix : public torch::nn::Module {
 public:
  TokenMix(const Rwkv5BlockOptions& options, at::Device device);
  std::vector<at::Tensor> forward(const at::Tensor& now, const at::Tensor& before) const;

 private:
  void init(const Rwkv5BlockOptions& options);

  const bool data_dependent_;
  std::vector<at::Tensor> mixes_;  ///< (D) each
  at::Tensor mix_x_, up_;          ///< (D), (5,32,D)
  std::shared_ptr<Linear> down_;
};

/// x + time_mix(norm(x)), then x + channel_mix(ffn_norm(x)).
///   time mix, per head: y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t,  S_t = diag(w_t) S_{t-1} + k_t v_t^T,
///   out = W_o (headnorm(y) * silu(g));  w = exp(-exp(decay)), in RWKV-6 decay + W_2 tanh(W_1 .) of rank 64.
///   channel mix: sigmoid(W_r .) (W_v relu(W_k .)^2), hidden width 4D, in RWKV-6 3.5D rounded down to a multiple of 32.
/// State: last x of the time mix (B,1,D), S (B,NH,DH,DH) float32, last x of the channel mix.
class Rwkv5Block : public Block {
 public:
  Rwkv5Block(const Rwkv5BlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  void init();
  at::Tensor mixed(const at::Tensor& now, const at::Tensor& before, const at::Tensor& mix) const;
  std::pair<at::Tensor, at::Tensor> time_mix(const at::Tensor& now, const at::Tensor& before,
                                             const State& state,
                                             const std::optional<at::Tensor>& reset) const;
  at::Tensor channel_mix(const at::Tensor& now, const at::Tensor& before) const;

  const Rwkv5BlockOptions options_;
  std::shared_ptr<Norm> norm_, ffn_norm_, head_norm_;
  std::shared_ptr<TokenMix> mix_;
  std::shared_ptr<Linear> key_, value_, receptance_, gate_, output_;
  std::shared_ptr<Linear> decay_down_, decay_up_;  ///< RWKV-6
  std::shared_ptr<Linear> ffn_key_, ffn_value_, ffn_receptance_;
  at::Tensor decay_, first_, ffn_mix_k_, ffn_mix_r_;  ///< (D)
};

}  // namespace xlstm::nn
