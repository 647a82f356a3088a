#include "train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <optional>
#include <system_error>
#include <utility>

#include "train/checkpoint.h"
#include "train/device.h"
#include "train/distributed.h"
#include "train/evaluation.h"
#include "train/failpoint.h"
#include "train/held_out.h"
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

std::string format_mib(int64_t bytes) {
  return format_number("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
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
  void open_run_folder();
  void open_data();
  std::vector<at::Generator> generators() const;
  void resume_or_start();
  void load(const std::string& folder);
  void start_metrics(const std::string& checkpoint);
  void share_state();
  void seed_own_stream();
  void announce() const;
  ExitCode train();
  void one_step(Prefetcher& prefetcher);
  void settle();
  void handle_non_finite(const StepResult& result);
  void log_step(const StepResult& result);
  void evaluate_now();
  void write_samples();
  void save();
  void check_weights();
  void write_checkpoint();
  const char* stop_agreed();
  ExitCode stop(const char* signal);
  ExitCode finish();
  void print_result() const;
  void write_event(const std::string& name, int64_t step,
                   const std::vector<std::pair<std::string, std::string>>& fields = {});
  void write_metrics(int64_t step, const Metrics& metrics);
  bool leads() const { return group_->place().leads(); }
  bool due(int64_t every) const { return every > 0 && state_.step % every == 0; }
  int64_t tokens_per_step() const { return config_.train.global_batch_size * config_.data.seq_len; }
  bool finished() const { return state_.step >= total_steps_; }

  config::Config config_;
  TrainerOptions options_;
  int64_t total_steps_;
  std::optional<ProcessGroup> group_;
  std::optional<RunFolder> folder_;  ///< of the process that leads, as all that writes
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
  bool logged_any_ = false, stopping_ = false;
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
  const ProcessPlace place = place_from_environment();
  if (config_.train.global_batch_size % place.size != 0)
    throw Error(ExitCode::kConfig,
                "train.global_batch_size " + std::to_string(config_.train.global_batch_size) +
                    " cannot be shared by " + std::to_string(place.size) +
                    " processes; make it a multiple of " + std::to_string(place.size));
  if (!place.leads()) set_console_verbosity(Verbosity::kQuiet);
  if (config_.run.device != "cpu") take_own_gpu(place);
  device_ = choose_device(config_.run.device, "run.device");
  use_own_stream(device_);
  if (config_.run.num_threads > 0) at::set_num_threads(static_cast<int>(config_.run.num_threads));
  group_.emplace(place, device_);
  if (leads()) open_run_folder();
  open_data();

  for (at::Generator generator : generators())
    generator.set_current_seed(static_cast<uint64_t>(config_.run.seed));
  model_ = models::make_language_model(config_.model, device_);
  model_->train();
  const NamedTensors parameters = named_parameters(*model_);
  optimizer_.emplace(parameters, config_.optim);
  if (!leads()) return;
  const int64_t needed = 3 * parameter_bytes(parameters);
  const int64_t free_bytes = free_disk_bytes(folder_->path());
  if (free_bytes >= 0 && free_bytes < needed) {
    log_warning(folder_->path() + ": " + format_mib(free_bytes) +
                " free, but one checkpoint needs " + format_mib(needed) + ": saves will fail");
  }
}

void Trainer::Impl::open_run_folder() {
  folder_.emplace(config_.run, options_.fresh);
  open_log_file(folder_->file("run.log"));
  if (!folder_->moved_to().empty()) log_info("moved the earlier run to " + folder_->moved_to());
}

/// Process 0 prepares data.text; the others then find it in the cache.
void Trainer::Impl::open_data() {
  if (!leads()) group_->barrier();
  data_ = open_training_data(config_);
  if (leads()) group_->barrier();
  const std::string own = data_.train->fingerprint();
  if (group_->any(own != group_->broadcast(own)))
    throw Error(ExitCode::kData,
                "the processes of this run do not read the same training data (this one has " +
                    data_.train->fingerprint() +
                    "); give all of them the same files and data settings");
}

/// torch's default generators of the CPU and, where the run is on one, of the GPU. Handles: what is set through them is
/// set for everyone.
std::vector<at::Generator> Trainer::Impl::generators() const {
  std::vector<at::Generator> all{at::globalContext().defaultGenerator(at::kCPU)};
  if (!device_.is_cpu()) all.push_back(at::globalContext().defaultGenerator(device_));
  return all;
}

void Trainer::Impl::resume_or_start() {
  state_.data_fingerprint = data_.train->fingerprint();
  if (leads()) {
    const std::optional<std::string> checkpoint = choose_checkpoint(*folder_, config_);
    if (checkpoint.has_value()) {
      load(*checkpoint);
      set_aside_later_checkpoints(*folder_, state_.step);
    } else if (folder_->held_run()) {
      log_info("no checkpoint in " + folder_->path() + " yet: starting at step 0");
    }
    start_metrics(checkpoint.value_or(""));
  }
  console_.emplace(options_.quiet || !leads() ? "off" : config_.log.console);
  share_state();
}

/// Files of the run's course, cut to where it goes on. checkpoint: "" at a start.
void Trainer::Impl::start_metrics(const std::string& checkpoint) {
  try {
    write_run_header(*folder_, config_, options_.command, models::count_parameters(config_.model));
    truncate_jsonl(folder_->file("metrics.jsonl"), state_.step);
    truncate_jsonl(folder_->file("samples.jsonl"), state_.step);
  } catch (const std::system_error& error) {
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder_->path() + ": cannot be written: " + error.what());
  }
  jsonl_.emplace(folder_->file("metrics.jsonl"));
  const bool resumed = !checkpoint.empty();
  write_event(resumed ? "resume" : "start", state_.step,
              {{"checkpoint", checkpoint}, {"command", options_.command}});
  if (config_.log.tensorboard && !finished())
    tensorboard_.emplace(folder_->file("tensorboard"), resumed ? state_.step + 1 : 0);
  samples_.emplace(config_, folder_->file("samples.jsonl"));
}

