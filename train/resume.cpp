// Which checkpoint a run goes on from, and whether its settings allow that.
#include <filesystem>
#include <system_error>

#include "csrc/config/schema.h"
#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "train/checkpoint.h"
#include "train/held_out.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/run_folder.h"
#include "train/schedule.h"
#include "train/training_data.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

CheckpointFolder choose_newest_good(const std::string& folder, bool verify) {
  try {
    return find_checkpoint(folder, verify, log_warning);
  } catch (const Error& error) {
    throw Error(error.code, "run folder " + std::string(error.what()) +
                                "; start over with --fresh, which keeps the old folder beside it");
  }
}

CheckpointFolder choose_named(const std::string& folder,
                              const std::vector<std::string>& checkpoints, const std::string& name,
                              bool verify) {
  const int64_t step = checkpoint_step(name);
  std::string known;
  for (const std::string& checkpoint : checkpoints) {
    if (checkpoint_step(checkpoint) == step && step >= 0)
      return open_checkpoint(checkpoint, verify);
    known += (known.empty() ? "" : ", ") + fs::path(checkpoint).filename().string();
  }
  throw Error(ExitCode::kCheckpoint, "run folder " + folder + ": no checkpoint " + name +
                                         "; there is " + (known.empty() ? "none" : known));
}

struct Difference {
  std::string name, a, b;
};

/// Of the settings that `counts` picks. Copies, because a field refers to what could be written.
template <class Counts>
std::optional<Difference> first_difference(config::Config a, config::Config b,
                                           const Counts& counts) {
  for (const config::Field& field : config::schema()) {
    if (!counts(field)) continue;
    Difference found{field.name, config::format_value(field.ref(a)),
                     config::format_value(field.ref(b))};
    if (found.a != found.b) return found;
  }
  return std::nullopt;
}

bool is_other_held_out(const TrainerState& saved, const TrainingData& data) {
  const std::string fingerprint = data.held_out ? data.held_out->fingerprint() : "";
  return !fingerprint.empty() && !saved.held_out_fingerprint.empty() &&
         fingerprint != saved.held_out_fingerprint;
}

void warn_of_other_held_out(const config::Config& now, const config::Config& saved,
                            const std::string& checkpoint) {
  const auto changed = first_difference(
      now, saved, [](const config::Field& field) { return field.name.starts_with("data.val"); });
  log_warning("the held-out set is another one than " + checkpoint + " was judged by (" +
              (changed ? changed->name + ": " + changed->a + " now, " + changed->b + " then"
                       : "its text has changed") +
              "): what it is judged by from here on does not compare with the evaluations before");
}

/// The best evaluation up to the step of `saved`, by the held-out sequences of this start.
BestEvaluation best_evaluation(const config::Config& now, const config::Config& then,
                               const TrainerState& saved, const TrainingData& data) {
  const bool same_number = now.eval.batches == then.eval.batches;
  BestEvaluation best =
      same_number && !is_other_held_out(saved, data) ? saved.best : BestEvaluation();
  if (!data.held_out || !same_number) return best;
  const auto recorded =
      recorded_held_out(run_path(now.run) + "/metrics.jsonl", saved.step,
                        data.held_out->fingerprint(), /*unnamed=*/saved.held_out_fingerprint);
  if (recorded) best.count(saved.step, recorded->loss);
  return best;
}

/// Whether the last start had all the settings of this one, which it wrote down.
bool repeats_last_start(const std::string& folder, const config::Config& config) {
  const std::string recorded = folder + "/config.yaml";
  return fs::exists(recorded) && read_file(recorded) == config::print_config(config);
}

}  // namespace

std::optional<CheckpointFolder> choose_checkpoint(const config::Config& config, bool held_run) {
  const std::string& resume = config.run.resume;
  const std::string folder = run_path(config.run);
  if (resume == "never") {
    if (!held_run) return std::nullopt;
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder +
                    ": holds a run, and run.resume is never; go on with run.resume=auto, or start "
                    "over with --fresh, which keeps the old folder beside it");
  }
  const std::vector<std::string> checkpoints = list_checkpoints(folder);
  if (checkpoints.empty() && resume == "auto") return std::nullopt;
  if (resume != "auto") {
    const bool is_newest =
        checkpoints.empty() || checkpoint_step(checkpoints.back()) <= checkpoint_step(resume);
    if (is_newest || !repeats_last_start(folder, config))
      return choose_named(folder, checkpoints, resume, config.ckpt.verify_on_load);
    log_info("the last start was this one, from " + resume + ": going on where it stopped");
  }
  return choose_newest_good(folder, config.ckpt.verify_on_load);
}

