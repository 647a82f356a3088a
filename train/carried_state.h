#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "csrc/config/config.h"
#include "csrc/core/safetensors.h"
#include "csrc/models/language_model.h"
#include "train/distributed.h"

namespace xlstm::train {

/// What the sequences of a batch hand on to those of the next one (train.carry_state): the states of this process's share.
/// They stay where they are in memory, so that a recorded step finds them.
class CarriedState {
 public:
  /// Empty states. group: the processes that train together, each with its share of the sequences; null for one.
  CarriedState(models::LanguageModel& model, const config::Config& config, ProcessGroup* group);

  /// Of this process's sequences [first, first + count): views.
  models::ModelState rows(int64_t first, int64_t count) const;
  /// Takes over what these sequences left; where their loss (one number, on the states' device) is not finite, they begin
  /// anew. After the backward pass, which reads what was there before. The host waits for nothing.
  void store(int64_t first, const models::ModelState& next, const at::Tensor& loss);

  /// "BLOCK.TENSOR" of the sequences of all processes, copies on the CPU, in the process that leads; the others have
  /// none. Called by all of them.
  NamedTensors tensors() const;
  /// What tensors() gave, from the process that leads; the number of processes may have changed.
  void load(const NamedTensors& tensors);
  /// By one process alone. Throws Error(kCheckpoint) naming a missing, extra or misshapen tensor.
  void check(const NamedTensors& tensors) const;
  /// Of this process's states.
  int64_t bytes() const;

 private:
  template <class Function>
  void for_each(const Function& function) const;
  int64_t first_of(int64_t rank) const { return rank * sequences_; }

  ProcessGroup* group_;
  ProcessPlace place_;
  int64_t sequences_;
  models::ModelState state_, empty_;  ///< of all sequences; of one
};

/// The state after no token, in the types that a step's states have.
models::ModelState empty_state(models::LanguageModel& model, int64_t sequences, bool bfloat16);

/// Bytes of the states of so many sequences. Counts without allocating.
int64_t state_bytes(const models::ModelOptions& options, int64_t sequences);

}  // namespace xlstm::train
