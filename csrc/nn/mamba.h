#pragma once
// Mamba (arXiv 2312.00752), as compared with in arXiv 2405.04517.
#include "csrc/nn/layers.h"

namespace xlstm::nn {

struct MambaBlockOptions : BlockOptions {
  int64_t conv_kernel_size = 4;
};

/// x + out(y silu(z)) of norm(x):  u, z = in(.);  u = silu(conv(u));  dt, b, c = x_proj(u);  delta = softplus(dt_proj(dt));
/// y = selective_scan(u, delta, -exp(a_log), b, c, skip).  Inner width 2D, 16 states, dt of rank ceil(D/16).
/// State: conv window (B,W-1,2D), h (B,2D,16).
class MambaBlock : public Block {
 public:
  MambaBlock(const MambaBlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  void init();

  const MambaBlockOptions options_;
  const int64_t inner_, rank_;
  std::shared_ptr<Norm> norm_;
  std::shared_ptr<Linear> in_proj_, x_proj_, dt_proj_, out_proj_;
  std::shared_ptr<CausalConv1d> conv_;
  at::Tensor a_log_, skip_;  ///< (2D,16), (2D)
};

}  // namespace xlstm::nn
