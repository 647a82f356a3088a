#include "train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <optional>
#include <system_error>
#include <utility>

#include "train/checkpoint.h"
#include "train/device.h"
#include "train/evaluation.h"
#include "train/failpoint.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/plot.h"
#include "train/run_folder.h"
#include "train/samples.h"
#include "train/schedule.h"
#include "train/signals.h"
#include "train/step_timer.h"
#include "train/train_step.h"
#include "train/training_data.h"

namespace xlstm::train {
namespace {

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

std::string format_mib(int64_t bytes) {
  return format("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
}

int64_t parameter_bytes(const NamedTensors& parameters) {
  int64_t bytes = 0;
  for (const auto& [name, parameter] : parameters)
    bytes += static_cast<int64_t>(parameter.nbytes());
  return bytes;
}

}  // namespace

class Trainer::Impl {
 public:
  Impl(const config::Config& config, const TrainerOptions& options)
      : config_(config), options_(options), total_steps_(total_steps(config)) {}
  ExitCode run();

 private:
  void open();
  std::vector<at::Generator> generators() const;
  void resume_or_start();
  void load(const std::string& folder);
  void announce() const;
  ExitCode train();
  void one_step(Prefetcher& prefetcher);
  void settle();
  void handle_non_finite(const StepResult& result);
  void log_step(const StepResult& result);
  void evaluate_now();
  void write_samples();
  void save();
  ExitCode stop(const char* signal);
  ExitCode finish();
  bool due(int64_t every) const { return every > 0 && state_.step % every == 0; }
  int64_t tokens_per_step() const { return config_.train.global_batch_size * config_.data.seq_len; }
  bool finished() const { return state_.step >= total_steps_; }