void set_aside_later_checkpoints(const RunFolder& folder, int64_t step) {
  const fs::path root = folder.file("ckpt");
  try {
    std::vector<fs::path> later;
    for (const auto& entry : fs::directory_iterator(root))
      if (checkpoint_step(entry.path()) > step && fs::exists(entry.path() / kManifestName))
        later.push_back(entry.path());
    if (later.empty()) return;
    fs::path target;
    for (int number = 1; target.empty(); ++number) {
      const fs::path name = root / ("old-" + std::to_string(number));
      if (!fs::exists(name) && fs::create_directory(name)) target = name;
    }
    const fs::path best = root / kBestName;  // a later checkpoint of this name would be another one
    for (const fs::path& checkpoint : later) {
      if (fs::is_symlink(best) && fs::read_symlink(best) == checkpoint.filename()) fs::remove(best);
      fs::rename(checkpoint, target / checkpoint.filename());
      log_info("set aside " + checkpoint.string() + " in " + target.string());
    }
  } catch (const std::system_error& error) {
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder.path() + ": the checkpoints behind step " +
                    std::to_string(step) + " cannot be set aside within " + root.string() + ": " +
                    error.code().message() + "; make it writable, or move them away yourself");
  }
}

void check_same_run(const config::Config& now, const config::Config& saved,
                    const std::string& saved_in) {
  const auto counts = [](const config::Field& field) { return field.identity; };
  if (const auto found = first_difference(now, saved, counts))
    throw Error(ExitCode::kConfig, found->name + ": " + found->a + " now, but the run in " +
                                       saved_in + " was trained with " + found->b +
                                       "; put it back, or start over with --fresh");
}

TrainerState state_to_go_on(const CheckpointFolder& checkpoint, const config::Config& config,
                            TrainingData& data) {
  // Settings first: their message says more than a shape that does not fit.
  const config::Config saved = checkpoint_config(checkpoint);
  check_same_run(config, saved, checkpoint.path);
  std::optional<TrainerState> state = checkpoint_state(checkpoint);
  if (!state || !checkpoint.holds(kOptimizerName))
    throw Error(ExitCode::kCheckpoint,
                checkpoint.path +
                    ": holds a model without optimizer state, which cannot go on; "
                    "name it as train.init_from of a run with another run.name");
  const std::string fingerprint = data.train->fingerprint();
  if (!data.train->take_order_of(state->data_fingerprint))
    throw Error(ExitCode::kConfig,
                "data: the training data is not that of " + checkpoint.path + " (fingerprint " +
                    state->data_fingerprint + ", now " + fingerprint +
                    "); put the data back, start over with --fresh, or choose another run.name");
  if (data.train->fingerprint() != fingerprint)
    log_info("the samples keep the order of the earlier version that this run began with");
  if (is_other_held_out(*state, data)) warn_of_other_held_out(config, saved, checkpoint.path);
  state->best = best_evaluation(config, saved, *state, data);
  return *state;
}

bool is_finished(const config::Config& config, const TrainerState& state) {
  return state.step >= total_steps(config) ||
         (config.eval.patience > 0 && state.best.evaluations_since >= config.eval.patience);
}

std::string changed_settings(const config::Config& now, const config::Config& saved, int64_t step) {
  std::string changed;
  const auto tell = [&changed](const std::string& name, const std::string& then,
                               const std::string& here) {
    if (then != here) changed += (changed.empty() ? "" : ", ") + name + " " + then + " -> " + here;
  };
  config::Config a = saved, b = now;  // a field refers to what could be written
  for (const config::Field& field : config::schema())
    if (!field.per_machine && !field.name.starts_with("run.") && !field.name.starts_with("log."))
      tell(field.name, config::format_value(field.ref(a)), config::format_value(field.ref(b)));
  const auto rate = [](const config::Config& config, int64_t at) {
    return format_number("%.3g", learning_rate(config.optim, at, total_steps(config)));
  };
  if (!changed.empty() && step > 0 && step < total_steps(now))
    tell("learning rate", rate(saved, std::min(step, total_steps(saved))), rate(now, step + 1));
  return changed;
}

std::string differing_setting(const config::Config& own, const config::Config& leader) {
  const auto counts = [](const config::Field& field) { return !field.per_machine; };
  const auto found = first_difference(own, leader, counts);
  return found ? found->name + ": " + found->a + " here, " + found->b + " in process 0" : "";
}

}  // namespace xlstm::train
