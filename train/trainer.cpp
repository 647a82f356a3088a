#include "train/trainer.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <vector>

#include "train/checkpoint.h"
#include "train/device.h"
#include "train/distributed.h"
#include "train/evaluator.h"
#include "train/failpoint.h"
#include "train/first_weights.h"
#include "train/held_out.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/peers.h"
#include "train/plot.h"
#include "train/random_streams.h"
#include "train/recorder.h"
#include "train/run_folder.h"
#include "train/samples.h"
#include "train/saver.h"
#include "train/schedule.h"
#include "train/sharded_weights.h"
#include "train/signals.h"
#include "train/step_timer.h"
#include "train/train_step.h"
#include "train/training_data.h"

namespace xlstm::train {

namespace fs = std::filesystem;

class Trainer::Impl {
 public:
  Impl(const config::Config& config, const TrainerOptions& options)
      : config_(config), options_(options), total_steps_(total_steps(config)) {}
  ExitCode run();

 private:
  void open();
  void open_run_folder();
  void start_over();
  void open_data();
  void resume_or_start();
  std::string start();
  /// What a checkpoint holds beside weights and counters.
  struct Resumed {
    NamedTensors optimizer, carried;
    std::string changed;  ///< settings that are others now, for people
  };
  Resumed load(const CheckpointFolder& checkpoint);
  void start_files(const std::string& checkpoint, const std::string& first_weights,
                   const std::string& changed = "");
  bool is_complete() const;
  void share_state(const Resumed& resumed);
  std::string describe_processes() const;
  void announce() const;
  void train();
  void one_step(Prefetcher& prefetcher);
  void settle();
  void handle_non_finite(const StepResult& result);
  void save(bool last);
  void report();
  void evaluate_now();
  void write_samples();
  void stop_if_asked() { stop_together(*group_); }
  ExitCode stop(const char* signal);
  ExitCode finish();
  void print_result() const;
  bool leads() const { return group_->place().leads(); }
  /// What looks at the weights outside a step keeps it meanwhile.
  ShardedWeights::Whole whole_weights() {
    return ShardedWeights::Whole(sharded_ ? &*sharded_ : nullptr);
  }
  bool due(int64_t every) const {
    return finished() || (every > 0 && state_.step > 0 && state_.step % every == 0);
  }
  bool finished() const { return is_finished(config_, state_); }
  bool ends_early() const { return finished() && state_.step < total_steps_; }

