#pragma once
// Linear attention (arXiv 2006.16236), RetNet (arXiv 2307.08621) and gated linear attention (arXiv 2312.06635), as compared
// with in arXiv 2405.04517. A decay that is one number for each head is an mLSTM cell with fixed sigmoid gates and without
// normaliser; one for each row of the state is the operator gated_linear_attention.
#include "csrc/nn/mixer_block.h"

namespace xlstm::nn {

/// y = W_o ((phi(q)^T sum phi(k) v^T) / (phi(q) . sum phi(k))),  phi(x) = elu(x) + 1; no decay and no positions.
/// State: c (B,NH,DH,DH+1), whose last column is the sum of phi(k), and the cell's n and m.
class LinearAttention : public Mixer {
 public:
  LinearAttention(const MixerOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;

 private:
  const MixerOptions options_;
  std::shared_ptr<Linear> q_, k_, v_, out_;
};

/// S_t = gamma_h S_{t-1} + k_t v_t^T, gamma_h = 1 - 2^{-5-h};  y = W_o (headnorm(S^T q / sqrt(DK)) * silu(W_g x)).
/// q, k of width D, rotated by the token's position in its document; v and the gate of width 2D; a norm without weight.
/// State: c (B,NH,DK,DV), n, m of the cell, and how many tokens the document has so far (B) int64.
class Retention : public Mixer {
 public:
  Retention(const MixerOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;

 private:
  const MixerOptions options_;
  std::shared_ptr<Linear> q_, k_, v_, gate_, out_;
};

/// S_t = diag(a_t) S_{t-1} + k_t v_t^T, a = sigmoid(W_2 W_1 x + b)^{1/16} with W_1 (16,D);
/// y = W_o (headnorm(S^T q / sqrt(DK)) * silu(W_g x)). q, k of width D/2, v of width D; the heads share the norm's weight.
/// State: S (B,NH,DK,DV).
class GatedLinearAttention : public Mixer {
 public:
  GatedLinearAttention(const MixerOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;

 private:
  const MixerOptions options_;
  std::shared_ptr<Linear> q_, k_, v_, gate_, decay_down_, decay_up_, out_;
  std::shared_ptr<Norm> head_norm_;  ///< weight (DV)
};

}  // namespace xlstm::nn
