#include "train/saver.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>

#include <system_error>
#include <utility>
#include <vector>

#include "csrc/core/error.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/random_streams.h"
#include "train/run_folder.h"
#include "train/step_timer.h"
#include "train/train_step.h"

namespace xlstm::train {
namespace {

std::string format_mib(int64_t bytes) {
  return format_number("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
}

}  // namespace

Saver::Saver(const config::Config& config, std::string run_dir, const models::LanguageModel& model,
             const AdamW& optimizer, const CarriedState* carried, at::Device device,
             ProcessGroup& group, Recorder& recorder)
    : config_(config),
      run_dir_(std::move(run_dir)),
      tokenizer_(run_dir_.empty() ? TokenizerFiles() : read_tokenizer(config.data.tokenizer)),
      model_(model),
      optimizer_(optimizer),
      carried_(carried),
      device_(device),
      group_(group),
      recorder_(recorder) {}

/// Weights, the two moments of the optimizer and what all processes carry.
int64_t Saver::checkpoint_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, parameter] : named_parameters(model_))
    bytes += static_cast<int64_t>(parameter.nbytes()) * (parameter.requires_grad() ? 3 : 1);
  return bytes + (carried_ != nullptr ? group_.place().size * carried_->bytes() : 0);
}

void Saver::check_free_disk() const {
  if (!group_.place().leads()) return;
  const int64_t needed = checkpoint_bytes(), free_bytes = free_disk_bytes(run_dir_);
  if (free_bytes < 0 || free_bytes >= needed) return;
  log_warning(run_dir_ + ": " + format_mib(free_bytes) + " free, but one checkpoint needs " +
              format_mib(needed) + ": saves will fail");
}

/// A crash may have come between a save, the link to it and the deletion of what is not needed any more.
void Saver::go_on_from(const TrainerState& state) {
  saved_step_ = state.step;
  if (!config_.ckpt.keep_best) return;
  if (name_best(state.best.step)) {
    tidy(state.best.step);
  } else if (state.best.step >= 0) {
    log_info("the checkpoint of the lowest held-out loss, " +
             format_number("%.4f", state.best.loss) + " at step " +
             std::to_string(state.best.step) + ", was not kept: the next lower one will be");
  }
}

void Saver::save(const TrainerState& counters, bool last) {
  if (group_.any(saved_step_ != counters.step)) {
    check_weights(counters.step);
    const NamedTensors optimizer = optimizer_.state();  // of all processes
    const NamedTensors carried = carried_ != nullptr ? carried_->tensors() : NamedTensors();
    if (!group_.place().leads()) {
      saved_step_ = counters.step;
    } else if (saved_step_ != counters.step) {
      write(counters, optimizer, carried, last);
    }
  }
  if (group_.place().leads() && saved_step_ == counters.step) tidy(counters.best.step);
}

/// ckpt/best names another checkpoint before the one that it did may be deleted.
void Saver::tidy(int64_t best_step) {
  const int64_t best = config_.ckpt.keep_best ? best_step : -1;
  if (best >= 0) name_best(best);
  try {
    prune_checkpoints(run_dir_, config_.ckpt.keep_last, config_.ckpt.keep_every, best, log_warning);
  } catch (const std::system_error& error) {
    log_warning("old checkpoints are not deleted: " + std::string(error.what()));
  }
}

/// Whether ckpt/best names this step, as far as the file system can tell. Without links the checkpoint is kept all the same.
bool Saver::name_best(int64_t step) {
  try {
    return name_best_checkpoint(run_dir_, step);
  } catch (const std::system_error& error) {
    if (!told_of_no_link_)
      log_warning(run_dir_ + "/ckpt/best cannot be made a link to the best checkpoint: " +
                  error.code().message() + "; it is kept under its own name alone");
    told_of_no_link_ = true;
    return true;
  }
}

/// Of what is to be saved: finite, and the same in all processes, with as many updates.
void Saver::check_weights(int64_t step) {
  if (const std::string bad = first_non_finite(trained_parameters(model_)); !bad.empty()) {
    throw Error(ExitCode::kNonFinite,
                "step " + std::to_string(step) + ": parameter " + bad +
                    " is not finite after the update; no checkpoint of it is written. Lower "
                    "optim.learning_rate and run the same command again");
  }
  if (group_.place().alone()) return;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> sums;
  for (const auto& [name, parameter] : named_parameters(model_))
    sums.push_back(parameter.sum(at::kDouble));
  const double own = at::stack(sums).sum().item<double>() + static_cast<double>(optimizer_.steps());
  const at::Tensor first = at::scalar_tensor(own, at::kDouble);
  group_.broadcast({first});
  if (group_.any(first.item<double>() != own))
    throw Error(ExitCode::kPeer,
                "step " + std::to_string(step) +
                    ": the processes' weights have come apart; no checkpoint of it "
                    "is written. One of the GPUs or its links computes wrongly, or "
                    "they are of different kinds; run the same command again");
}

void Saver::write(TrainerState state, const NamedTensors& optimizer, const NamedTensors& carried,
                  bool last) {
  const double start = monotonic_seconds();
  double seconds = 0;
  store_random_streams(device_, state);
  try {
    const std::string folder =
        save_checkpoint(run_dir_, config_, model_, optimizer, state, tokenizer_, carried);
    saved_step_ = state.step;
    failed_saves_in_a_row_ = 0;
    seconds = monotonic_seconds() - start;
    log_debug("saved " + folder);
  } catch (const std::system_error& error) {
    survive(state.step, error.what(), last);
    return;
  }
  recorder_.write_metrics(state.step, {{"ckpt/save_s", seconds}});
}

/// Counts a save that has failed, and throws where that was one too many.
void Saver::survive(int64_t step, const std::string& problem, bool last) {
  ++failed_saves_;
  if (std::exchange(failed_step_, step) != step) ++failed_saves_in_a_row_;  // tried again: once
  const int64_t free_bytes = free_disk_bytes(run_dir_);
  const std::string room = free_bytes < 0 ? "is the run's folder still there?"
                                          : "about " + format_mib(checkpoint_bytes()) +
                                                " needed, " + format_mib(free_bytes) + " free";
  const std::string what =
      "checkpoint of step " + std::to_string(step) + " not saved: " + problem + " (" + room + ")";
  recorder_.write_metrics(step, {{"ckpt/failed", static_cast<double>(failed_saves_)}});
  if (last || failed_saves_in_a_row_ >= config_.ckpt.max_failed_saves) {
    throw Error(ExitCode::kCheckpoint,
                what +
                    (last ? "; the run ends without it"
                          : ", " + std::to_string(failed_saves_in_a_row_) + " times in a row") +
                    "; " + (free_bytes < 0 ? "put it back" : "free the disk") +
                    " and run the same command again");
  }
  log_warning(what + "; training goes on, the last good checkpoint is " +
              (saved_step_ >= 0 ? "that of step " + std::to_string(saved_step_) : "none yet"));
}

}  // namespace xlstm::train