/// Weights, optimizer and counters of process 0, which alone reads checkpoints, for all.
void Trainer::Impl::share_state() {
  if (group_->place().alone()) return;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : named_model_tensors(*model_)) tensors.push_back(tensor);
  for (const auto& [name, tensor] : optimizer_->state()) tensors.push_back(tensor);
  const at::Tensor counters = at::tensor(
      {state_.step, state_.tokens, state_.samples_consumed, state_.skipped_updates}, at::kLong);
  tensors.push_back(counters);
  group_->broadcast(tensors);
  const int64_t* numbers = counters.const_data_ptr<int64_t>();
  state_.step = numbers[0], state_.tokens = numbers[1];
  state_.samples_consumed = numbers[2], state_.skipped_updates = numbers[3];
}

/// With several processes the random numbers of a step are a function of the seed, the step and the process: a
/// checkpoint need not hold a stream of each.
void Trainer::Impl::seed_own_stream() {
  const ProcessPlace& place = group_->place();
  if (place.alone()) return;
  const int64_t draw = state_.step * place.size + place.rank + 1;
  const uint64_t seed = static_cast<uint64_t>(config_.run.seed) + 0x9E3779B97F4A7C15U * draw;
  for (at::Generator generator : generators()) generator.set_current_seed(seed);
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
  if (!leads()) return;
  const double count = static_cast<double>(models::count_parameters(config_.model));
  log_info("run " + folder_->path() + " | " + format_count(count) + " parameters | " +
           describe(device_) +
           (group_->place().alone()
                ? ""
                : " in each of " + std::to_string(group_->place().size) + " processes") +
           " | " + config_.train.dtype);
  log_info("data " + describe_data(config_, data_, total_steps_) + " | " +
           std::to_string(total_steps_) + " steps of " + format_thousands(tokens_per_step()) +
           " tokens");
}

