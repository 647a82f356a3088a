#include "csrc/models/language_model.h"

#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>

#include <string_view>

#include "csrc/models/model_kinds.h"
#include "csrc/models/padded_batch.h"
#include "csrc/nn/xlstm_large.h"
#include "csrc/ops/linear_cross_entropy.h"

namespace xlstm::models {
namespace {

constexpr int64_t kIgnored = -100;  // a target that does not count

void check_targets(const at::Tensor& targets, at::IntArrayRef expected,
                   std::string_view reduction) {
  TORCH_CHECK(targets.sizes() == expected, "loss: targets: expected (B,T) = ", expected, ", got ",
              targets.sizes());
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none",
              "loss: reduction: expected \"mean\", \"sum\" or \"none\", got \"", reduction, "\"");
}

/// Of all logits (...,V) at once; the mean over no targets is 0.
at::Tensor stepwise_loss(const at::Tensor& logits, const at::Tensor& targets,
                         std::string_view reduction) {
  check_targets(targets, logits.sizes().slice(0, 2), reduction);
  const at::Tensor each = at::cross_entropy_loss(logits.flatten(0, -2), targets.flatten(), {},
                                                 at::Reduction::None, kIgnored);
  if (reduction == "none") return each.view(targets.sizes());
  if (reduction == "sum") return each.sum();
  return each.sum() / (targets != kIgnored).sum().clamp_min(1);
}

at::Tensor squared_error(const at::Tensor& predictions, const at::Tensor& targets,
                         std::string_view reduction) {
  check_targets(targets, predictions.sizes(), reduction);
  const at::Tensor counted = targets.isfinite();
  // Filled before the square: what does not count gives no NaN to the gradient, whatever was predicted.
  const at::Tensor each = (predictions - targets).masked_fill(counted.logical_not(), 0).square();
  if (reduction == "none") return each;
  return reduction == "sum" ? each.sum() : each.sum() / counted.sum().clamp_min(1);
}

}  // namespace

std::pair<at::Tensor, ModelState> LanguageModel::hidden(const at::Tensor& inputs,
                                                        const ModelState& state,
                                                        const std::optional<at::Tensor>& reset,
                                                        const std::optional<at::Tensor>& lengths,
                                                        bool embedded, BlockOutputs* outputs) {
  if (lengths && inputs.dim() >= 2) {
    const Pass pass = [this, embedded](const at::Tensor& some, const ModelState& from,
                                       const std::optional<at::Tensor>& resets,
                                       BlockOutputs* wanted) {
      return hidden(some, from, resets, {}, embedded, wanted);
    };
    return read_padded(pass, inputs, state, reset, *lengths, kind_named(options().kind).state_grows,
                       outputs);
  }
  TORCH_CHECK(!embedded || (inputs.dim() == 3 && inputs.size(2) == options().embedding_dim &&
                            inputs.is_floating_point()),
              "embeddings: expected (B,T,", options().embedding_dim, ") floating, got ",
              inputs.sizes(), " ", inputs.scalar_type());
  return run(embedded ? inputs : embed(inputs), state, reset, outputs);
}

std::pair<at::Tensor, ModelState> LanguageModel::forward(const at::Tensor& ids,
                                                         const ModelState& state,
                                                         const std::optional<at::Tensor>& reset,
                                                         const std::optional<at::Tensor>& lengths) {
  auto [h, next] = hidden(ids, state, reset, lengths);
  return {logits(h), std::move(next)};
}

at::Tensor LanguageModel::logits(const at::Tensor& h) const {
  at::Tensor logits = at::linear(h, head_weight());
  if (logits.scalar_type() != at::kDouble) logits = logits.to(at::kFloat);
  return nn::soft_cap(logits, options().output_logit_soft_cap);
}

at::Tensor LanguageModel::loss_behind(const at::Tensor& h, const at::Tensor& targets,
                                      const char* reduction) const {
  if (predicts_numbers(options())) return squared_error(logits(h).squeeze(-1), targets, reduction);
  if (!options().fused) return stepwise_loss(logits(h), targets, reduction);
  return ops::linear_cross_entropy(h, head_weight(), targets, kIgnored,
                                   options().output_logit_soft_cap, reduction);
}

at::Tensor LanguageModel::loss(const at::Tensor& ids, const at::Tensor& targets,
                               const std::optional<at::Tensor>& reset, const char* reduction) {
  const at::Tensor h = hidden(ids, {}, reset).first;  // the state is given back before the head
  return loss_behind(h, targets, reduction);
}

std::pair<at::Tensor, ModelState> LanguageModel::loss_and_state(
    const at::Tensor& ids, const at::Tensor& targets, const ModelState& state,
    const std::optional<at::Tensor>& reset, const char* reduction,
    const std::optional<at::Tensor>& lengths) {
  auto [h, next] = hidden(ids, state, reset, lengths);
  return {loss_behind(h, targets, reduction), std::move(next)};
}

bool decays(const std::string& name, const at::Tensor& parameter, bool of_embedding) {
  const auto holds = [&name](const char* part) { return name.find(part) != std::string::npos; };
  if (parameter.dim() < 2 || !holds("weight") || holds("norm")) return false;
  return !holds("embed") || of_embedding;
}

int64_t count_parameters(const ModelOptions& options) {
  int64_t count = 0;
  for (const auto& parameter : make_language_model(unrounded(options), at::kMeta)->parameters())
    count += parameter.numel();
  return count;
}

std::shared_ptr<LanguageModel> merge_lora(const LanguageModel& model) {
  const at::NoGradGuard no_grad;
  ModelOptions options = model.options();
  options.lora = {};
  const nn::SkipDrawing skip_drawing;
  auto merged = make_language_model(options);
  const at::ScalarType dtype = model.head_weight().scalar_type();  // of all that has no 8 bits
  const auto sources = model.named_modules("", /*include_self=*/false);
  for (const auto& item : merged->named_modules("", /*include_self=*/false)) {
    const auto& source = *sources[item.key()];
    for (auto& parameter : item.value()->named_parameters(/*recurse=*/false)) {
      const auto* linear = parameter.key() == "weight" ? source.as<nn::Linear>() : nullptr;
      const at::Tensor own = source.named_parameters(/*recurse=*/false)[parameter.key()];
      parameter.value().set_data(linear != nullptr ? linear->merged_weight().to(dtype)
                                                   : own.clone());
    }
  }
  merged->train(model.is_training());
  return merged;
}

}  // namespace xlstm::models
