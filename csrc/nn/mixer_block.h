#pragma once
// The block that the linear-attention models of the comparisons share: RMSNorm, a mixer of tokens, RMSNorm, SwiGLU.
#include "csrc/nn/layers.h"
#include "csrc/nn/xlstm_large.h"

namespace xlstm::nn {

struct MixerOptions : BlockOptions {
  MixerOptions() { norm_eps = 1e-6; }
  int64_t num_heads = 4;
  int64_t ffn_dim = 0;
  int64_t chunk_size = 0;  ///< of the mLSTM cells
};

/// What takes the place of attention: x (B,T,D) -> (B,T,D) and the state behind it.
class Mixer : public torch::nn::Module {
 public:
  virtual Result forward(const at::Tensor& x, const State& state,
                         const std::optional<at::Tensor>& reset) = 0;
  virtual std::vector<at::Tensor> outer_parameters() const { return {}; }

 protected:
  /// A registered projection without bias, drawn for inputs of `in` features.
  std::shared_ptr<Linear> projection(const char* name, int64_t in, int64_t out, at::Device device);
};

/// x + mixer(norm(x)), then x + ffn(ffn_norm(x)). State: the mixer's.
class MixerBlock : public Block {
 public:
  MixerBlock(const MixerOptions& options, std::shared_ptr<Mixer> mixer, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;
  std::vector<at::Tensor> outer_parameters() const override { return mixer_->outer_parameters(); }

 private:
  const double dropout_;
  std::shared_ptr<Norm> norm_, ffn_norm_;
  std::shared_ptr<Mixer> mixer_;
  std::shared_ptr<SwiGlu> ffn_;
};

/// Throws c10::Error unless num_heads heads divide `width`, which `what` names.
void check_heads(int64_t width, int64_t num_heads, const char* what);

}  // namespace xlstm::nn
