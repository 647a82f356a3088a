#pragma once
// How fast a model generates: what a token costs late in a sequence, and how many sequences at once are worth it.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "csrc/models/language_model.h"

namespace xlstm::train {

struct GenerationTimes {
  std::vector<double> token_s;  ///< median of the tokens up to each position, 64 at most
  std::vector<double> until_s;  ///< from before the prompt to each position
};

/// Generates one sequence greedily behind a random prompt of `prompt` tokens, up to the last of `positions` (which grow,
/// from 1), three times. Each number is the lowest of the three: other work on the machine, which slows a stretch of one of
/// them, only adds to it. Needs no-grad mode and nothing dropped (nn::NoDropout).
GenerationTimes time_generation(models::LanguageModel& model, int64_t prompt,
                                const std::vector<int64_t>& positions,
                                std::optional<bool> lazy_fold = {});

/// Tokens per second of `sequences` that are generated side by side behind prompts of `prompt` tokens: the median step of
/// `tokens`, after 16 that do not count; none where the memory does not suffice. As above.
std::optional<double> generation_throughput(models::LanguageModel& model, int64_t prompt,
                                            int64_t sequences, int64_t tokens,
                                            std::optional<bool> lazy_fold = {});

double median(std::vector<double> values);

}  // namespace xlstm::train
