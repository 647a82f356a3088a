#pragma once
// HGRN (arXiv 2311.04823, its real-valued form) and HGRN2 (arXiv 2404.07904), as compared with in arXiv 2405.04517.
#include "csrc/nn/mixer_block.h"

namespace xlstm::nn {

/// Lower bounds of the forget gates, growing with the depth: block i keeps at least p_1 + ... + p_i of its state, where p is
/// the softmax over the blocks of logits (num_blocks,D). The model owns them; every block reads its own.
class LowerBounds : public torch::nn::Module {
 public:
  LowerBounds(int64_t num_blocks, int64_t dim, at::Device device);
  at::Tensor of_block(int64_t index) const;  ///< (D)
  at::Tensor logits;
};

/// h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t), f = b + (1 - b) sigmoid(W_f x);  y = W_o (norm(h) * silu(W_g x)).
/// State: h (B,D) float32.
class Hgrn : public Mixer {
 public:
  Hgrn(const MixerOptions& options, std::shared_ptr<LowerBounds> bounds, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;
  std::vector<at::Tensor> outer_parameters() const override { return {bounds_->logits}; }

 private:
  const MixerOptions options_;
  const std::shared_ptr<LowerBounds> bounds_;
  std::shared_ptr<Linear> input_, forget_, gate_, out_;
  std::shared_ptr<Norm> out_norm_;
};

/// S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, f as for HGRN, v = W_i x;  y = W_o norm(S^T silu(W_q x)), the norm over all
/// heads. State: S (B,NH,DH,DH).
class Hgrn2 : public Mixer {
 public:
  Hgrn2(const MixerOptions& options, std::shared_ptr<LowerBounds> bounds, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;
  std::vector<at::Tensor> outer_parameters() const override { return {bounds_->logits}; }

 private:
  const MixerOptions options_;
  const std::shared_ptr<LowerBounds> bounds_;
  std::shared_ptr<Linear> query_, forget_, input_, out_;
  std::shared_ptr<Norm> out_norm_;
};

}  // namespace xlstm::nn
