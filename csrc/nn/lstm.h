#pragma once
// The LSTMs of arXiv 2405.04517: the plain stack, the one with a residual stream, and the block with a feed-forward layer.
#include "csrc/nn/layers.h"

namespace xlstm::nn {

/// torch.nn.LSTM of one layer and direction, its parameters and their initialisation included (two biases per gate, order
/// i, f, z, o): i, f, o = sigmoid, z = tanh of W x + b_ih + R y + b_hh; c = f c + i z; y = o tanh(c) (eq. 28-33). On a GPU
/// it is torch's (cuDNN; float32 in TF32 where torch allows that) if no document starts inside; otherwise the operator
/// xlstm::slstm. State: y, c.
class LstmLayer : public torch::nn::Module {
 public:
  LstmLayer(int64_t dim, at::Device device);
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset);
  /// The same by at::lstm, any device; B, T >= 1.
  Result forward_by_torch(const at::Tensor& x, const State& state);

 private:
  at::Tensor weight_ih_, weight_hh_;  ///< (4D,D)
  at::Tensor bias_ih_, bias_hh_;      ///< (4D)
};

/// The dropout of kind "lstm" is on the output.
struct LstmBlockOptions : BlockOptions {
  std::string kind = "lstm";        ///< "lstm" | "lstm_residual" | "lstm_block"
  FeedForwardOptions feed_forward;  ///< of lstm_block
};

/// lstm: y = LSTM(x).  lstm_residual: y = x + LSTM(norm(x)).  lstm_block: then y + ffn(ffn_norm(y)).
class LstmBlock : public Block {
 public:
  LstmBlock(const LstmBlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  const LstmBlockOptions options_;
  std::shared_ptr<Norm> norm_, ffn_norm_;  ///< null where the kind has none
  std::shared_ptr<LstmLayer> lstm_;
  std::shared_ptr<FeedForward> ffn_;
};

}  // namespace xlstm::nn
