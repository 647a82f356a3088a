#pragma once
#include <c10/core/Event.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <string>

#include "csrc/config/config.h"
#include "csrc/models/language_model.h"
#include "train/carried_state.h"
#include "train/distributed.h"
#include "train/gradient_sums.h"
#include "train/optimizer.h"
#include "train/prefetch.h"
#include "train/sequence_relay.h"
#include "train/sharded_weights.h"
#include "train/step_graph.h"

namespace xlstm::train {

struct StepResult {
  int64_t step = 0;      ///< number of the update, from 1
  int64_t targets = 0;   ///< of the whole batch, those that count; 0: nothing was updated
  double loss = 0;       ///< mean over these targets, before the update; 0 where there are none
  double grad_norm = 0;  ///< global L2 norm before clipping
  double learning_rate = 0;
  int64_t first_sample = 0, last_sample = 0;  ///< global indices of the batch
  bool finite = true;                         ///< false: nothing was updated
  std::string
      bad_parameter;  ///< the first with a gradient that is not finite; "" where none or finite
};

/// One optimizer step: phases 2 (forward and backward per micro batch) to 6 (update), all of it enqueued on the model's
/// device; whether to update is decided there too. The host reads results of a GPU one step late, while the next step
/// runs, so that the GPU never waits for it. With train.nonfinite=stop nothing is updated from the first step on that is
/// not finite; by a batch in which no target counts nothing ever is, and that is no failure. On a GPU, where batches have
/// one size, the whole step is recorded as a CUDA graph (train.cuda_graph).
/// Of several processes each has its share of the batch; gradients and losses are summed before anything is judged, so
/// that all of them do the same update. Their steps are not recorded.
class TrainStep {
 public:
  /// group: the processes that train together; null for one. weights: what they have divided among them; null for nothing.
  TrainStep(models::LanguageModel& model, AdamW& optimizer, const config::Config& config,
            ProcessGroup* group = nullptr, ShardedWeights* weights = nullptr);
  /// Does one step and returns the oldest result that is known by now and was not returned before: that of this step on
  /// a CPU, that of the one before on a GPU (none at first). batch: this process's share of the samples from
  /// first_sample on.
  std::optional<StepResult> run(const TrainBatch& batch, int64_t step, int64_t first_sample = 0);
  /// The result that run() still owes; waits for the device.
  std::optional<StepResult> finish();
  /// What the sequences hand on; null without train.carry_state.
  CarriedState* carried() { return carried_ ? &*carried_ : nullptr; }
  /// Phase 2 alone, for tests: leaves the gradients of the mean loss and returns that loss.
  double accumulate_gradients(const TrainBatch& batch);

 private:
  /// What a step reads, on the model's device. On a GPU always the same tensors.
  struct Inputs {
    at::Tensor ids, targets, reset;  ///< reset is undefined where no document may start inside
    at::Tensor scalars;  ///< float64: 1 / targets of the batch (0 where none counts), learning rate
  };
  /// A result on its way to the host.
  struct Pending {
    StepResult result;
    at::Tensor numbers;  ///< loss, norm of all gradients, norm of each
    std::optional<c10::Event> arrived;
  };
  int64_t set_inputs(const TrainBatch& batch, double learning_rate);
  at::Tensor work(int64_t step);
  at::Tensor accumulate(const Inputs& inputs);
  at::Tensor gradient_norms();
  void run_or_replay(int64_t step);
  void record(int64_t step);
  Pending send(StepResult result) const;
  StepResult receive(Pending pending) const;

  models::LanguageModel& model_;
  AdamW& optimizer_;
  const config::Config& config_;
  ProcessGroup* group_;  ///< null where there is one process
  ShardedWeights* weights_;
  NamedTensors parameters_;
  at::Tensor divided_;  ///< bool, whether each is one of divided weights
  int64_t total_steps_;
  at::Device device_;
  Inputs inputs_;
  at::Tensor numbers_;  ///< what work() returned last
  at::Tensor halted_;   ///< 1 from the first step on that was not finite, with train.nonfinite=stop
  std::deque<Pending> pending_;
  StepGraph graph_;
  std::optional<CarriedState> carried_;
  std::optional<SequenceRelay> relay_;
  std::optional<GradientSums> sums_;  ///< of what is not divided
  bool may_record_;
  int64_t runs_ = 0;
};

/// Named parameters of a model, in registration order.
NamedTensors named_parameters(const models::LanguageModel& model);
/// Those that need a gradient: all, or adapters alone.
NamedTensors trained_parameters(const models::LanguageModel& model);
/// Name of the first tensor with an element that is not finite; "" where all are finite.
std::string first_non_finite(const NamedTensors& tensors);

}  // namespace xlstm::train
