#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "csrc/config/config.h"

namespace xlstm::train {

struct ParameterCount {
  /// A tied head counts as embedding; blocks: with the norm behind them.
  int64_t embedding = 0, blocks = 0, head = 0;
  int64_t trained = 0;  ///< of all these
  int64_t total() const { return embedding + blocks + head; }
};
/// Counts without allocating: any size.
ParameterCount count_parameters_by_part(const models::ModelOptions& options);

/// Bytes that one process needs. Weights, gradients and optimizer state are exact, activations an
/// estimate (train/activation_memory.h), which not every model has.
struct MemoryEstimate {
  int64_t weights = 0, gradients = 0, optimizer = 0;
  std::optional<int64_t> activations;
  int64_t carried = 0;  ///< states that are handed on, from batch to batch or between processes
  int64_t whole_weights = 0;  ///< beside those of a step, to save and evaluate divided ones
  int64_t known() const {
    return weights + optimizer + carried +
           std::max(gradients + activations.value_or(0), whole_weights);
  }
};
MemoryEstimate estimate_memory(const config::Config& config);

/// The same without data and without a step, as a line of JSON: parameters, floating point
/// operations (train/flops.h), memory, steps, tokens and those of them that count in the loss; null for what is not known or
/// not given. Any size.
std::string describe_run(const config::Config& config);

/// Prints what a run would do, checks its data and the weights it starts with, and makes one real
/// step where data and memory allow; says what was left out and why. Writes nothing but the cache of
/// prepared text. fresh: as TrainerOptions has it. Throws Error for bad data and weights.
void dry_run(const config::Config& config, bool fresh);

}  // namespace xlstm::train
