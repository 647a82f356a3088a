#include "csrc/models/block_stack.h"

#include <c10/util/Exception.h>

#include <string>
#include <tuple>

#include "csrc/models/blocks.h"
#include "csrc/models/build.h"
#include "csrc/models/model_kinds.h"
#include "csrc/models/padded_batch.h"
#include "csrc/nn/recompute.h"

namespace xlstm::models {

void BlockOutputs::check(int64_t num_blocks) const {
  for (const int64_t block : blocks)
    TORCH_CHECK_INDEX(block >= 0 && block < num_blocks, "blocks: expected positions from 0 to ",
                      num_blocks - 1, ", got ", block);
}

BlockStack::BlockStack(const ModelOptions& options, at::Device device) : options_(options) {
  const ModelKind& kind = kind_named(options.kind);
  const int64_t dim = options.embedding_dim;
  if (kind.learns_bounds)
    bounds_ = register_module("lower_bounds",
                              std::make_shared<nn::LowerBounds>(options.num_blocks, dim, device));
  auto list = std::make_shared<torch::nn::Module>("blocks");
  for (int64_t i = 0; i < options.num_blocks; ++i) {
    blocks_.push_back(
        list->register_module(std::to_string(i), make_block(options, i, bounds_, device)));
  }
  register_module("blocks", list);
  if (options.add_out_norm) {
    out_norm_ =
        register_module("out_norm", std::make_shared<nn::Norm>(dim, options.norm_eps,
                                                               kind.has_rms_norms ? "rms" : "layer",
                                                               device, kind.out_norm_has_bias));
  }
}

std::pair<at::Tensor, ModelState> BlockStack::forward(const at::Tensor& x, const ModelState& state,
                                                      const std::optional<at::Tensor>& reset,
                                                      const std::optional<at::Tensor>& lengths,
                                                      BlockOutputs* outputs) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) == options_.embedding_dim && x.is_floating_point(),
              "x: expected (B,T,", options_.embedding_dim,
              ") floating (embedding_dim is the last), got ", x.sizes(), " ", x.scalar_type());
  check(x.size(0), x.size(1), state, reset);
  if (lengths) {
    const PaddedBatch batch(*lengths, x.size(0), x.size(1), !state.empty(), x.device());
    auto [y, next] = forward(batch.ends_aligned(x), {}, batch.reset(reset), {}, outputs);
    if (outputs)
      for (at::Tensor& vectors : outputs->vectors) vectors = batch.starts_aligned(vectors);
    return {batch.starts_aligned(y), std::move(next)};
  }
  if (outputs) {
    outputs->check(options_.num_blocks);
    outputs->vectors.resize(outputs->blocks.size());
  }
  ModelState next(blocks_.size());
  nn::Residual stream(x, options_.fused);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const auto position = static_cast<int64_t>(i);
    const BlockState block_state = relay != nullptr ? relay->receive(position, x.size(0))
                                   : state.empty()  ? BlockState{}
                                                    : state[i];
    if (options_.activation_checkpointing) {
      at::Tensor y;
      std::tie(y, next[i]) = nn::checkpoint(blocks_[i], stream.sum(), block_state, reset,
                                            options_.fused, /*draws=*/options_.dropout > 0);
      stream.replace(y);
    } else {
      next[i] = blocks_[i]->advance(stream, block_state, reset);
    }
    if (relay != nullptr) relay->send(position, next[i]);
    if (!outputs) continue;
    for (size_t k = 0; k < outputs->blocks.size(); ++k)
      if (outputs->blocks[k] == position) outputs->vectors[k] = stream.sum();
  }
  at::Tensor y = out_norm_ ? stream.normed(*out_norm_) : stream.sum();
  if (outputs && !out_norm_) y = y.clone();  // which may be among them: each may be changed
  return {std::move(y), std::move(next)};
}

void BlockStack::check(int64_t batch, int64_t length, const ModelState& state,
                       const std::optional<at::Tensor>& reset) const {
  TORCH_CHECK(state.empty() || state.size() == blocks_.size(),
              "state: expected one entry for each of ", blocks_.size(),
              " blocks or none at all, got ", state.size());
  TORCH_CHECK(!reset || (reset->sizes() == at::IntArrayRef{batch, length} &&
                         reset->scalar_type() == at::kBool),
              "reset: expected (", batch, ",", length, ") bool, got ", reset->sizes(), " ",
              reset->scalar_type());
}

std::shared_ptr<BlockStack> make_block_stack(const ModelOptions& options, at::Device device) {
  return build<BlockStack>(options, device);
}

}  // namespace xlstm::models
