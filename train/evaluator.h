#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "csrc/config/config.h"
#include "csrc/data/batch.h"
#include "csrc/models/language_model.h"
#include "train/checkpoint.h"
#include "train/distributed.h"
#include "train/evaluation.h"
#include "train/recorder.h"

namespace xlstm::train {

/// Judges a run by its held-out data while it trains, and keeps account of its best evaluation, by which ckpt.keep_best
/// and eval.patience go. What it refers to must outlive it.
class Evaluator {
 public:
  /// data: null where nothing is held out.
  Evaluator(const config::Config& config, models::LanguageModel& model,
            const data::HeldOutSet* data, ProcessGroup& group, Recorder& recorder);

  /// Takes over what a run's metrics tell of an evaluation at the step of `state`, from which it goes on. Of the process
  /// that leads; share() tells the others.
  void recall(const std::string& metrics, const TrainerState& state);
  void share();

  /// Whether held-out data has not judged this step yet.
  bool lacks(int64_t step) const { return data_ != nullptr && step_ != step; }
  /// Where it lacks(state.step): evaluates, tells and records it, and counts it in state.best, alike in all processes.
  /// stop_if_asked: called by all of them after each batch; what it throws ends the evaluation.
  void evaluate(TrainerState& state, const std::function<void()>& stop_if_asked);

  /// The last evaluation, of which recall() knows all but its number of tokens; null where there was none.
  const EvaluationResult* result() const { return step_ >= 0 ? &result_ : nullptr; }

 private:
  const config::Config& config_;
  models::LanguageModel& model_;
  const data::HeldOutSet* data_;
  ProcessGroup& group_;
  Recorder& recorder_;
  int64_t step_ = -1;  ///< of the last evaluation
  EvaluationResult result_;
};

/// "no lower held-out loss in 3 evaluations"
std::string patience_text(const BestEvaluation& best);
/// "1.2345 at step 40, runs/a/ckpt/best", of a run that had a finite loss.
std::string describe_best(const BestEvaluation& best, const std::string& run_dir);

}  // namespace xlstm::train
