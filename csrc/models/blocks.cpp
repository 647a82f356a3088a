#include "csrc/models/blocks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>
#include <utility>

#include "csrc/models/model_kinds.h"
#include "csrc/nn/h3.h"
#include "csrc/nn/hyena.h"
#include "csrc/nn/linear_attention.h"
#include "csrc/nn/lstm.h"
#include "csrc/nn/mamba.h"
#include "csrc/nn/mlstm_post.h"
#include "csrc/nn/rwkv4.h"
#include "csrc/nn/rwkv5.h"
#include "csrc/nn/slstm.h"
#include "csrc/nn/transformer.h"
#include "csrc/nn/xlstm_large.h"

namespace xlstm::models {
namespace {

/// ceil(factor * dim / multiple) * multiple: the rounding of the paper's blocks.
int64_t rounded_up(double factor, int64_t dim, int64_t multiple) {
  const double exact = factor * static_cast<double>(dim) / static_cast<double>(multiple);
  return static_cast<int64_t>(std::ceil(exact)) * multiple;
}

/// floor((x + multiple - 1) / multiple) * multiple on an x that is not whole: the rounding of the 7B block.
int64_t rounded_up_large(double factor, int64_t dim, int64_t multiple) {
  const double shifted = factor * static_cast<double>(dim) + static_cast<double>(multiple - 1);
  return static_cast<int64_t>(std::floor(shifted / static_cast<double>(multiple))) * multiple;
}

int64_t ffn_dim(const ModelOptions& o) {
  return rounded_up(o.feed_forward.proj_factor, o.embedding_dim,
                    o.feed_forward.round_up_to_multiple_of);
}

/// Options that hold what all blocks have; the rest as they start.
template <class Options>
Options block_options(const ModelOptions& o, int64_t index) {
  Options block;
  block.dim = o.embedding_dim;
  block.norm_eps = o.norm_eps;
  block.dropout = o.dropout;
  block.fused = o.fused;
  block.block_index = index;
  block.num_blocks = o.num_blocks;
  return block;
}

nn::MlstmBlockOptions mlstm_options(const ModelOptions& o, int64_t index) {
  auto block = block_options<nn::MlstmBlockOptions>(o, index);
  block.inner_dim =
      rounded_up(o.mlstm.proj_factor, o.embedding_dim, o.mlstm.round_proj_up_to_multiple_of);
  block.num_heads = o.num_heads;
  block.conv_kernel_size = o.mlstm.conv1d_kernel_size;
  block.qkv_block_size = o.mlstm.qkv_proj_blocksize;
  block.bias = o.bias;
  block.input_gate = o.mlstm.input_gate;
  block.normalize = o.mlstm.normalize;
  block.igate = {o.mlstm.igate, o.mlstm.igate_bias_init};
  block.fgate = {o.mlstm.fgate, o.mlstm.fgate_bias_init};
  block.mlstm_eps = o.mlstm_eps;
  block.chunk_size = o.chunk_size;
  return block;
}

nn::FeedForwardOptions feed_forward_options(const ModelOptions& o) {
  nn::FeedForwardOptions feed_forward;
  feed_forward.dim = o.embedding_dim;
  feed_forward.hidden_dim = ffn_dim(o);
  feed_forward.num_blocks = o.num_blocks;
  feed_forward.act_fn = o.feed_forward.act_fn;
  feed_forward.bias = o.bias;
  feed_forward.gated = o.feed_forward.gated;
  return feed_forward;
}

nn::SlstmBlockOptions slstm_options(const ModelOptions& o, int64_t index) {
  auto block = block_options<nn::SlstmBlockOptions>(o, index);
  block.num_heads = o.num_heads;
  block.conv_kernel_size = o.slstm.conv1d_kernel_size;
  block.cell = o.slstm.cell;
  block.gate_proj = o.slstm.gate_proj;
  block.bias_init = o.slstm.bias_init;
  block.recurrent_weight_init = o.slstm.recurrent_weight_init;
  block.recompute = o.slstm.recompute;
  block.recurrent_clip = o.slstm.recurrent_clip;
  block.recurrent_cut = o.slstm.recurrent_cut;
  block.feed_forward = feed_forward_options(o);
  return block;
}

nn::XlstmLargeBlockOptions large_options(const ModelOptions& o, int64_t index) {
  const auto scaled = [&](double factor) {
    return static_cast<int64_t>(static_cast<double>(o.embedding_dim) * factor);
  };
  auto block = block_options<nn::XlstmLargeBlockOptions>(o, index);
  block.qk_dim = scaled(o.qk_dim_factor);
  block.v_dim = scaled(o.v_dim_factor);
  block.num_heads = o.num_heads;
  block.ffn_dim = rounded_up_large(o.feed_forward.proj_factor, o.embedding_dim,
                                   o.feed_forward.round_up_to_multiple_of);
  block.gate_soft_cap = o.gate_soft_cap;
  block.mlstm_eps = o.mlstm_eps;
  block.chunk_size = o.chunk_size;
  return block;
}

nn::LstmBlockOptions lstm_options(const ModelOptions& o, int64_t index) {
  auto block = block_options<nn::LstmBlockOptions>(o, index);
  block.kind = o.kind;
  block.feed_forward = {
      .dim = o.embedding_dim, .hidden_dim = ffn_dim(o), .num_blocks = o.num_blocks, .gated = false};
  return block;
}

nn::TransformerBlockOptions transformer_options(const ModelOptions& o, int64_t index, bool gpt) {
  auto block = block_options<nn::TransformerBlockOptions>(o, index);
  block.num_heads = o.num_heads;
  block.ffn_dim = ffn_dim(o);
  block.gpt = gpt;
  return block;
}

nn::MixerOptions mixer_options(const ModelOptions& o, int64_t index) {
  auto mixer = block_options<nn::MixerOptions>(o, index);
  mixer.num_heads = o.num_heads;
  mixer.ffn_dim = ffn_dim(o);
  mixer.chunk_size = o.chunk_size;
  return mixer;
}

nn::Rwkv5BlockOptions rwkv5_options(const ModelOptions& o, int64_t index, bool data_dependent) {
  auto block = block_options<nn::Rwkv5BlockOptions>(o, index);
  block.num_heads = o.num_heads;
  block.data_dependent = data_dependent;
  return block;
}

/// Where a block stands, and what it shares with the others.
struct Place {
  int64_t index;
  const std::shared_ptr<nn::LowerBounds>& bounds;
  at::Device device;
};
using BlockPtr = std::shared_ptr<nn::Block>;

BlockPtr make_xlstm(const ModelOptions& o, const Place& place) {
  const bool slstm =
      std::find(o.slstm_at.begin(), o.slstm_at.end(), place.index) != o.slstm_at.end();
  if (slstm) return std::make_shared<nn::SlstmBlock>(slstm_options(o, place.index), place.device);
  if (o.mlstm.up_projection == "post")
    return std::make_shared<nn::PostMlstmBlock>(mlstm_options(o, place.index),
                                                feed_forward_options(o), place.device);
  return std::make_shared<nn::MlstmBlock>(mlstm_options(o, place.index), place.device);
}

BlockPtr make_xlstm_large(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::XlstmLargeBlock>(large_options(o, place.index), place.device);
}

BlockPtr make_lstm(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::LstmBlock>(lstm_options(o, place.index), place.device);
}

BlockPtr make_llama(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::TransformerBlock>(transformer_options(o, place.index, /*gpt=*/false),
                                                place.device);
}

BlockPtr make_gpt(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::TransformerBlock>(transformer_options(o, place.index, /*gpt=*/true),
                                                place.device);
}

BlockPtr make_mamba(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::MambaBlock>(block_options<nn::MambaBlockOptions>(o, place.index),
                                          place.device);
}

BlockPtr make_rwkv4(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::Rwkv4Block>(block_options<nn::BlockOptions>(o, place.index),
                                          place.device);
}

BlockPtr make_rwkv5(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::Rwkv5Block>(rwkv5_options(o, place.index, /*data_dependent=*/false),
                                          place.device);
}

BlockPtr make_rwkv6(const ModelOptions& o, const Place& place) {
  return std::make_shared<nn::Rwkv5Block>(rwkv5_options(o, place.index, /*data_dependent=*/true),
                                          place.device);
}

/// A linear-attention block with a Mixer, which takes `arguments` behind its options, between its norms.
template <typename Mixer, typename... Arguments>
BlockPtr make_mixed(const ModelOptions& o, const Place& place, const Arguments&... arguments) {
  const nn::MixerOptions options = mixer_options(o, place.index);
  auto mixer = std::make_shared<Mixer>(options, arguments..., place.device);
  return std::make_shared<nn::MixerBlock>(options, std::move(mixer), place.device);
}

BlockPtr make_linear_attention(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::LinearAttention>(o, place);
}
BlockPtr make_retnet(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::Retention>(o, place);
}
BlockPtr make_gla(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::GatedLinearAttention>(o, place);
}
BlockPtr make_hgrn(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::Hgrn>(o, place, place.bounds);
}
BlockPtr make_hgrn2(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::Hgrn2>(o, place, place.bounds);
}
BlockPtr make_h3(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::H3>(o, place, o.state_size);
}
BlockPtr make_hyena(const ModelOptions& o, const Place& place) {
  return make_mixed<nn::Hyena>(o, place, o.filter_length);
}

/// How each kind makes its blocks, in the order of kModelKinds.
struct Maker {
  std::string_view kind;
  BlockPtr (*make)(const ModelOptions&, const Place&);
};
constexpr Maker kMakers[] = {{"xlstm", make_xlstm},     {"xlstm_large", make_xlstm_large},
                             {"lstm", make_lstm},       {"lstm_residual", make_lstm},
                             {"lstm_block", make_lstm}, {"llama", make_llama},
                             {"gpt", make_gpt},         {"mamba", make_mamba},
                             {"rwkv4", make_rwkv4},     {"rwkv5", make_rwkv5},
                             {"rwkv6", make_rwkv6},     {"linear_attention", make_linear_attention},
                             {"retnet", make_retnet},   {"gla", make_gla},
                             {"hgrn", make_hgrn},       {"hgrn2", make_hgrn2},
                             {"h3", make_h3},           {"hyena", make_hyena}};
static_assert(std::equal(std::begin(kMakers), std::end(kMakers), std::begin(kModelKinds),
                         std::end(kModelKinds), [](const Maker& maker, const ModelKind& kind) {
                           return maker.kind == kind.name;
                         }));

}  // namespace

std::shared_ptr<nn::Block> make_block(const ModelOptions& options, int64_t index,
                                      const std::shared_ptr<nn::LowerBounds>& bounds,
                                      at::Device device) {
  const auto maker = std::find_if(std::begin(kMakers), std::end(kMakers),
                                  [&](const Maker& row) { return row.kind == options.kind; });
  TORCH_CHECK(maker != std::end(kMakers), "model.kind: no blocks for \"", options.kind, "\"");
  return maker->make(options, {index, bounds, device});
}

}  // namespace xlstm::models
