#include "train/recorder.h"

#include <cmath>

#include "train/device.h"
#include "train/schedule.h"

namespace xlstm::train {

Recorder::Recorder(const config::Config& config, int64_t total_steps, at::Device device,
                   const std::string& console)
    : config_(config), total_steps_(total_steps), device_(device), console_(console) {}

void Recorder::open_files(const RunFolder& folder, int64_t step, const std::string& checkpoint,
                          const std::string& first_weights, const std::string& changed,
                          const std::string& command) {
  const bool resumed = !checkpoint.empty();
  jsonl_.emplace(folder.file("metrics.jsonl"));
  write_event(resumed ? "resume" : "start", step,
              {{"checkpoint", checkpoint},
               {"first_weights", first_weights},
               {"changed", changed},
               {"command", command}});
  if (config_.log.tensorboard)
    tensorboard_.emplace(folder.file("tensorboard"), resumed ? step + 1 : 0);
}

void Recorder::log_step(const StepResult& result, const TrainerState& now, StepTimer& timer) {
  const bool logged = (config_.log.every > 0 && result.step % config_.log.every == 0) ||
                      !logged_any_ || result.step >= total_steps_;
  logged_any_ = true;
  if (!logged && !console_.has_bar()) return;
  console_.step(console_step(result, timer), logged);
  if (!logged) return;
  write_metrics(result.step, step_metrics(result, now, timer));
  timer.restart_means();
}

ConsoleStep Recorder::console_step(const StepResult& result, const StepTimer& timer) const {
  ConsoleStep line{.step = result.step,
                   .total_steps = total_steps_,
                   .learning_rate = result.learning_rate,
                   .in_nats = !models::predicts_numbers(config_.model)};
  if (result.targets > 0) line.loss = result.loss, line.grad_norm = result.grad_norm;
  const StepTimes times = timer.times();
  if (times.steps > 0) {
    line.tokens_per_s = static_cast<double>(tokens_per_step(config_)) / times.step_s;
    line.data_fraction = times.data_s / times.step_s;
    line.seconds_left = timer.seconds_per_step() * static_cast<double>(total_steps_ - result.step);
  }
  return line;
}

Metrics Recorder::step_metrics(const StepResult& result, const TrainerState& now,
                               const StepTimer& timer) const {
  const int64_t later = (now.step - result.step) * tokens_per_step(config_);  // consumed since then
  Metrics metrics;
  if (result.targets > 0) {
    metrics.emplace_back("train/loss", result.loss);
    if (!models::predicts_numbers(config_.model))
      metrics.emplace_back("train/ppl", std::exp(result.loss));
    metrics.emplace_back("train/grad_norm", result.grad_norm);
  }
  metrics.insert(metrics.end(),
                 {{"train/lr", result.learning_rate},
                  {"train/tokens", static_cast<double>(now.tokens - later)},
                  {"train/skipped_updates", static_cast<double>(now.skipped_updates)}});
  const StepTimes times = timer.times();
  if (times.steps > 0) {
    metrics.insert(metrics.end(), {{"perf/tokens_per_s",
                                    static_cast<double>(tokens_per_step(config_)) / times.step_s},
                                   {"perf/step_ms", 1e3 * times.step_s},
                                   {"perf/data_ms", 1e3 * times.data_s}});
  }
  metrics.emplace_back("mem/peak_gib", peak_memory_gib(device_));
  return metrics;
}

void Recorder::write_event(const std::string& name, int64_t step,
                           const std::vector<std::pair<std::string, std::string>>& fields) {
  if (jsonl_) jsonl_->write_event(name, step, fields);
}

void Recorder::write_metrics(int64_t step, const Metrics& metrics,
                             const std::string& held_out_set) {
  if (jsonl_) jsonl_->write_metrics(step, metrics, held_out_set);
  if (tensorboard_) tensorboard_->write_metrics(step, metrics);
}

}  // namespace xlstm::train
