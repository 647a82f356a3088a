#include "train/flops.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include "csrc/models/language_model.h"

namespace xlstm::train {
namespace {

/// Of all matrices that a token meets, or of those alone that are not trained.
int64_t matrix_weights(const models::ModelOptions& options, bool frozen_alone = false) {
  const auto model = models::make_language_model(models::unrounded(options), at::kMeta);
  const at::Tensor head = model->head_weight();
  int64_t weights = 0;
  for (const auto& item : model->named_parameters()) {
    const std::string& name = item.key();
    const bool lookup = name.find("embed") != std::string::npos && !item.value().is_same(head);
    const bool matrix = item.value().dim() >= 2 && name.find("bias") == std::string::npos;
    const bool counts = !frozen_alone || !item.value().requires_grad();
    if (matrix && !lookup && counts) weights += item.value().numel();
  }
  return weights;
}

/// Numbers in matrix memories (B,NH,DQK,DV) and in keys and values (B,NH,T,D) after so many tokens.
int64_t memory_numbers(models::LanguageModel& model, int64_t tokens) {
  const int64_t features = model.options().input_features;
  const at::Tensor input =
      features > 0 ? at::zeros({1, tokens, features}) : at::zeros({1, tokens}, at::kLong);
  int64_t numbers = 0;
  for (const models::BlockState& block : model.hidden(input, {}, {}).second)
    for (const at::Tensor& state : block)
      if (state.dim() == 4) numbers += state.numel();
  return numbers;
}

/// What a token costs in the matrix memory, or the attention, of a block that is not the sLSTM's; these are alike.
double memory_flops(const models::ModelOptions& options, int64_t seq_len) {
  models::ModelOptions one_block = models::unrounded(options);
  one_block.num_blocks = one_block.vocab_size = 1;
  one_block.slstm_at.clear();
  const auto model = models::make_language_model(one_block, at::kCPU);
  model->eval();
  const int64_t after_one = memory_numbers(*model, 1);
  const int64_t growth = memory_numbers(*model, 2) - after_one;  // keys and values of a token
  const int64_t fixed = after_one - growth;
  return 4 * static_cast<double>(fixed) +
         static_cast<double>(seq_len + 1) * static_cast<double>(growth);
}

}  // namespace

double forward_flops_per_token(const models::ModelOptions& options, int64_t seq_len) {
  const at::NoGradGuard no_grad;
  const auto blocks = options.num_blocks - static_cast<int64_t>(options.slstm_at.size());
  const double products = 2 * static_cast<double>(matrix_weights(options));
  return blocks == 0 ? products
                     : products + static_cast<double>(blocks) * memory_flops(options, seq_len);
}

double training_flops_per_token(const models::ModelOptions& options, int64_t seq_len) {
  const auto frozen = static_cast<double>(matrix_weights(options, /*frozen_alone=*/true));
  return 3 * forward_flops_per_token(options, seq_len) - 2 * frozen;
}

}  // namespace xlstm::train
