#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "csrc/models/block_stack.h"
#include "csrc/models/model_options.h"

namespace xlstm::models {

/// A causal language model over token ids. With the option input_features F > 0 the inputs are (B,T,F) float vectors
/// instead of ids; where predicts_numbers(), the logits (B,T,1) are the numbers and the loss is the squared error.
class LanguageModel : public torch::nn::Module {
 public:
  ~LanguageModel() override = default;

  /// ids (B,T) int64, T >= 0, or with `embedded` what embed() made of them (B,T,D) -> final hidden vectors (B,T,D) after the
  /// out norm, and the state after the last token. reset (B,T) bool: the state is empty before that token. lengths (B) int64:
  /// of sequences with padding behind them, see read_padded. New tensors always; the given state is not modified. outputs: what
  /// is wanted of single blocks, or null.
  std::pair<at::Tensor, ModelState> hidden(const at::Tensor& inputs, const ModelState& state = {},
                                           const std::optional<at::Tensor>& reset = {},
                                           const std::optional<at::Tensor>& lengths = {},
                                           bool embedded = false, BlockOutputs* outputs = nullptr);
  /// Logits (B,T,V), float32 or float64, soft-capped where the options say so, and the state.
  std::pair<at::Tensor, ModelState> forward(const at::Tensor& ids, const ModelState& state = {},
                                            const std::optional<at::Tensor>& reset = {},
                                            const std::optional<at::Tensor>& lengths = {});
  /// Embeddings (B,T,D) of ids (B,T), without what a kind adds to them (positions, a norm).
  virtual at::Tensor embed(const at::Tensor& ids) const = 0;
  /// Logits (...,V) of final hidden vectors (...,D).
  at::Tensor logits(const at::Tensor& h) const;
  /// Cross entropy in nats, without ever holding all logits unless the option `fused` is off: sum over targets != -100
  /// (reduction "sum") or their mean. Of predicted numbers: targets (B,T) float, NaN where none counts.
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& targets,
                  const std::optional<at::Tensor>& reset = {}, const char* reduction = "mean");
  /// The same of sequences that go on from a state, and the state behind them.
  std::pair<at::Tensor, ModelState> loss_and_state(const at::Tensor& ids, const at::Tensor& targets,
                                                   const ModelState& state,
                                                   const std::optional<at::Tensor>& reset = {},
                                                   const char* reduction = "mean",
                                                   const std::optional<at::Tensor>& lengths = {});
  /// (V,D) weight of the output head (the embedding's where tied).
  virtual at::Tensor head_weight() const = 0;
  virtual const ModelOptions& options() const = 0;
  /// Null in a model of another make than make_language_model's.
  virtual BlockStack* blocks() { return nullptr; }

 private:
  at::Tensor loss_behind(const at::Tensor& h, const at::Tensor& targets,
                         const char* reduction) const;
  /// By value: what is added to the embeddings need not be held beside them.
  virtual std::pair<at::Tensor, ModelState> run(at::Tensor embedded, const ModelState& state,
                                                const std::optional<at::Tensor>& reset,
                                                BlockOutputs* outputs) = 0;
};

/// Builds and initialises a model. Initialisation draws from torch's default CPU generator: seed it first
/// (torch::manual_seed). Throws c10::ValueError naming the option when sizes do not fit.
/// On device "meta" nothing is allocated, which counts the parameters of any size.
std::shared_ptr<LanguageModel> make_language_model(const ModelOptions& options,
                                                   at::Device device = at::kCPU);

int64_t count_parameters(const ModelOptions& options);

/// A model without adapters that computes what `model` does: they are part of its weights, which are in the dtype of the
/// head. All its parameters need a gradient.
std::shared_ptr<LanguageModel> merge_lora(const LanguageModel& model);

/// Whether weight decay is usual for a parameter: a matrix weight (its name holds "weight" and not "norm"; biases, skips and
/// recurrent kernels are neither); the token embedding only with `of_embedding`.
bool decays(const std::string& name, const at::Tensor& parameter, bool of_embedding);

}  // namespace xlstm::models
