#pragma once
// Transformer blocks of the comparisons in arXiv 2405.04517: Llama's and GPT-3's.
#include "csrc/nn/layers.h"
#include "csrc/nn/xlstm_large.h"

namespace xlstm::nn {

struct TransformerBlockOptions : BlockOptions {
  TransformerBlockOptions() { norm_eps = 1e-6; }
  int64_t num_heads = 4;
  int64_t ffn_dim = 0;
  double rope_theta = 1e4;  ///< Llama: rotary embedding (arXiv 2104.09864)
  bool gpt = false;  ///< LayerNorm with bias, biases, plain GELU feed-forward, no rotary embedding
};

/// Causal multi-head attention, softmax(q k^T / sqrt(DH)) v over all tokens since the last reset. State: the keys and
/// values of all tokens so far (B,NH,S,DH), keys already rotated by their position, and from which of them on a token is
/// seen (B) int64. It grows by one row per token, as attention must; every other model of this library keeps a fixed size.
class Attention : public torch::nn::Module {
 public:
  Attention(const TransformerBlockOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset);

 private:
  at::Tensor split_heads(const at::Tensor& x) const;

  const TransformerBlockOptions options_;
  std::shared_ptr<Linear> q_, k_, v_, out_;
};

/// x + attention(norm(x)), then x + ffn(ffn_norm(x)).
class TransformerBlock : public Block {
 public:
  TransformerBlock(const TransformerBlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  const TransformerBlockOptions options_;
  std::shared_ptr<Norm> norm_, ffn_norm_;
  std::shared_ptr<Attention> attention_;
  std::shared_ptr<SwiGlu> swiglu_;    ///< Llama
  std::shared_ptr<FeedForward> ffn_;  ///< GPT
};

/// For each of the next `length` tokens the token of the cache that its document starts at: (B,T) int64 on like's device;
/// like is (B,...). Token past + t has the position past + t - start within its document.
at::Tensor document_starts(const State& attention, int64_t length, const at::Tensor& like,
                           const std::optional<at::Tensor>& reset);

/// Rotates the halves of each head (Llama's convention) of x (B,NH,T,DH) by the angles of positions (B,T).
at::Tensor rotate(const at::Tensor& x, const at::Tensor& positions, double theta);

}  // namespace xlstm::nn
