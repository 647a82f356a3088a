#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/config/config.h"
#include "train/checkpoint.h"
#include "train/metrics.h"
#include "train/run_folder.h"
#include "train/step_timer.h"
#include "train/train_step.h"

namespace xlstm::train {

/// What a run writes down of its course, under the keys of metrics.h: steps on the console, metrics and events in
/// <run>/metrics.jsonl, metrics in TensorBoard's event file. Of several processes the one that leads opens the files;
/// what the others record goes nowhere. A file that cannot be written costs a warning, never the run.
class Recorder {
 public:
  /// console: as Console takes it. `config` must outlive the recorder.
  Recorder(const config::Config& config, int64_t total_steps, at::Device device,
           const std::string& console);

  /// Appends to the files of the run from now on, first that it starts, or resumes at `step` from `checkpoint`
  /// ("": it starts). first_weights: as write_run_header takes it. changed: changed_settings() since that checkpoint.
  void open_files(const RunFolder& folder, int64_t step, const std::string& checkpoint,
                  const std::string& first_weights, const std::string& changed,
                  const std::string& command);

  /// Shows the step, and records it if it is the first of this process, the last of the run, or one that log.every
  /// selects. now: the run's counters, which may be steps ahead of the result. timer: its means begin anew with each
  /// record.
  void log_step(const StepResult& result, const TrainerState& now, StepTimer& timer);
  void write_event(const std::string& name, int64_t step,
                   const std::vector<std::pair<std::string, std::string>>& fields = {});
  /// held_out_set: as JsonlWriter takes it.
  void write_metrics(int64_t step, const Metrics& metrics, const std::string& held_out_set = "");

  Console& console() { return console_; }

 private:
  ConsoleStep console_step(const StepResult& result, const StepTimer& timer) const;
  Metrics step_metrics(const StepResult& result, const TrainerState& now,
                       const StepTimer& timer) const;

  const config::Config& config_;
  int64_t total_steps_;
  at::Device device_;
  Console console_;
  std::optional<JsonlWriter> jsonl_;
  std::optional<TensorboardWriter> tensorboard_;
  bool logged_any_ = false;
};

}  // namespace xlstm::train
