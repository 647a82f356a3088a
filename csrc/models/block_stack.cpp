#include "csrc/models/block_stack.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <string>
#include <tuple>

#include "csrc/models/blocks.h"
#include "csrc/models/build.h"
#include "csrc/models/model_kinds.h"
#include "csrc/models/padded_batch.h"
#include "csrc/nn/recompute.h"

namespace xlstm::models {
namespace {

constexpr const char* kOfAnother =
    "; the state is one of other settings, or of another dtype or device";

}  // namespace

void check_sequences(const ModelState& state, int64_t batch) {
  for (size_t block = 0; block < state.size(); ++block)
    for (const at::Tensor& tensor : state[block]) {
      const int64_t sequences = tensor.dim() > 0 ? tensor.size(0) : 0;
      TORCH_CHECK(sequences == batch, "state: expected one of ", batch,
                  " sequences, as the batch has them, got one of ", sequences, " in block ", block);
    }
}

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
    const Pass pass = [this](const at::Tensor& inputs, const ModelState& from,
                             const std::optional<at::Tensor>& resets, BlockOutputs* wanted) {
      return forward(inputs, from, resets, {}, wanted);
    };
    return read_padded(pass, x, state, reset, *lengths, kind_named(options_.kind).state_grows,
                       outputs);
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
    try {
      if (options_.activation_checkpointing) {
        at::Tensor y;
        std::tie(y, next[i]) = nn::checkpoint(blocks_[i], stream.sum(), block_state, reset,
                                              options_.fused, /*draws=*/options_.dropout > 0);
        stream.replace(y);
      } else {
        next[i] = blocks_[i]->advance(stream, block_state, reset);
      }
    } catch (const c10::Error&) {
      if (relay == nullptr) explain(i, block_state, x);
      throw;
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
  check_sequences(state, batch);
  TORCH_CHECK(!reset || (reset->sizes() == at::IntArrayRef{batch, length} &&
                         reset->scalar_type() == at::kBool),
              "reset: expected (", batch, ",", length, ") bool, got ", reset->sizes(), " ",
              reset->scalar_type());
}

void BlockStack::explain(size_t position, const BlockState& state, const at::Tensor& x) {
  if (state.empty()) return;
  const at::NoGradGuard no_grad;
  nn::Residual nothing(x.narrow(1, 0, 0));
  const BlockState own = blocks_[position]->advance(nothing, {}, {});
  TORCH_CHECK(state.size() == own.size(), "state: block ", position, ": expected ", own.size(),
              " tensors, got ", state.size(), kOfAnother);
  if (kind_named(options_.kind).state_grows) return;  // in one of the sizes
  for (size_t i = 0; i < own.size(); ++i) {
    const at::Tensor &expected = own[i], &got = state[i];
    TORCH_CHECK(got.sizes() == expected.sizes() && got.scalar_type() == expected.scalar_type() &&
                    got.device() == expected.device(),
                "state: block ", position, ": expected tensor ", i, " ", expected.sizes(), " ",
                expected.scalar_type(), " on ", expected.device(), ", got ", got.sizes(), " ",
                got.scalar_type(), " on ", got.device(), kOfAnother);
  }
}

std::shared_ptr<BlockStack> make_block_stack(const ModelOptions& options, at::Device device) {
  return build<BlockStack>(options, device);
}

}  // namespace xlstm::models
