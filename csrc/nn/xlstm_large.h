#pragma once
#include "csrc/nn/layers.h"

namespace xlstm::nn {

struct XlstmLargeBlockOptions : BlockOptions {
  XlstmLargeBlockOptions() { norm_eps = 1e-6; }
  int64_t qk_dim = 0;  ///< of all heads together
  int64_t v_dim = 0;
  int64_t num_heads = 8;
  int64_t ffn_dim = 0;
  double gate_soft_cap = 15;  ///< c * tanh(x / c) on i and f; 0: none
  double mlstm_eps = 1e-6;
  int64_t chunk_size = 0;
};

/// mLSTM of the 7B block (arXiv 2503.13427): all projections from x, no convolution, no skip;
/// y = out_proj(sigmoid(o) * headnorm(mlstm(q, k, v, cap(i), cap(f)))). State: C, n, m.
class XlstmLargeLayer : public torch::nn::Module {
 public:
  XlstmLargeLayer(const XlstmLargeBlockOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset);

 private:
  const XlstmLargeBlockOptions options_;
  std::shared_ptr<Linear> q_, k_, v_, ogate_, igate_, fgate_, out_proj_;
  std::shared_ptr<Norm> multihead_norm_;
};

/// SwiGLU MLP with the hub's parameter names: proj_up_gate, proj_up, proj_down.
class SwiGlu : public torch::nn::Module {
 public:
  SwiGlu(int64_t dim, int64_t hidden_dim, int64_t num_blocks, at::Device device);
  at::Tensor forward(const at::Tensor& x) const;

 private:
  std::shared_ptr<Linear> proj_up_gate_, proj_up_, proj_down_;
};

/// x + mlstm_layer(norm_mlstm(x)), then x + ffn(norm_ffn(x)); RMS norms.
class XlstmLargeBlock : public Block {
 public:
  XlstmLargeBlock(const XlstmLargeBlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  const double dropout_;
  std::shared_ptr<Norm> norm_mlstm_, norm_ffn_;
  std::shared_ptr<XlstmLargeLayer> mlstm_layer_;
  std::shared_ptr<SwiGlu> ffn_;
};

/// c * tanh(x / c), or x itself for c = 0.
at::Tensor soft_cap(const at::Tensor& x, double cap);

}  // namespace xlstm::nn