  config::Config config_;
  TrainerOptions options_;
  int64_t total_steps_;
  BatchShare share_{};
  std::optional<ProcessGroup> group_;
  std::optional<RunFolder> folder_;  ///< of the process that leads, as all that writes
  TrainingData data_;
  std::shared_ptr<models::LanguageModel> model_;
  at::Device device_ = at::kCPU;
  std::optional<ShardedWeights> sharded_;  ///< with train.shard_weights and several processes
  std::optional<AdamW> optimizer_;
  std::optional<Recorder> recorder_;
  std::optional<Saver> saver_;
  std::optional<TrainStep> train_step_;
  std::optional<Evaluator> evaluator_;
  TrainerState state_;
  std::optional<SampleWriter> samples_;
  StepTimer timer_;
};

Trainer::Trainer(const config::Config& config, const TrainerOptions& options)
    : impl_(std::make_unique<Impl>(config, options)) {}
Trainer::~Trainer() { close_log_file(); }
ExitCode Trainer::run() { return impl_->run(); }

ExitCode Trainer::Impl::run() {
  try {
    open();
    resume_or_start();
    announce();
    report();  // what an earlier process did not come to
    train();
  } catch (const Stopped& stopped) {
    return stop(stopped.signal);
  }
  return finish();
}

/// Everything that can fail for outer reasons comes before the first step.
void Trainer::Impl::open() {
  const ProcessPlace place = place_from_environment();
  share_ = share_of_batch(config_, place);
  if (!place.leads()) set_console_verbosity(Verbosity::kQuiet);
  if (config_.run.device != "cpu") take_own_gpu(place);
  device_ = choose_device(config_.run.device, "run.device");
  use_own_stream(device_);
  if (config_.run.num_threads > 0) at::set_num_threads(static_cast<int>(config_.run.num_threads));
  group_.emplace(place, device_, throw_if_stop_requested);
  check_same_settings(*group_, config_);
  if (leads()) open_run_folder();
  open_data();
  if (leads()) samples_.emplace(config_, folder_->file("samples.jsonl"));

  seed_random_streams(device_, static_cast<uint64_t>(config_.run.seed));
  model_ = make_model(config_, device_);
  model_->train();
  if (config_.train.shard_weights && !place.alone()) sharded_.emplace(*model_, *group_);
  ShardedWeights* const sharded = sharded_ ? &*sharded_ : nullptr;
  optimizer_.emplace(trained_parameters(*model_), config_.optim, &*group_, sharded);
  recorder_.emplace(config_, total_steps_, device_,
                    options_.quiet || !leads() ? "off" : config_.log.console);
  train_step_.emplace(*model_, *optimizer_, config_, &*group_, sharded);
  saver_.emplace(config_, leads() ? folder_->path() : "", *model_, *optimizer_,
                 train_step_->carried(), device_, *group_, *recorder_);
  saver_->check_free_disk();
  evaluator_.emplace(config_, *model_, data_.held_out.get(), *group_, *recorder_);
}

void Trainer::Impl::open_run_folder() {
  // Weights that cannot be had stop a run before data is prepared.
  check_adapters(config_);
  if (takes_first_weights(config_, options_.fresh)) check_first_weights(config_, /*verify=*/false);
  folder_.emplace(config_.run, options_.fresh);
  if (!options_.fresh) open_log_file(folder_->file("run.log"));
}

void Trainer::Impl::start_over() {
  const std::string moved_to = folder_->start_over();
  open_log_file(folder_->file("run.log"));
  if (!moved_to.empty()) log_info("moved the earlier run to " + moved_to);
}

/// Process 0 prepares data.text; the others then find it in the cache.
void Trainer::Impl::open_data() {
  work_alone(*group_, [&](const auto& poll) { data_ = open_training_data(config_, poll); });
  if (!leads()) {
    try {
      data_ = open_training_data(config_, throw_if_stop_requested);
    } catch (const Stopped&) {  // all processes stop together, here
    }
  }
  stop_if_asked();
  check_same_data(*group_, data_);
}

void Trainer::Impl::resume_or_start() {
  auto whole = whole_weights();
  state_.data_fingerprint = data_.train->fingerprint();
  Resumed resumed;
  if (leads()) {
    const std::optional<CheckpointFolder> checkpoint =
        options_.fresh ? std::nullopt : choose_checkpoint(config_, folder_->held_run());
    if (checkpoint) {
      resumed = load(*checkpoint);
      set_aside_later_checkpoints(*folder_, state_.step);
      saver_->go_on_from(state_);
      if (!config_.train.init_from.empty())
        log_info("train.init_from is not read: this run goes on from its own checkpoint");
      start_files(checkpoint->path, recorded_first_weights(*folder_), resumed.changed);
    } else {
      start_files("", start());
    }
  }
  if (data_.held_out) state_.held_out_fingerprint = data_.held_out->fingerprint();
  share_state(resumed);
  whole.keep_changes();
}

/// At step 0; returns which weights the model starts with. An earlier run is moved aside when nothing can stop this one any
/// more.
std::string Trainer::Impl::start() {
  const std::optional<CheckpointFolder> given = load_first_weights(*model_, config_);
  if (options_.fresh) start_over();
  if (folder_->held_run())
    log_info("no checkpoint in " + folder_->path() + " yet: starting at step 0");
  if (!given) return "";
  warn_of_other_settings(*given, config_.model, log_warning);
  log_info("starting with the weights of " + describe(*given));
  return describe(*given);
}

/// Files of the run's course, cut to where it goes on. checkpoint: "" at a start. changed: settings, where it goes on.
void Trainer::Impl::start_files(const std::string& checkpoint, const std::string& first_weights,
                                const std::string& changed) {
  const std::string metrics = folder_->file("metrics.jsonl");
  try {
    fs::create_directory(folder_->file("ckpt"));
    truncate_jsonl(metrics, state_.step);
    truncate_jsonl(folder_->file("samples.jsonl"), state_.step);
    evaluator_->recall(metrics, state_);
    if (is_complete()) return;
    write_run_header(*folder_, config_, options_.command, models::count_parameters(config_.model),
                     first_weights);
  } catch (const std::system_error& error) {
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder_->path() + ": cannot be written: " + error.what());
  }
  recorder_->open_files(*folder_, state_.step, checkpoint, first_weights, changed,
                        options_.command);
}

/// Whether the files of a finished run tell all that it has to tell: then they are left as they are.
bool Trainer::Impl::is_complete() const {
  if (!finished() || samples_->lacks(state_.step) || evaluator_->lacks(state_.step)) return false;
  const auto lines = lines_of_step(folder_->file("metrics.jsonl"), state_.step);
  return std::any_of(lines.begin(), lines.end(),
                     [](const auto& line) { return line.value("event", "") == "end"; });
}

