#include <cmath>

#include "csrc/models/block_stack.h"
#include "csrc/models/build.h"
#include "csrc/models/language_model.h"
#include "csrc/models/model_kinds.h"
#include "csrc/nn/transformer.h"

namespace xlstm::models {
namespace {

/// A module that holds one weight (V,D): the embedding and the untied head.
class Table : public torch::nn::Module {
 public:
  /// init_std 0: that of small_init_.
  Table(int64_t rows, int64_t dim, at::Device device, double init_std = 0) {
    weight = register_parameter(
        "weight", at::empty({rows, dim}, at::TensorOptions().dtype(at::kFloat).device(device)));
    if (init_std > 0) {
      nn::normal_init_(weight, init_std);
    } else {
      nn::small_init_(weight, dim);
    }
  }
  at::Tensor weight;
};

/// Real vectors (...,F) to the residual stream.
class InputProjection : public torch::nn::Module {
 public:
  InputProjection(int64_t features, int64_t dim, at::Device device) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    weight = register_parameter("weight", at::empty({dim, features}, options));
    bias = register_parameter("bias", at::zeros({dim}, options));
    nn::normal_init_(weight, std::sqrt(1.0 / static_cast<double>(features)));
  }
  at::Tensor forward(const at::Tensor& x) const { return at::linear(x, weight, bias); }
  at::Tensor weight, bias;
};

/// Embedding, stack of blocks, head. The parts of the stack are registered as the model's own.
class BlockModel : public LanguageModel {
 public:
  BlockModel(const ModelOptions& options, at::Device device) : options_(options) {
    const ModelKind& kind = kind_named(options.kind);
    const int64_t dim = options.embedding_dim;
    if (options.input_features > 0) {
      input_ = register_module(
          "input", std::make_shared<InputProjection>(options.input_features, dim, device));
    } else {
      embedding_ = register_module(
          "embedding",
          std::make_shared<Table>(options.vocab_size, dim, device, options.embedding_init_std));
    }
    if (kind.learns_positions)
      positions_ = register_module("position_embedding",
                                   std::make_shared<Table>(options.max_positions, dim, device));
    if (kind.norms_embedding)
      in_norm_ = register_module(
          "in_norm", std::make_shared<nn::Norm>(dim, options.norm_eps, "layer", device, true));
    stack_ = std::make_shared<BlockStack>(options, device);
    for (const auto& part : stack_->named_children()) register_module(part.key(), part.value());
    if (!options.tie_weights) {
      head_ = register_module("lm_head", std::make_shared<Table>(options.vocab_size, dim, device));
    }
  }

  at::Tensor embed(const at::Tensor& inputs) const override {
    check_inputs(inputs);
    return input_ ? input_->forward(inputs) : at::embedding(embedding_->weight, inputs);
  }

  at::Tensor head_weight() const override {
    return options_.tie_weights ? embedding_->weight : head_->weight;
  }
  const ModelOptions& options() const override { return options_; }
  BlockStack* blocks() override { return stack_.get(); }

 private:
  std::pair<at::Tensor, ModelState> run(at::Tensor x, const ModelState& state,
                                        const std::optional<at::Tensor>& reset,
                                        BlockOutputs* outputs) override {
    stack_->check(x.size(0), x.size(1), state, reset);
    if (positions_) x = x + positions(x, state, reset);
    if (in_norm_) x = in_norm_->forward(x);
    if (options_.add_embedding_dropout) x = nn::apply_dropout(x, options_.dropout, is_training());
    return stack_->forward(x, state, reset, {}, outputs);
  }
  /// Learned embeddings of the positions that tokens x (B,T,D) have within their documents (B,T,D).
  at::Tensor positions(const at::Tensor& x, const ModelState& state,
                       const std::optional<at::Tensor>& reset) const {
    const BlockState& attention = state.empty() ? BlockState{} : state[0];
    const int64_t past = attention.empty() ? 0 : attention[0].size(2), length = x.size(1);
    TORCH_CHECK_VALUE(past + length <= options_.max_positions,
                      "model.max_positions: ", past + length,
                      " tokens, but the model has learned positions for ", options_.max_positions);
    const at::Tensor starts = nn::document_starts(attention, length, x, reset);
    return at::embedding(positions_->weight,
                         at::arange(past, past + length, starts.options()) - starts);
  }
  void check_inputs(const at::Tensor& ids) const {
    const int64_t features = options_.input_features;
    if (features > 0) {
      TORCH_CHECK(ids.dim() == 3 && ids.size(2) == features && ids.is_floating_point(),
                  "inputs: expected (B,T,", features, ") floating, got ", ids.sizes(), " ",
                  ids.scalar_type());
    } else {
      TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong,
                  "ids: expected (B,T) int64, got ", ids.sizes(), " ", ids.scalar_type());
    }
  }

  const ModelOptions options_;
  std::shared_ptr<Table> embedding_, head_;  ///< head_ null when tied
  std::shared_ptr<InputProjection> input_;   ///< instead of the embedding, with input_features
  std::shared_ptr<Table> positions_;         ///< gpt
  std::shared_ptr<nn::Norm> in_norm_;        ///< rwkv4, rwkv5, rwkv6
  std::shared_ptr<BlockStack> stack_;
};

}  // namespace

std::shared_ptr<LanguageModel> make_language_model(const ModelOptions& options, at::Device device) {
  return build<BlockModel>(options, device);
}

}  // namespace xlstm::models
