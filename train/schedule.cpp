#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace xlstm::train {
namespace {

/// How much of its own part is done, in (0, 1], when `done` of `steps` steps are, which have `parts` equal parts. In whole
/// numbers, so that a part ends exactly at 1.
double share_of_part(int64_t done, int64_t steps, int64_t parts) {
  return static_cast<double>((done * parts - 1) % steps + 1) / static_cast<double>(steps);
}

}  // namespace

int64_t process_groups(const config::Config& config, int64_t processes) {
  return std::max<int64_t>(1, processes / config.train.sequence_parallel);
}

int64_t sequences_of_process(const config::Config& config, int64_t processes) {
  return config.train.global_batch_size / process_groups(config, processes);
}

int64_t micro_batch(const config::Config& config, int64_t processes) {
  return config.train.micro_batch_size > 0 ? config.train.micro_batch_size
                                           : sequences_of_process(config, processes);
}

double learning_rate(const config::OptimConfig& options, int64_t step, int64_t total) {
  const double peak = options.learning_rate;
  const int64_t warmup = options.warmup_steps;
  if (step < warmup) return peak * static_cast<double>(step) / static_cast<double>(warmup);
  if (step == warmup || options.schedule == "constant") return peak;

  int64_t first = warmup;  // the last update with the full rate
  if (options.schedule == "wsd") {
    const int64_t decay =
        options.decay_steps > 0 ? options.decay_steps : std::max<int64_t>(1, total / 10);
    first = std::max(warmup, total - decay);
    if (step <= first) return peak;
  }
  const int64_t remaining = std::max<int64_t>(1, total - first);
  const int64_t done = std::min(step - first, remaining);
  if (options.schedule == "cosine") {
    const double progress = share_of_part(done, remaining, options.restarts + 1);
    return options.min_lr +
           (peak - options.min_lr) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
  const double progress = static_cast<double>(done) / static_cast<double>(remaining);
  return peak + (options.min_lr - peak) * progress;  // linear, and the decay of wsd
}

}  // namespace xlstm::train
