#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace xlstm::train {

int64_t total_steps(const config::Config& config) {
  if (config.train.max_steps > 0) return config.train.max_steps;
  const int64_t per_step = config.train.global_batch_size * config.data.seq_len;
  return (config.train.max_tokens + per_step - 1) / per_step;
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
  const double progress =
      std::min(1.0, static_cast<double>(step - first) /
                        static_cast<double>(std::max<int64_t>(1, total - first)));
  if (options.schedule == "cosine") {
    return options.min_lr +
           (peak - options.min_lr) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
  return peak + (options.min_lr - peak) * progress;  // linear, and the decay of wsd
}

}  // namespace xlstm::train
