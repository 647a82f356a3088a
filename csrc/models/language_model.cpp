#include "csrc/models/language_model.h"

#include "csrc/nn/xlstm_large.h"
#include "csrc/ops/linear_cross_entropy.h"

namespace xlstm::models {

std::pair<at::Tensor, ModelState> LanguageModel::forward(const at::Tensor& ids,
                                                         const ModelState& state,
                                                         const std::optional<at::Tensor>& reset) {
  auto [h, next] = hidden(ids, state, reset);
  at::Tensor logits = at::linear(h, head_weight());
  if (logits.scalar_type() != at::kDouble) logits = logits.to(at::kFloat);
  return {nn::soft_cap(logits, options().output_logit_soft_cap), std::move(next)};
}

at::Tensor LanguageModel::loss(const at::Tensor& ids, const at::Tensor& targets,
                               const std::optional<at::Tensor>& reset, const char* reduction) {
  const at::Tensor h = hidden(ids, {}, reset).first;
  return ops::linear_cross_entropy(h, head_weight(), targets, /*ignore_index=*/-100,
                                   options().output_logit_soft_cap, reduction);
}

int64_t count_parameters(const ModelOptions& options) {
  int64_t count = 0;
  for (const auto& parameter : make_language_model(options, at::kMeta)->parameters())
    count += parameter.numel();
  return count;
}

}  // namespace xlstm::models
