#include "csrc/models/baselines.h"

#include <cmath>

#include "csrc/nn/h3.h"
#include "csrc/nn/hyena.h"
#include "csrc/nn/linear_attention.h"
#include "csrc/nn/lstm.h"
#include "csrc/nn/mamba.h"
#include "csrc/nn/rwkv4.h"
#include "csrc/nn/rwkv5.h"
#include "csrc/nn/transformer.h"

namespace xlstm::models {
namespace {

int64_t ffn_dim(const ModelOptions& o) {
  return rounded_up(o.feed_forward.proj_factor, o.embedding_dim,
                    o.feed_forward.round_up_to_multiple_of);
}

nn::LstmBlockOptions lstm_options(const ModelOptions& o) {
  nn::LstmBlockOptions block;
  block.dim = o.embedding_dim;
  block.kind = o.kind;
  block.norm_eps = o.norm_eps;
  block.dropout = o.dropout;
  block.feed_forward.dim = o.embedding_dim;
  block.feed_forward.hidden_dim = ffn_dim(o);
  block.feed_forward.num_blocks = o.num_blocks;
  return block;
}

nn::TransformerBlockOptions transformer_options(const ModelOptions& o) {
  nn::TransformerBlockOptions block;
  block.dim = o.embedding_dim;
  block.num_heads = o.num_heads;
  block.ffn_dim = ffn_dim(o);
  block.norm_eps = o.norm_eps;
  block.dropout = o.dropout;
  block.gpt = o.kind == "gpt";
  block.num_blocks = o.num_blocks;
  return block;
}

nn::MixerOptions mixer_options(const ModelOptions& o, int64_t index) {
  nn::MixerOptions mixer;
  mixer.dim = o.embedding_dim;
  mixer.num_heads = o.num_heads;
  mixer.ffn_dim = ffn_dim(o);
  mixer.norm_eps = o.norm_eps;
  mixer.dropout = o.dropout;
  mixer.chunk_size = o.chunk_size;
  mixer.fused = o.fused;
  mixer.block_index = index;
  mixer.num_blocks = o.num_blocks;
  return mixer;
}

/// What stands between the norms of a linear-attention block; null for another kind.
std::shared_ptr<nn::Mixer> make_mixer(const ModelOptions& o, const nn::MixerOptions& mixer,
                                      const std::shared_ptr<nn::LowerBounds>& bounds,
                                      at::Device device) {
  if (o.kind == "linear_attention") return std::make_shared<nn::LinearAttention>(mixer, device);
  if (o.kind == "retnet") return std::make_shared<nn::Retention>(mixer, device);
  if (o.kind == "gla") return std::make_shared<nn::GatedLinearAttention>(mixer, device);
  if (o.kind == "hgrn") return std::make_shared<nn::Hgrn>(mixer, bounds, device);
  if (o.kind == "hgrn2") return std::make_shared<nn::Hgrn2>(mixer, bounds, device);
  if (o.kind == "h3") return std::make_shared<nn::H3>(mixer, o.state_size, device);
  if (o.kind == "hyena") return std::make_shared<nn::Hyena>(mixer, o.filter_length, device);
  return nullptr;
}

nn::Rwkv5BlockOptions rwkv5_options(const ModelOptions& o, int64_t index) {
  nn::Rwkv5BlockOptions block;
  block.dim = o.embedding_dim;
  block.num_heads = o.num_heads;
  block.norm_eps = o.norm_eps;
  block.dropout = o.dropout;
  block.fused = o.fused;
  block.block_index = index;
  block.num_blocks = o.num_blocks;
  block.data_dependent = o.kind == "rwkv6";
  return block;
}

}  // namespace

int64_t rounded_up(double factor, int64_t dim, int64_t multiple) {
  const double exact = factor * static_cast<double>(dim) / static_cast<double>(multiple);
  return static_cast<int64_t>(std::ceil(exact)) * multiple;
}

std::shared_ptr<nn::Block> make_baseline_block(const ModelOptions& o, int64_t index,
                                               const std::shared_ptr<nn::LowerBounds>& bounds,
                                               at::Device device) {
  if (o.kind.rfind("lstm", 0) == 0) return std::make_shared<nn::LstmBlock>(lstm_options(o), device);
  if (o.kind == "llama" || o.kind == "gpt")
    return std::make_shared<nn::TransformerBlock>(transformer_options(o), device);
  if (o.kind == "mamba")
    return std::make_shared<nn::MambaBlock>(
        nn::MambaBlockOptions{o.embedding_dim, 4, o.norm_eps, o.dropout, o.fused}, device);
  if (o.kind == "rwkv4")
    return std::make_shared<nn::Rwkv4Block>(
        nn::Rwkv4BlockOptions{o.embedding_dim, o.norm_eps, o.dropout, index, o.num_blocks}, device);
  if (o.kind == "rwkv5" || o.kind == "rwkv6")
    return std::make_shared<nn::Rwkv5Block>(rwkv5_options(o, index), device);
  const nn::MixerOptions options = mixer_options(o, index);
  if (auto mixer = make_mixer(o, options, bounds, device))
    return std::make_shared<nn::MixerBlock>(options, std::move(mixer), device);
  return nullptr;
}

}  // namespace xlstm::models
