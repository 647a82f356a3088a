#pragma once
#include "csrc/nn/layers.h"

namespace xlstm::nn {

struct SlstmBlockOptions : BlockOptions {
  int64_t num_heads = 4;         ///< a divisor of dim
  int64_t conv_kernel_size = 4;  ///< 0: no convolution and no SiLU in front of the i and f gates
  std::string cell = "slstm";    ///< "slstm" | "slstm_expf" | "lstm"
  std::string gate_proj = "headwise";  ///< W of the gates: block-diagonal | "dense"
  std::string bias_init = "powerlaw_blockdependent";
  std::string recurrent_weight_init = "zeros";
  bool recompute = false;      ///< compute the gates again in the backward pass
  double recurrent_clip = 0;   ///< bound of the gradient through the recurrence; 0: none
  bool recurrent_cut = false;  ///< no gradient through the recurrence
  FeedForwardOptions feed_forward;
};

/// sLSTM with block-diagonal (or dense) gates (arXiv 2405.04517, figure 10): i, f from SiLU(conv(x)), z, o from x;
/// y = headnorm(slstm(i, f, z, o)). `recurrent` (4,NH,DH_out,DH_in) and `bias` (4,NH,DH) in gate order i, f, z, o.
/// State: conv window (B,W-1,D) ((B,0,D) without convolution), y, c, n, m.
class SlstmLayer : public torch::nn::Module {
 public:
  SlstmLayer(const SlstmBlockOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset);

 private:
  void init_cell_parameters();

  const SlstmBlockOptions options_;
  std::shared_ptr<CausalConv1d> conv_;  ///< null without convolution
  std::shared_ptr<BlockLinear> igate_, fgate_, zgate_, ogate_;
  std::shared_ptr<Norm> out_norm_;
  at::Tensor recurrent_, bias_;
};

/// x + slstm(norm(x)), then x + ffn(ffn_norm(x)).
class SlstmBlock : public Block {
 public:
  SlstmBlock(const SlstmBlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  std::shared_ptr<Norm> norm_, ffn_norm_;
  std::shared_ptr<SlstmLayer> slstm_;
  std::shared_ptr<FeedForward> ffn_;
};

}  // namespace xlstm::nn
