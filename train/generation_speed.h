#pragma once
// How fast a model generates: what a token costs late in a sequence, and how many sequences at once are worth it.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "csrc/models/language_model.h"

namespace xlstm::train {

struct GenerationTimes {
  std::vector<double> token_s;  ///< seconds_per_step of the tokens up to each position, 64 at most
  std::vector<double> until_s;  ///< from before the prompt to each position
};

/// Generates one sequence greedily behind a random prompt of `prompt` tokens, up to the last of `positions` (which grow,
/// from 1), three times. Each number is the lowest of the three: other work on the machine, which slows a stretch of one of
/// them, only adds to it. Needs no-grad mode and nothing dropped (nn::NoDropout).
GenerationTimes time_generation(models::LanguageModel& model, int64_t prompt,
                                const std::vector<int64_t>& positions,
                                std::optional<bool> lazy_fold = {});

/// Tokens per second of `sequences` that are generated side by side behind prompts of `prompt` tokens: by seconds_per_step of
/// `tokens` steps, after 16 that do not count; none where the memory does not suffice. As above.
std::optional<double> generation_throughput(models::LanguageModel& model, int64_t prompt,
                                            int64_t sequences, int64_t tokens,
                                            std::optional<bool> lazy_fold = {});

double median(std::vector<double> values);

/// What a step costs of decoding steps timed one by one, at least one: the median over groups of 16 successive steps of a
/// group's mean, because an mLSTM's state may be written every 16th step alone (ops::mlstm_step_lazy), which a median of
/// steps would not see. The last ones are grouped; fewer than 16 are one group.
double seconds_per_step(const std::vector<double>& seconds);

}  // namespace xlstm::train
