#pragma once
// Small models of every kind in float64 with random parameters, for the tests of whole models.
#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "csrc/models/language_model.h"
#include "tests/support/catch.h"

namespace xlstm::models::tests {

inline constexpr int64_t kVocabulary = 19;
inline constexpr double kTolerance = 1e-9;

inline ModelOptions small_options() {
  ModelOptions options;
  options.vocab_size = kVocabulary;
  options.embedding_dim = 16;
  options.num_blocks = 3;
  options.num_heads = 2;
  options.mlstm.round_proj_up_to_multiple_of = 8;
  options.feed_forward.round_up_to_multiple_of = 8;
  options.slstm_at = {1};
  return options;
}

inline ModelOptions large_options() {
  ModelOptions options = small_options();
  options.kind = "xlstm_large";
  options.slstm_at.clear();
  options.output_logit_soft_cap = 2.5;
  return options;
}

/// Post-up-projection, gates that do not read the input, dense gates of the sLSTM, a feed-forward without gate.
inline ModelOptions ablated_options() {
  ModelOptions options = small_options();
  options.mlstm.up_projection = "post";
  options.mlstm.igate = "bias", options.mlstm.fgate = "fixed";
  options.slstm.gate_proj = "dense";
  options.feed_forward.gated = false, options.feed_forward.act_fn = "relu2";
  return options;
}

inline std::shared_ptr<LanguageModel> make(const ModelOptions& options) {
  auto model = make_language_model(options);
  at::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    at::Tensor& parameter = item.value();
    if (item.key().find("igate_preact.bias") != std::string::npos)
      parameter.zero_();  // -10 would shut the gate
    parameter.add_(at::randn_like(parameter), 0.3);
  }
  model->to(at::kDouble);
  return model;
}

struct Case {
  const char* name;
  std::shared_ptr<LanguageModel> model;
};

inline std::vector<Case> all_models() {
  ModelOptions tied = small_options();
  tied.tie_weights = true;
  tied.add_out_norm = false;
  tied.output_logit_soft_cap = 3;
  tied.slstm_at = {0, 2};
  ModelOptions checkpointed = small_options();
  checkpointed.activation_checkpointing = true;
  std::vector<Case> models = {{"xlstm", make(small_options())},
                              {"xlstm, tied head, soft cap, no out norm", make(tied)},
                              {"xlstm_large", make(large_options())},
                              {"xlstm, activation checkpointing", make(checkpointed)},
                              {"xlstm, ablations", make(ablated_options())}};
  for (const char* kind :
       {"lstm", "lstm_residual", "lstm_block", "llama", "gpt", "mamba", "rwkv4", "rwkv5", "rwkv6",
        "linear_attention", "retnet", "gla", "hgrn", "hgrn2", "h3", "hyena"}) {
    ModelOptions options = small_options();
    options.kind = kind;
    options.state_size = 6, options.filter_length = 16;  // both less than the longest sequence
    options.slstm_at.clear();
    options.max_positions = 64;
    models.push_back({kind, make(options)});
  }
  ModelOptions hgrn2 = small_options();
  hgrn2.kind = "hgrn2", hgrn2.slstm_at.clear();
  hgrn2.activation_checkpointing = true;  // its blocks share a parameter of the model
  models.push_back({"hgrn2, activation checkpointing", make(hgrn2)});
  return models;
}

inline at::Tensor random_ids(int64_t batch, int64_t length) {
  return at::randint(kVocabulary, {batch, length}, at::kLong);
}

inline double difference(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return INFINITY;
  return a.numel() == 0
             ? 0
             : (a - b).abs().max().item<double>() / std::max(1.0, b.abs().max().item<double>());
}

inline double difference(const ModelState& a, const ModelState& b) {
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    REQUIRE(a[i].size() == b[i].size());
    for (size_t j = 0; j < a[i].size(); ++j) worst = std::max(worst, difference(a[i][j], b[i][j]));
  }
  return worst;
}

}  // namespace xlstm::models::tests
