#include "train/evaluator.h"

#include <ATen/ops/scalar_tensor.h>

#include <algorithm>

#include "train/held_out.h"
#include "train/log.h"
#include "train/schedule.h"

namespace xlstm::train {

Evaluator::Evaluator(const config::Config& config, models::LanguageModel& model,
                     const data::HeldOutSet* data, ProcessGroup& group, Recorder& recorder)
    : config_(config), model_(model), data_(data), group_(group), recorder_(recorder) {}

void Evaluator::recall(const std::string& metrics, const TrainerState& state) {
  if (data_ == nullptr) return;
  const auto recorded = recorded_held_out(metrics, state.step, data_->fingerprint(),
                                          /*unnamed=*/state.held_out_fingerprint);
  if (recorded) result_ = *recorded, step_ = state.step;
}

void Evaluator::share() {
  const at::Tensor step = at::scalar_tensor(step_, at::kLong);
  group_.broadcast({step});
  step_ = step.item<int64_t>();
}

void Evaluator::evaluate(TrainerState& state, const std::function<void()>& stop_if_asked) {
  const bool progress = recorder_.console().has_bar();
  if (progress) recorder_.console().finish();
  const int64_t windows = config_.eval.batches * config_.train.global_batch_size;
  // Windows are whole in a process, whatever shares the sequences of a step.
  const int64_t batch = micro_batch(config_, group_.place().size);
  result_ =
      train::evaluate(model_, *data_, std::max<int64_t>(1, batch / config_.train.sequence_parallel),
                      {.max_windows = windows,
                       .bfloat16 = config_.train.dtype == "bfloat16",
                       .show_progress = progress,
                       .processes = &group_,
                       .after_batch = stop_if_asked});
  step_ = state.step;
  log_info("step " + std::to_string(step_) + " | " + held_out_line(result_));
  recorder_.write_metrics(step_, held_out_metrics(result_), data_->fingerprint());
  const at::Tensor loss = at::scalar_tensor(result_.loss, at::kDouble);
  group_.broadcast({loss});  // of one number all decide alike
  state.best.count(step_, loss.item<double>());
}

std::string patience_text(const BestEvaluation& best) {
  return "no lower held-out loss in " + std::to_string(best.evaluations_since) + " evaluations";
}

std::string describe_best(const BestEvaluation& best, const std::string& run_dir) {
  const std::string path = best_checkpoint(run_dir, best.step);
  return format_number("%.4f", best.loss) + " at step " + std::to_string(best.step) + ", " +
         (path.empty() ? "whose checkpoint was not kept (ckpt.keep_best)" : path);
}

}  // namespace xlstm::train
