#include "train/step_timer.h"

#include <chrono>

namespace xlstm::train {

double monotonic_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void StepTimer::begin_step() { begin_ = monotonic_seconds(); }
void StepTimer::data_ready() { ready_ = monotonic_seconds(); }

void StepTimer::end_step() {
  last_end_ = monotonic_seconds();
  if (++count_ == 1) {
    first_end_ = last_end_;
    return;
  }
  ++window_steps_;
  window_step_s_ += last_end_ - begin_;
  window_data_s_ += ready_ - begin_;
}

StepTimes StepTimer::times() const {
  if (window_steps_ == 0) return {};
  const auto steps = static_cast<double>(window_steps_);
  return {window_steps_, window_step_s_ / steps, window_data_s_ / steps};
}

void StepTimer::restart_means() { window_steps_ = 0, window_step_s_ = 0, window_data_s_ = 0; }

double StepTimer::seconds_per_step() const {
  return count_ > 1 ? (last_end_ - first_end_) / static_cast<double>(count_ - 1) : 0;
}

}  // namespace xlstm::train
