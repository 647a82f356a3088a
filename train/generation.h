#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/models/language_model.h"

namespace xlstm::train {

struct SamplingOptions {
  int64_t max_new_tokens = 256;
  double temperature = 1.0;   ///< 0: greedy
  int64_t top_k = 0;          ///< 0: off
  double top_p = 1.0;         ///< 1: off
  uint64_t seed = 42;
  int64_t stop_token = -1;    ///< generation ends behind this token; -1: never
};

/// Continues `prompt` (at least one token): one parallel pass over the prompt, then one token at a time with constant
/// memory. `on_token`, where given, sees each new token at once. Own random stream: torch's generator is not touched.
std::vector<int64_t> generate(models::LanguageModel& model, const std::vector<int64_t>& prompt,
                              const SamplingOptions& options, const std::function<void(int64_t)>& on_token = {});

}  // namespace xlstm::train
