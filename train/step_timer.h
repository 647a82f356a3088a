#pragma once
#include <cstdint>

namespace xlstm::train {

/// Seconds on a clock that never goes back.
double monotonic_seconds();

/// Means per step.
struct StepTimes {
  int64_t steps = 0;              ///< steps behind the means; 0: none yet
  double step_s = 0, data_s = 0;  ///< whole step, and its wait for data
};

/// Times steps. The first step of a process (allocation, first touch of data) counts in no mean.
class StepTimer {
 public:
  void begin_step();
  void data_ready();
  void end_step();
  /// Means since restart_means().
  StepTimes times() const;
  void restart_means();
  /// Wall time per step since the first one, evaluation and saving included: what is left is
  /// estimated from it.
  double seconds_per_step() const;

 private:
  int64_t count_ = 0, window_steps_ = 0;
  double begin_ = 0, ready_ = 0, first_end_ = 0, last_end_ = 0;
  double window_step_s_ = 0, window_data_s_ = 0;
};

}  // namespace xlstm::train
