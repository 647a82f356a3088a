#pragma once
#include "csrc/nn/mlstm.h"

namespace xlstm::nn {

/// mLSTM at the model's width (inner_dim and qkv_block_size are not used):
///   a = SiLU(conv(x)), x without convolution;  q, k from a, v, o, i, f from x, all by full matrices
///   y = proj_down(headnorm(mlstm(q, k, v, i, f)) * sigmoid(o))
/// State: conv window (B,W-1,D) ((B,0,D) without convolution), C, n, m.
class PostMlstmLayer : public torch::nn::Module {
 public:
  PostMlstmLayer(const MlstmBlockOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset);

 private:
  const MlstmBlockOptions options_;
  std::shared_ptr<CausalConv1d> conv_;  ///< null without convolution
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, ogate_, proj_down_;
  std::shared_ptr<HeadGate> igate_, fgate_;
  std::shared_ptr<Norm> out_norm_;
};

/// mLSTM with post-up-projection (arXiv 2405.04517, table 8 and figure 2 right), the frame of the sLSTM block:
/// x + mlstm(norm(x)), then x + ffn(ffn_norm(x)).
class PostMlstmBlock : public Block {
 public:
  PostMlstmBlock(const MlstmBlockOptions& options, const FeedForwardOptions& feed_forward,
                 at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  std::shared_ptr<Norm> norm_, ffn_norm_;
  std::shared_ptr<PostMlstmLayer> mlstm_;
  std::shared_ptr<FeedForward> ffn_;
};

}  // namespace xlstm::nn
