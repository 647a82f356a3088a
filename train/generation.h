#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "csrc/models/language_model.h"

namespace xlstm::train {

struct SamplingOptions {
  int64_t max_new_tokens = 256;
  double temperature = 1.0;  ///< 0: greedy
  int64_t top_k = 0;         ///< 0: off
  double top_p = 1.0;        ///< 1: off; acts on what top_k leaves, renormalised
  uint64_t seed = 42;
  int64_t stop_token = -1;  ///< generation ends behind this token; -1: never
  int64_t vocab_size = 0;  ///< only ids below this are drawn (a padded vocabulary has more); 0: all
};

/// Draws token ids from logits in float64. The same seed gives the same ids on every platform: the generator is
/// std::mt19937_64 and its mapping to [0,1) is our own.
class Sampler {
 public:
  /// Throws Error(kConfig) for a negative temperature or top_k and a top_p outside (0,1].
  explicit Sampler(const SamplingOptions& options);
  /// Equal logits rank by their id, lowest first. Throws Error(kNonFinite) when a logit is NaN or +inf, or none is
  /// finite.
  int64_t draw(at::ArrayRef<double> logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

/// Continues `prompt` (at least one token): one parallel pass over the prompt, then one token at a time with constant
/// memory. `on_token`, where given, sees each new token at once. Own random stream: torch's generator is not touched.
/// Nothing is dropped, whatever mode the model is in. Throws Error(kData) for ids outside the vocabulary.
std::vector<int64_t> generate(models::LanguageModel& model, const std::vector<int64_t>& prompt,
                              const SamplingOptions& options,
                              const std::function<void(int64_t)>& on_token = {});

/// Continues several prompts of any lengths side by side, which costs less than one after the other, on a GPU hardly more
/// than the longest alone. On a CPU one that has ended costs nothing more. Prompt i is drawn with the seed options.seed + i,
/// as generate() would, but for the rounding of larger products. `on_token` sees (i, id).
/// `state`: where not null, prompt i goes on from its sequence i (empty: none), and it becomes the state behind the prompts and
/// all that was drawn, the last ids too, which takes one step more. Throws Error(kConfig) where the model's state grows.
std::vector<std::vector<int64_t>> generate_batch(
    models::LanguageModel& model, const std::vector<std::vector<int64_t>>& prompts,
    const SamplingOptions& options, const std::function<void(size_t, int64_t)>& on_token = {},
    models::ModelState* state = nullptr);

}  // namespace xlstm::train