ExitCode Trainer::Impl::train() {
  const ProcessPlace& place = group_->place();
  const int64_t global = config_.train.global_batch_size, share = global / place.size;
  train_step_.emplace(*model_, *optimizer_, config_, &*group_);
  Prefetcher prefetcher(*data_.train, state_.samples_consumed + place.rank * share, share,
                        !device_.is_cpu(), global);
  while (!finished()) {
    one_step(prefetcher);                                           // 1 to 7
    if (due(config_.eval.every) && !finished()) evaluate_now();     // 8
    if (due(config_.sample.every) && !finished()) write_samples();  // 9
    if (due(config_.ckpt.every) && !finished()) save();             // 10
    failpoint("trainer.step_end", state_.step);
    if (failpoint_at("trainer.raise_sigterm", state_.step)) std::raise(SIGTERM);
    if (const char* signal = stop_agreed()) return stop(signal);  // 11
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
  seed_own_stream();
  const auto result = train_step_->run(*batch, state_.step + 1, state_.samples_consumed);
  if (result && !result->finite) handle_non_finite(*result);
  ++state_.step;
  state_.samples_consumed += config_.train.global_batch_size;
  state_.tokens += config_.train.global_batch_size * batch->host.seq_len;
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
      "step " + std::to_string(result.step) + ": loss " + format_number("%g", result.loss) +
      ", gradient norm " + format_number("%g", result.grad_norm) + ", first bad gradient: " +
      (result.bad_parameter.empty() ? "none alone" : result.bad_parameter) + ", samples " +
      std::to_string(result.first_sample) + " to " + std::to_string(result.last_sample);
  if (config_.train.nonfinite != "skip") {
    write_event("nonfinite", result.step, {{"message", what}});
    throw Error(ExitCode::kNonFinite,
                what +
                    "; nothing was updated. Lower optim.learning_rate, lengthen "
                    "optim.warmup_steps, or skip such steps with train.nonfinite=skip");
  }
  ++state_.skipped_updates;
  if (!leads()) return;
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
  write_metrics(result.step, metrics);
  timer_.restart_means();
}

void Trainer::Impl::evaluate_now() {
  settle();
  if (data_.held_out == nullptr) return;
  const int64_t batch = micro_batch(config_, group_->place().size);
  const bool progress = console_->has_bar();
  if (progress) console_->finish();
  evaluation_ = evaluate(*model_, *data_.held_out, batch, config_.eval.batches,
                         config_.train.dtype == "bfloat16", progress, nullptr, &*group_);
  evaluated_step_ = state_.step;
  log_info("step " + std::to_string(state_.step) + " | " + held_out_line(evaluation_));
  write_metrics(state_.step, held_out_metrics(evaluation_));
}

void Trainer::Impl::write_samples() {
  settle();
  if (samples_) samples_->write(*model_, state_.step);
}

/// Saves this step, which process 0 does for all.
void Trainer::Impl::save() {
  settle();
  if (!group_->any(saved_step_ != state_.step)) return;
  check_weights();
  if (!leads()) {
    saved_step_ = state_.step;
  } else if (saved_step_ != state_.step) {
    write_checkpoint();
  }
}

/// Of what is to be saved: finite, and the same in all processes.
void Trainer::Impl::check_weights() {
  if (const std::string bad = first_non_finite(named_parameters(*model_)); !bad.empty()) {
    throw Error(ExitCode::kNonFinite,
                "step " + std::to_string(state_.step) + ": parameter " + bad +
                    " is not finite after the update; no checkpoint of it is written. Lower "
                    "optim.learning_rate and run the same command again");
  }
  if (group_->place().alone()) return;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> sums;
  for (const auto& [name, parameter] : named_parameters(*model_))
    sums.push_back(parameter.sum(at::kDouble));
  const double own = at::stack(sums).sum().item<double>();
  const at::Tensor first = at::scalar_tensor(own, at::kDouble);
  group_->broadcast({first});
  if (group_->any(first.item<double>() != own))
    throw Error(ExitCode::kPeer,
                "step " + std::to_string(state_.step) +
                    ": the processes' weights have come apart; no checkpoint of it "
                    "is written. One of the GPUs or its links computes wrongly, or "
                    "they are of different kinds; run the same command again");
}

/// A full disk or a lost file system is survived until it happened ckpt.max_failed_saves times in a row; the checkpoint
/// of the last step must succeed.
void Trainer::Impl::write_checkpoint() {
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
    write_metrics(state_.step, metrics);
    const bool last = finished() || stopping_;
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
  write_metrics(state_.step, metrics);
}

void Trainer::Impl::write_event(const std::string& name, int64_t step,
                                const std::vector<std::pair<std::string, std::string>>& fields) {
  if (jsonl_) jsonl_->write_event(name, step, fields);
}

void Trainer::Impl::write_metrics(int64_t step, const Metrics& metrics) {
  if (jsonl_) jsonl_->write_metrics(step, metrics);
  if (tensorboard_) tensorboard_->write_metrics(step, metrics);
}

/// The signal that asked this process or another one to stop; null where none has. All stop after the same step.
const char* Trainer::Impl::stop_agreed() {
  const char* signal = stop_requested();
  if (!group_->any(signal != nullptr)) return nullptr;
  return signal != nullptr ? signal : "a signal to another process";
}

ExitCode Trainer::Impl::stop(const char* signal) {
  console_->finish();
  stopping_ = true;
  save();
  write_event("stop", state_.step, {{"signal", signal}});
  log_info(std::string("stopped by ") + signal + " at step " + std::to_string(state_.step) +
           " of " + std::to_string(total_steps_) +
           ", everything is saved; to go on, run the same command again: " + options_.command);
  return ExitCode::kPreempted;
}

ExitCode Trainer::Impl::finish() {
  console_->finish();
  group_->barrier();  // none leaves while another one is still at work
  write_event("end", state_.step);
  if (leads()) print_result();
  return ExitCode::kOk;
}

void Trainer::Impl::print_result() const {
  if (config_.log.plot) draw_loss_plot(folder_->path());
  log_info("run folder: " + folder_->path() + " | checkpoint of step " +
           std::to_string(saved_step_) + " in ckpt/");
  if (evaluated_step_ < 0) {
    print_line("final training loss: " +
               format_number("%.4f", last_value(folder_->file("metrics.jsonl"), "train/loss")));
  } else {
    print_line(held_out_result(evaluation_));
  }
}

}  // namespace xlstm::train
