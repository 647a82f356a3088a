#include <algorithm>
#include <cmath>

#include "csrc/models/blocks.h"
#include "csrc/models/language_model.h"
#include "csrc/models/model_kinds.h"
#include "csrc/nn/recompute.h"
#include "csrc/nn/transformer.h"

namespace xlstm::models {
namespace {

std::string kind_names() {
  std::string names;
  for (const ModelKind& kind : kModelKinds)
    names += (names.empty() ? "" : ", ") + std::string(kind.name);
  return names;
}

/// The gates' own names are checked here, so that the message says which gate.
void check_gates(const ModelOptions& o) {
  const auto one_of = [](const std::string& value, std::initializer_list<const char*> names,
                         const char* option) {
    std::string expected;
    for (const char* name : names) expected += std::string(expected.empty() ? "" : ", ") + name;
    TORCH_CHECK(std::find(names.begin(), names.end(), value) != names.end(), "model.mlstm.", option,
                ": expected one of ", expected, ", got \"", value, "\"");
  };
  one_of(o.mlstm.up_projection, {"pre", "post"}, "up_projection");
  one_of(o.mlstm.igate, {"input", "bias", "fixed"}, "igate");
  one_of(o.mlstm.fgate, {"input", "bias", "fixed"}, "fgate");
  one_of(o.mlstm.igate_bias_init, {"normal", "zeros"}, "igate_bias_init");
  one_of(o.mlstm.fgate_bias_init, {"linspace", "open"}, "fgate_bias_init");
  TORCH_CHECK(o.mlstm.igate != "fixed" || o.mlstm.igate_bias_init == "zeros",
              "model.mlstm.igate_bias_init: expected zeros for a fixed input gate, got \"",
              o.mlstm.igate_bias_init, "\"");
  TORCH_CHECK(
      o.mlstm.fgate == "fixed" || o.mlstm.fgate_bias_init == "linspace",
      "model.mlstm.fgate_bias_init: expected linspace for a forget gate that learns, got \"",
      o.mlstm.fgate_bias_init, "\"");
}

void check_options(const ModelOptions& o) {
  const auto positive = [](int64_t value, const char* name) {
    TORCH_CHECK(value > 0, "model.", name, ": expected a positive number, got ", value);
  };
  const auto kernel_size = [](int64_t value, const char* name) {
    TORCH_CHECK(value == 0 || (value >= 2 && value <= 8), "model.", name,
                ".conv1d_kernel_size: expected 0 or 2 to 8, ", "got ", value);
  };
  TORCH_CHECK(find_kind(o.kind) != nullptr, "model.kind: expected one of ", kind_names(),
              ", got \"", o.kind, "\"");
  positive(o.vocab_size, "vocab_size");
  TORCH_CHECK(o.input_features == 0 || !o.tie_weights,
              "model.input_features: works without tie_weights: there is no embedding");
  positive(o.embedding_dim, "embedding_dim");
  positive(o.num_blocks, "num_blocks");
  positive(o.num_heads, "num_heads");
  positive(o.mlstm.round_proj_up_to_multiple_of, "mlstm.round_proj_up_to_multiple_of");
  positive(o.feed_forward.round_up_to_multiple_of, "feed_forward.round_up_to_multiple_of");
  kernel_size(o.mlstm.conv1d_kernel_size, "mlstm");
  kernel_size(o.slstm.conv1d_kernel_size, "slstm");
  check_gates(o);
  TORCH_CHECK(o.dropout >= 0 && o.dropout < 1, "model.dropout: expected 0 <= p < 1, got ",
              o.dropout);
  TORCH_CHECK(o.kind == "xlstm" || (!o.bias && o.slstm_at.empty()), "model.kind \"", o.kind,
              "\": expected bias false and an empty slstm_at, which only xlstm has");
  for (const int64_t at : o.slstm_at) {
    TORCH_CHECK(at >= 0 && at < o.num_blocks, "model.slstm_at: expected positions from 0 to ",
                o.num_blocks - 1, ", got ", at);
  }
}

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

/// Embedding, residual blocks, norm, head.
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
      out_norm_ = register_module(
          "out_norm",
          std::make_shared<nn::Norm>(dim, options.norm_eps, kind.has_rms_norms ? "rms" : "layer",
                                     device, kind.out_norm_has_bias));
    }
    if (!options.tie_weights) {
      head_ = register_module("lm_head", std::make_shared<Table>(options.vocab_size, dim, device));
    }
  }

  std::pair<at::Tensor, ModelState> hidden(const at::Tensor& inputs, const ModelState& state,
                                           const std::optional<at::Tensor>& reset) override {
    check_inputs(inputs, state, reset);
    const at::Tensor ids = input_ ? inputs.select(2, 0) : inputs;
    at::Tensor x = input_ ? input_->forward(inputs) : at::embedding(embedding_->weight, ids);
    if (positions_) x = x + positions(ids, state, reset);
    if (in_norm_) x = in_norm_->forward(x);
    if (options_.add_embedding_dropout) x = nn::apply_dropout(x, options_.dropout, is_training());
    ModelState next(blocks_.size());
    nn::Residual stream(x, options_.fused);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const BlockState& block_state = state.empty() ? BlockState{} : state[i];
      if (options_.activation_checkpointing) {
        std::tie(x, next[i]) =
            nn::checkpoint(blocks_[i], stream.sum(), block_state, reset, options_.fused,
                           /*draws=*/options_.dropout > 0);
        stream.replace(x);
      } else {
        next[i] = blocks_[i]->advance(stream, block_state, reset);
      }
    }
    return {out_norm_ ? stream.normed(*out_norm_) : stream.sum(), std::move(next)};
  }

  at::Tensor head_weight() const override {
    return options_.tie_weights ? embedding_->weight : head_->weight;
  }
  const ModelOptions& options() const override { return options_; }

 private:
  /// Learned embeddings of the tokens' positions within their documents (B,T,D).
  at::Tensor positions(const at::Tensor& ids, const ModelState& state,
                       const std::optional<at::Tensor>& reset) const {
    const BlockState& attention = state.empty() ? BlockState{} : state[0];
    const int64_t past = attention.empty() ? 0 : attention[0].size(2), length = ids.size(1);
    TORCH_CHECK_VALUE(past + length <= options_.max_positions,
                      "model.max_positions: ", past + length,
                      " tokens, but the model has learned positions for ", options_.max_positions);
    const at::Tensor starts = nn::document_starts(attention, length, ids, reset);
    return at::embedding(positions_->weight,
                         at::arange(past, past + length, starts.options()) - starts);
  }
  void check_inputs(const at::Tensor& ids, const ModelState& state,
                    const std::optional<at::Tensor>& reset) const {
    const int64_t features = options_.input_features;
    if (features > 0) {
      TORCH_CHECK(ids.dim() == 3 && ids.size(2) == features && ids.is_floating_point(),
                  "inputs: expected (B,T,", features, ") floating, got ", ids.sizes(), " ",
                  ids.scalar_type());
    } else {
      TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong,
                  "ids: expected (B,T) int64, got ", ids.sizes(), " ", ids.scalar_type());
    }
    TORCH_CHECK(state.empty() || state.size() == blocks_.size(),
                "state: expected one entry for each of ", blocks_.size(),
                " blocks or none at all, got ", state.size());
    TORCH_CHECK(
        !reset || (reset->sizes() == ids.sizes().slice(0, 2) && reset->scalar_type() == at::kBool),
        "reset: expected bool of the shape of ids ", ids.sizes(), ", got ", reset->sizes(), " ",
        reset->scalar_type());
  }

  const ModelOptions options_;
  std::shared_ptr<Table> embedding_, head_;  ///< head_ null when tied
  std::shared_ptr<InputProjection> input_;   ///< instead of the embedding, with input_features
  std::shared_ptr<Table> positions_;         ///< gpt
  std::shared_ptr<nn::Norm> in_norm_;        ///< rwkv4, rwkv5, rwkv6
  std::shared_ptr<nn::LowerBounds> bounds_;  ///< hgrn, hgrn2
  std::vector<std::shared_ptr<nn::Block>> blocks_;
  std::shared_ptr<nn::Norm> out_norm_;  ///< null without
};

/// What the parts of a model refuse are values of its options.
std::shared_ptr<BlockModel> build(const ModelOptions& options, at::Device device) {
  try {
    check_options(options);
    return std::make_shared<BlockModel>(options, device);
  } catch (const c10::Error& error) {
    throw c10::ValueError(error.msg(), error.backtrace());
  }
}

}  // namespace

std::shared_ptr<LanguageModel> make_language_model(const ModelOptions& options, at::Device device) {
  // Drawn on the CPU for every device: one seed, one model.
  auto model = build(options, device.is_meta() ? device : at::Device(at::kCPU));
  if (!device.is_meta() && !device.is_cpu()) model->to(device);
  return model;
}

}  // namespace xlstm::models