  config::Config config_;
  TrainerOptions options_;
  int64_t total_steps_;
  std::optional<RunFolder> folder_;
  TrainingData data_;
  std::shared_ptr<models::LanguageModel> model_;
  at::Device device_ = at::kCPU;
  std::optional<AdamW> optimizer_;
  std::optional<TrainStep> train_step_;
  TrainerState state_;
  int64_t saved_step_ = -1, failed_saves_ = 0, failed_saves_in_a_row_ = 0;
  int64_t evaluated_step_ = -1;
  EvaluationResult evaluation_;
  std::optional<JsonlWriter> jsonl_;
  std::optional<TensorboardWriter> tensorboard_;
  std::optional<Console> console_;
  std::optional<SampleWriter> samples_;
  StepTimer timer_;
  bool logged_any_ = false;
};

Trainer::Trainer(const config::Config& config, const TrainerOptions& options)
    : impl_(std::make_unique<Impl>(config, options)) {}
Trainer::~Trainer() { close_log_file(); }
ExitCode Trainer::run() { return impl_->run(); }

ExitCode Trainer::Impl::run() {
  open();
  resume_or_start();
  announce();
  if (finished()) {
    log_info("this run is finished: step " + std::to_string(state_.step) + " of " +
             std::to_string(total_steps_) +
             "; train on with a larger train.max_steps, or start over with --fresh");
    evaluate_now();
    return finish();
  }
  return train();
}

/// Everything that can fail for outer reasons comes before the first step.
void Trainer::Impl::open() {
  device_ = choose_device(config_.run.device, "run.device");
  use_own_stream(device_);
  if (config_.run.num_threads > 0) at::set_num_threads(static_cast<int>(config_.run.num_threads));
  folder_.emplace(config_.run, options_.fresh);
  open_log_file(folder_->file("run.log"));
  if (!folder_->moved_to().empty()) log_info("moved the earlier run to " + folder_->moved_to());
  data_ = open_training_data(config_);

  for (at::Generator generator : generators())
    generator.set_current_seed(static_cast<uint64_t>(config_.run.seed));
  model_ = models::make_language_model(config_.model, device_);
  model_->train();
  const NamedTensors parameters = named_parameters(*model_);
  optimizer_.emplace(parameters, config_.optim);
  const int64_t needed = 3 * parameter_bytes(parameters);
  const int64_t free_bytes = free_disk_bytes(folder_->path());
  if (free_bytes >= 0 && free_bytes < needed) {
    log_warning(folder_->path() + ": " + format_mib(free_bytes) +
                " free, but one checkpoint needs " + format_mib(needed) + ": saves will fail");
  }
}

/// torch's default generators of the CPU and, where the run is on one, of the GPU. Handles: what is set through them is
/// set for everyone.
std::vector<at::Generator> Trainer::Impl::generators() const {
  std::vector<at::Generator> all{at::globalContext().defaultGenerator(at::kCPU)};
  if (!device_.is_cpu()) all.push_back(at::globalContext().defaultGenerator(device_));
  return all;
}

void Trainer::Impl::resume_or_start() {
  const std::optional<std::string> checkpoint = choose_checkpoint(*folder_, config_);
  if (checkpoint.has_value()) {
    load(*checkpoint);
    set_aside_later_checkpoints(*folder_, state_.step);
  } else {
    state_.data_fingerprint = data_.train->fingerprint();
    if (folder_->held_run())
      log_info("no checkpoint in " + folder_->path() + " yet: starting at step 0");
  }
  try {
    write_run_header(*folder_, config_, options_.command, models::count_parameters(config_.model));
    truncate_jsonl(folder_->file("metrics.jsonl"), state_.step);
    truncate_jsonl(folder_->file("samples.jsonl"), state_.step);
  } catch (const std::system_error& error) {
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder_->path() + ": cannot be written: " + error.what());
  }
  jsonl_.emplace(folder_->file("metrics.jsonl"));
  jsonl_->write_event(checkpoint.has_value() ? "resume" : "start", state_.step,
                      {{"checkpoint", checkpoint.value_or("")}, {"command", options_.command}});
  if (config_.log.tensorboard && !finished()) {
    tensorboard_.emplace(folder_->file("tensorboard"),
                         checkpoint.has_value() ? state_.step + 1 : 0);
  }
  samples_.emplace(config_, folder_->file("samples.jsonl"));
  console_.emplace(options_.quiet ? "off" : config_.log.console);
}

void Trainer::Impl::load(const std::string& folder) {
  // Settings first: their message says more than a shape that does not fit.
  check_same_run(config_, config::load_config(folder + "/config.yaml"), folder);
  Checkpoint checkpoint =
      load_checkpoint(folder, *model_, /*verify=*/false);  // choose_checkpoint did
  if (checkpoint.optimizer.empty()) {
    throw Error(ExitCode::kCheckpoint,
                folder + ": holds a model without optimizer state; it cannot be trained on");
  }
  const std::string fingerprint = data_.train->fingerprint();
  if (checkpoint.state.data_fingerprint != fingerprint) {
    throw Error(ExitCode::kConfig, "data: the training data is not that of " + folder +
                                       " (fingerprint " + checkpoint.state.data_fingerprint +
                                       ", now " + fingerprint +
                                       "); put the data back, start over with --fresh, or choose "
                                       "another run.name");
  }
  optimizer_->load_state(checkpoint.optimizer);
  state_ = checkpoint.state;
  saved_step_ = state_.step;
  auto random = generators();
  random[0].set_state(state_.rng_state);
  if (random.size() > 1 && state_.device_rng_state.defined())
    random[1].set_state(state_.device_rng_state);
  log_info("resumed from " + folder);
}

void Trainer::Impl::announce() const {
  const double count = static_cast<double>(models::count_parameters(config_.model));
  log_info("run " + folder_->path() + " | " + format_count(count) + " parameters | " +
           describe(device_) + " | " + config_.train.dtype);
  log_info("data " + describe_data(config_, data_, total_steps_) + " | " +
           std::to_string(total_steps_) + " steps of " + format_thousands(tokens_per_step()) +
           " tokens");
}

ExitCode Trainer::Impl::train() {
  train_step_.emplace(*model_, *optimizer_, config_);
  Prefetcher prefetcher(*data_.train, state_.samples_consumed, config_.train.global_batch_size,
                        !device_.is_cpu());
  while (!finished()) {
    one_step(prefetcher);                                           // 1 to 7
    if (due(config_.eval.every) && !finished()) evaluate_now();     // 8
    if (due(config_.sample.every) && !finished()) write_samples();  // 9
    if (due(config_.ckpt.every) && !finished()) save();             // 10
    failpoint("trainer.step_end", state_.step);
    if (failpoint_at("trainer.raise_sigterm", state_.step)) std::raise(SIGTERM);
    if (const char* signal = stop_requested()) return stop(signal);  // 11
  }
  save();  // before the final evaluation: nothing that comes now can lose the run
  evaluate_now();
  write_samples();
  return finish();
}

void Trainer::Impl::one_step(Prefetcher& prefetcher) {
  timer_.begin_step();
  const std::unique_ptr<TrainBatch> batch = prefetcher.next();
  timer_.data_ready();
  const auto result = train_step_->run(*batch, state_.step + 1, state_.samples_consumed);
  if (result && !result->finite) handle_non_finite(*result);
  ++state_.step;
  state_.samples_consumed += batch->host.batch_size;
  state_.tokens += batch->host.batch_size * batch->host.seq_len;
  timer_.end_step();
  if (result) log_step(*result);
}

/// Takes the results that the GPU still owes: before anything that looks at the model or ends the run.
void Trainer::Impl::settle() {
  while (const auto result = train_step_ ? train_step_->finish() : std::nullopt) {
    if (!result->finite) handle_non_finite(*result);
    log_step(*result);
  }
}

void Trainer::Impl::handle_non_finite(const StepResult& result) {
  const std::string what =
      "step " + std::to_string(result.step) + ": loss " + format("%g", result.loss) +
      ", gradient norm " + format("%g", result.grad_norm) + ", first bad gradient: " +
      (result.bad_parameter.empty() ? "none alone" : result.bad_parameter) + ", samples " +
      std::to_string(result.first_sample) + " to " + std::to_string(result.last_sample);
  if (config_.train.nonfinite != "skip") {
    jsonl_->write_event("nonfinite", result.step, {{"message", what}});
    throw Error(ExitCode::kNonFinite,
                what +
                    "; nothing was updated. Lower optim.learning_rate, lengthen "
                    "optim.warmup_steps, or skip such steps with train.nonfinite=skip");
  }
  ++state_.skipped_updates;
  log_warning(what + "; this update is skipped (" + std::to_string(state_.skipped_updates) +
              " so far)");
}

void Trainer::Impl::log_step(const StepResult& result) {
  const bool logged = (config_.log.every > 0 && result.step % config_.log.every == 0) ||
                      !logged_any_ || result.step >= total_steps_;
  logged_any_ = true;
  if (!logged && !console_->has_bar()) return;
  ConsoleStep line{.step = result.step,
                   .total_steps = total_steps_,
                   .loss = result.loss,
                   .grad_norm = result.grad_norm,
                   .learning_rate = result.learning_rate,
                   .in_nats = !models::predicts_numbers(config_.model)};
  const StepTimes times = timer_.times();
  if (times.steps > 0) {
    line.tokens_per_s = static_cast<double>(tokens_per_step()) / times.step_s;
    line.data_fraction = times.data_s / times.step_s;
    line.seconds_left = timer_.seconds_per_step() * static_cast<double>(total_steps_ - result.step);
  }
  console_->step(line, logged);
  if (!logged) return;
  const int64_t later = (state_.step - result.step) * tokens_per_step();  // consumed since then
  Metrics metrics = {{"train/loss", result.loss},
                     {"train/grad_norm", result.grad_norm},
                     {"train/lr", result.learning_rate},
                     {"train/tokens", static_cast<double>(state_.tokens - later)},
                     {"train/skipped_updates", static_cast<double>(state_.skipped_updates)}};
  if (line.in_nats) metrics.insert(metrics.begin() + 1, {"train/ppl", std::exp(result.loss)});
  if (times.steps > 0) {
    metrics.insert(metrics.end(), {{"perf/tokens_per_s", line.tokens_per_s},
                                   {"perf/step_ms", 1e3 * times.step_s},
                                   {"perf/data_ms", 1e3 * times.data_s}});
  }
  metrics.emplace_back("mem/peak_gib", peak_memory_gib(device_));
  jsonl_->write_metrics(result.step, metrics);
  if (tensorboard_) tensorboard_->write_metrics(result.step, metrics);
  timer_.restart_means();
}

void Trainer::Impl::evaluate_now() {
  settle();
  if (data_.held_out == nullptr) return;
  const int64_t batch = config_.train.micro_batch_size > 0 ? config_.train.micro_batch_size
                                                           : config_.train.global_batch_size;
  const bool progress = console_->has_bar();
  if (progress) console_->finish();
  evaluation_ = evaluate(*model_, *data_.held_out, batch, config_.eval.batches,
                         config_.train.dtype == "bfloat16", progress);
  evaluated_step_ = state_.step;
  Metrics metrics = {{"val/loss", evaluation_.loss}};
  std::string line = "step " + std::to_string(state_.step) + " | held-out loss " +
                     format("%.4f", evaluation_.loss);
  if (evaluation_.last_error.has_value()) {
    metrics.emplace_back("val/last_error", *evaluation_.last_error);
    line += " (squared error) | at the last position " + format("%.4f", *evaluation_.last_error);
  } else {
    metrics.emplace_back("val/ppl", evaluation_.perplexity);
    line += " | ppl " + format("%.2f", evaluation_.perplexity);
  }
  if (evaluation_.bits_per_byte > 0) {
    metrics.emplace_back("val/bits_per_byte", evaluation_.bits_per_byte);
    line += " | bits per byte " + format("%.4f", evaluation_.bits_per_byte);
  }
  if (evaluation_.accuracy.has_value()) {
    metrics.emplace_back("val/accuracy", *evaluation_.accuracy);
    metrics.emplace_back("val/scaled_accuracy", *evaluation_.scaled_accuracy);
    line += " | accuracy " + format("%.4f", *evaluation_.accuracy) + ", scaled " +
            format("%.4f", *evaluation_.scaled_accuracy);
  }
  log_info(line + " | " + format_count(static_cast<double>(evaluation_.tokens)) + " tokens");
  jsonl_->write_metrics(state_.step, metrics);
  if (tensorboard_) tensorboard_->write_metrics(state_.step, metrics);
}

void Trainer::Impl::write_samples() {
  settle();
  samples_->write(*model_, state_.step);
}

/// Saves this step. A full disk or a lost file system is survived until it happened
/// ckpt.max_failed_saves times in a row; the checkpoint of the last step must succeed.
void Trainer::Impl::save() {
  settle();
  if (saved_step_ == state_.step) return;
  if (const std::string bad = first_non_finite(named_parameters(*model_)); !bad.empty()) {
    throw Error(ExitCode::kNonFinite,
                "step " + std::to_string(state_.step) + ": parameter " + bad +
                    " is not finite after the update; no checkpoint of it is written. Lower "
                    "optim.learning_rate and run the same command again");
  }
  const double start = monotonic_seconds();
  const auto random = generators();
  state_.rng_state = random[0].get_state();
  state_.device_rng_state = random.size() > 1 ? random[1].get_state() : at::Tensor();
  Metrics metrics;
  try {
    const std::string folder =
        save_checkpoint(folder_->path(), config_, *model_, optimizer_->state(), state_);
    saved_step_ = state_.step;
    failed_saves_in_a_row_ = 0;
    metrics.emplace_back("ckpt/save_s", monotonic_seconds() - start);
    log_debug("saved " + folder);
    prune_checkpoints(folder_->path(), config_.ckpt.keep_last, config_.ckpt.keep_every);
  } catch (const std::system_error& error) {
    ++failed_saves_;
    ++failed_saves_in_a_row_;
    metrics.emplace_back("ckpt/failed", static_cast<double>(failed_saves_));
    const std::string what = "checkpoint of step " + std::to_string(state_.step) +
                             " not saved: " + error.what() + " (about " +
                             format_mib(3 * parameter_bytes(named_parameters(*model_))) +
                             " needed, " + format_mib(free_disk_bytes(folder_->path())) + " free)";
    jsonl_->write_metrics(state_.step, metrics);
    const bool last = finished() || stop_requested() != nullptr;
    if (last || failed_saves_in_a_row_ >= config_.ckpt.max_failed_saves) {
      throw Error(ExitCode::kCheckpoint,
                  what +
                      (last ? "; the run ends without it"
                            : ", " + std::to_string(failed_saves_in_a_row_) + " times in a row") +
                      "; free the disk and run the same command again");
    }
    log_warning(what + "; training goes on, the last good checkpoint is " +
                (saved_step_ >= 0 ? "that of step " + std::to_string(saved_step_) : "none yet"));
    return;
  }
  jsonl_->write_metrics(state_.step, metrics);
  if (tensorboard_) tensorboard_->write_metrics(state_.step, metrics);
}

ExitCode Trainer::Impl::stop(const char* signal) {
  console_->finish();
  save();
  jsonl_->write_event("stop", state_.step, {{"signal", signal}});
  log_info(std::string("stopped by ") + signal + " at step " + std::to_string(state_.step) +
           " of " + std::to_string(total_steps_) +
           ", everything is saved; to go on, run the same command again: " + options_.command);
  return ExitCode::kPreempted;
}

ExitCode Trainer::Impl::finish() {
  console_->finish();
  jsonl_->write_event("end", state_.step);
  if (config_.log.plot) draw_loss_plot(folder_->path());
  log_info("run folder: " + folder_->path() + " | checkpoint of step " +
           std::to_string(saved_step_) + " in ckpt/");
  if (evaluated_step_ < 0) {
    print_line("final training loss: " +
               format("%.4f", last_value(folder_->file("metrics.jsonl"), "train/loss")));
  } else if (evaluation_.last_error.has_value()) {
    print_line("held-out squared error: " + format("%.4f", evaluation_.loss) +
               ", at the last position " + format("%.4f", *evaluation_.last_error));
  } else if (evaluation_.accuracy.has_value()) {
    print_line("held-out accuracy: " + format("%.4f", *evaluation_.accuracy) + ", scaled " +
               format("%.4f", *evaluation_.scaled_accuracy));
  } else if (evaluation_.bits_per_byte > 0) {
    print_line("held-out bits per byte: " + format("%.2f", evaluation_.bits_per_byte));
  } else {
    print_line("held-out perplexity: " + format("%.2f", evaluation_.perplexity));
  }
  return ExitCode::kOk;
}

}  // namespace xlstm::train