/// Weights, optimizer, carried states and counters of process 0, which alone reads the run's files,
/// for all. resumed: in process 0.
void Trainer::Impl::share_state(const Resumed& resumed) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : named_model_tensors(*model_)) tensors.push_back(tensor);
  BestEvaluation& best = state_.best;
  const at::Tensor counters =
      at::tensor({state_.step, state_.tokens, state_.samples_consumed, state_.skipped_updates,
                  best.step, best.evaluations_since, best.last_step},
                 at::kLong);
  const at::Tensor lowest = at::scalar_tensor(best.loss, at::kDouble);
  tensors.insert(tensors.end(), {counters, lowest});
  group_->broadcast(tensors);
  const int64_t* numbers = counters.const_data_ptr<int64_t>();
  state_.step = numbers[0], state_.tokens = numbers[1];
  state_.samples_consumed = numbers[2], state_.skipped_updates = numbers[3];
  best = {numbers[4], lowest.item<double>(), numbers[5], numbers[6]};
  evaluator_->share();
  state_.data_fingerprint = group_->broadcast(state_.data_fingerprint);
  data_.train->take_order_of(state_.data_fingerprint);
  if (state_.step == 0) return;
  optimizer_->load_state(resumed.optimizer);
  if (CarriedState* carried = train_step_->carried()) carried->load(resumed.carried);
}

/// Returns what share_state() takes.
Trainer::Impl::Resumed Trainer::Impl::load(const CheckpointFolder& checkpoint) {
  const TrainerState state = state_to_go_on(checkpoint, config_, data_);
  Resumed resumed{checkpoint_optimizer(checkpoint), checkpoint_carried(checkpoint),
                  changed_settings(config_, checkpoint_config(checkpoint), state.step)};
  optimizer_->check_state(resumed.optimizer);
  if (const CarriedState* carried = train_step_->carried()) carried->check(resumed.carried);
  load_weights(*model_, checkpoint);
  state_ = state;
  restore_random_streams(device_, state_);
  log_info("resumed from " + checkpoint.path);
  if (!resumed.changed.empty()) log_info("changed since then: " + resumed.changed);
  return resumed;
}

/// What several processes have, each.
std::string Trainer::Impl::describe_processes() const {
  std::string text = " in each of " + std::to_string(group_->place().size) + " processes";
  if (share_.segments > 1)
    text +=
        " | segments of " + format_thousands(config_.data.seq_len / share_.segments) + " tokens";
  if (sharded_) text += " | weights in parts";
  if (config_.optim.shard || sharded_)
    text += " | " +
            format_number("%.1f MiB", static_cast<double>(optimizer_->bytes()) / (1 << 20)) +
            " of the optimizer's state in each";
  return text;
}

void Trainer::Impl::announce() const {
  if (!leads()) return;
  config::warn_of_settings_without_effect(config_, log_warning);
  const double count = static_cast<double>(models::count_parameters(config_.model));
  log_info("run " + folder_->path() + " | " + format_count(count) + " parameters | " +
           describe(device_) + (group_->place().alone() ? "" : describe_processes()) + " | " +
           config_.train.dtype);
  log_info("data " + describe_data(config_, data_, total_steps_) + " | " +
           std::to_string(total_steps_) + " steps of " +
           format_thousands(tokens_per_step(config_)) + " tokens");
  if (finished())
    log_info("this run is finished: step " + std::to_string(state_.step) + " of " +
             std::to_string(total_steps_) +
             (ends_early() ? ", " + patience_text(state_.best) +
                                 "; train on with a larger eval.patience (0: off)"
                           : "; train on with a larger train.max_steps") +
             ", or start over with --fresh");
}

void Trainer::Impl::train() {
  if (finished()) return;
  Prefetcher prefetcher(*data_.train, state_.samples_consumed + share_.first, share_.sequences,
                        !device_.is_cpu(), config_.train.global_batch_size, share_.segment,
                        share_.segments);
  while (!finished()) {
    one_step(prefetcher);                           // 1 to 7
    if (due(config_.ckpt.every)) save(finished());  // 8: nothing that comes now can lose it
    failpoint("trainer.step_end", state_.step);
    if (failpoint_at("trainer.raise_sigterm", state_.step)) std::raise(SIGTERM);
    stop_if_asked();  // 9
    report();         // 10, 11
  }
}

