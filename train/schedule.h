#pragma once
#include <cstdint>

#include "csrc/config/config.h"

namespace xlstm::train {

/// How many processes, or with train.sequence_parallel groups of them, have sequences of their own.
int64_t process_groups(const config::Config& config, int64_t processes);
/// Sequences of a step that a process computes; with train.sequence_parallel several processes a segment each.
int64_t sequences_of_process(const config::Config& config, int64_t processes);
/// Sequences of a forward pass where `processes` share each step.
int64_t micro_batch(const config::Config& config, int64_t processes);

/// Learning rate of update number `step`, 1 <= step <= total; a pure function of its arguments.
///
/// Warm-up: learning_rate * step / warmup_steps, so that update warmup_steps has the full rate.
/// Then, with p in (0, 1] the share of the remaining updates and lr, min_lr the two rates:
///   cosine    min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2; with restarts (arXiv 1608.03983) p is the share of one of
///             restarts + 1 equal parts of these updates: each part descends to min_lr, and the next begins anew
///   linear    lr + (min_lr - lr) * p
///   constant  lr
///   wsd       lr, then over the last decay_steps updates (0: a tenth of the run) linear to min_lr
/// The last update has min_lr (but for "constant", and where the run ends within the warm-up).
double learning_rate(const config::OptimConfig& options, int64_t step, int64_t total);

}  // namespace xlstm::train
