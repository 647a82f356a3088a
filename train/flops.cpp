#include "train/flops.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

namespace xlstm::train {

double forward_flops_per_token(models::LanguageModel& model) {
  const at::NoGradGuard no_grad;
  const at::Tensor head = model.head_weight();
  int64_t weights = 0, memory = 0;
  for (const auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    const bool lookup = name.find("embed") != std::string::npos && !item.value().is_same(head);
    const bool matrix = item.value().dim() >= 2 && name.find("bias") == std::string::npos;
    if (matrix && !lookup) weights += item.value().numel();
  }
  const at::Tensor id = at::zeros({1, 1}, head.options().dtype(at::kLong).requires_grad(false));
  for (const models::BlockState& block : model.hidden(id, {}, {}).second)
    for (const at::Tensor& state : block)
      if (state.dim() == 4) memory += state.numel();  // (B,NH,DQK,DV)
  return 2 * static_cast<double>(weights) + 4 * static_cast<double>(memory);
}

}  // namespace xlstm::train