void Trainer::Impl::one_step(Prefetcher& prefetcher) {
  timer_.begin_step();
  const std::unique_ptr<TrainBatch> batch = prefetcher.next();
  timer_.data_ready();
  seed_step_of_process(device_, config_.run.seed, state_.step, group_->place());
  const auto result = train_step_->run(*batch, state_.step + 1, state_.samples_consumed);
  if (result && !result->finite) handle_non_finite(*result);
  ++state_.step;
  state_.samples_consumed += config_.train.global_batch_size;
  state_.tokens += config_.train.global_batch_size * batch->host.seq_len;
  timer_.end_step();
  if (result) recorder_->log_step(*result, state_, timer_);
}

/// Takes the results that the GPU still owes: before anything that looks at the model or ends the run.
void Trainer::Impl::settle() {
  while (const auto result = train_step_->finish()) {
    if (!result->finite) handle_non_finite(*result);
    recorder_->log_step(*result, state_, timer_);
  }
}

void Trainer::Impl::handle_non_finite(const StepResult& result) {
  const std::string what =
      "step " + std::to_string(result.step) + ": loss " + format_number("%g", result.loss) +
      ", gradient norm " + format_number("%g", result.grad_norm) + ", first bad gradient: " +
      (result.bad_parameter.empty() ? "none alone" : result.bad_parameter) + ", samples " +
      std::to_string(result.first_sample) + " to " + std::to_string(result.last_sample);
  if (config_.train.nonfinite != "skip") {
    recorder_->write_event("nonfinite", result.step, {{"message", what}});
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

/// What is due at this step and not in the run's files yet.
void Trainer::Impl::report() {
  if (due(config_.eval.every) && evaluator_->lacks(state_.step)) evaluate_now();
  if (due(config_.sample.every)) write_samples();
}

/// Saves what was evaluated where it is the best so far, or the end: the weights are still those.
void Trainer::Impl::evaluate_now() {
  settle();
  {
    const auto whole = whole_weights();
    evaluator_->evaluate(state_, [this] { stop_if_asked(); });
  }
  const bool best = config_.ckpt.keep_best && state_.best.step == state_.step;
  if (best || finished()) save(finished());
  if (!ends_early()) return;
  const std::string why = patience_text(state_.best);
  log_info("step " + std::to_string(state_.step) + " | " + why +
           ": the run ends here (eval.patience)");
  recorder_->write_event("early_stop", state_.step, {{"message", why}});
}

void Trainer::Impl::write_samples() {
  settle();
  const auto whole = whole_weights();
  work_alone(*group_, [&](const auto& poll) { samples_->write(*model_, state_.step, poll); });
}

/// last: nothing comes after this step.
void Trainer::Impl::save(bool last) {
  settle();
  std::optional<ShardedWeights::Whole> whole;
  if (sharded_ && group_->any(saver_->saved_step() != state_.step)) whole.emplace(&*sharded_);
  saver_->save(state_, last);
}

ExitCode Trainer::Impl::stop(const char* signal) {
  std::string where = " before training began, nothing was to be saved";
  if (saver_) {  // else data was being prepared
    recorder_->console().finish();
    save(true);
    recorder_->write_event("stop", state_.step, {{"signal", signal}});
    where = " at step " + std::to_string(state_.step) + " of " + std::to_string(total_steps_) +
            ", everything is saved";
  }
  log_info(std::string("stopped by ") + signal + where +
           "; to go on, run the same command again: " +
           (saver_ ? options_.command_to_go_on : options_.command));
  return ExitCode::kPreempted;
}

ExitCode Trainer::Impl::finish() {
  recorder_->console().finish();
  group_->barrier();  // none leaves while another one is still at work
  recorder_->write_event("end", state_.step);
  if (leads()) print_result();
  return ExitCode::kOk;
}

void Trainer::Impl::print_result() const {
  if (config_.log.plot) draw_loss_plot(folder_->path());
  log_info("run folder: " + folder_->path() + " | checkpoint of step " +
           std::to_string(saver_->saved_step()) + " in ckpt/");
  const bool judged = config_.ckpt.keep_best || config_.eval.patience > 0;
  if (judged && state_.best.step >= 0)  // none was finite: -1
    log_info("lowest held-out loss: " + describe_best(state_.best, folder_->path()));
  if (const EvaluationResult* result = evaluator_->result()) {
    print_line(held_out_result(*result));
  } else {
    print_line("final training loss: " +
               format_number("%.4f", last_value(folder_->file("metrics.jsonl"), "train/loss")));
  }
}

}  // namespace xlstm::train
