#pragma once
#include <cstdint>
#include <string>

#include "csrc/config/config.h"
#include "csrc/models/language_model.h"
#include "train/optimizer.h"
#include "train/prefetch.h"

namespace xlstm::train {

struct StepResult {
  double loss = 0;       ///< mean over the unmasked targets of the whole batch, before the update
  double grad_norm = 0;  ///< global L2 norm before clipping
  double learning_rate = 0;
  bool finite = true;  ///< false: nothing was updated
  std::string
      bad_parameter;  ///< the first with a gradient that is not finite; "" where none or finite
};

/// One optimizer step: phases 2 (forward and backward per micro batch) to 6 (update). Gradients are
/// gone afterwards.
class TrainStep {
 public:
  TrainStep(models::LanguageModel& model, AdamW& optimizer, const config::Config& config);
  /// `step`: number of the update, from 1.
  StepResult run(const TrainBatch& batch, int64_t step);
  /// Phase 2 alone, for tests: leaves the gradients of the mean loss and returns that loss.
  double accumulate_gradients(const TrainBatch& batch);

 private:
  models::LanguageModel& model_;
  AdamW& optimizer_;
  const config::Config& config_;
  NamedTensors parameters_;
  int64_t total_steps_;
};

/// Named parameters of a model, in registration order.
NamedTensors named_parameters(const models::LanguageModel& model);
/// Name of the first tensor with an element that is not finite; "" where all are finite.
std::string first_non_finite(const NamedTensors& tensors);

}  // namespace xlstm::train
