#pragma once
// train.sequence_parallel: several processes compute one sequence, each a segment of it.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/models/language_model.h"
#include "train/distributed.h"

namespace xlstm::train {

/// Which part of a step's batch a process computes: some of its sequences, and of these a segment. Neighbours in rank have
/// neighbouring segments.
struct BatchShare {
  int64_t first, sequences;
  int64_t segment, segments;
};
/// Throws Error(kConfig) where the processes cannot share the batch.
BatchShare share_of_batch(const config::Config& config, const ProcessPlace& place);

/// Hands the state behind a block's last token to the process that has the next segment, which waits for it before its
/// own pass of that block: block by block, so that all are at work at once, one block apart. In the backward pass the
/// gradients of these states come the other way. The result is that of the whole sequence; nothing is computed twice.
class SequenceRelay : public models::StateRelay {
 public:
  /// model and group must outlive this.
  SequenceRelay(models::LanguageModel& model, const config::Config& config, ProcessGroup& group);

  /// Passes of the model that begin while one lives are those of a segment.
  class Scope {
   public:
    /// relay: null for whole sequences.
    explicit Scope(SequenceRelay* relay) : relay_(relay) {
      if (relay_ != nullptr) relay_->model_.blocks()->relay = relay_;
    }
    ~Scope() {
      if (relay_ != nullptr) relay_->model_.blocks()->relay = nullptr;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    SequenceRelay* relay_;
  };

  models::BlockState receive(int64_t block, int64_t sequences) override;
  void send(int64_t block, const models::BlockState& state) override;
  /// The loss of a pass, with the states that were sent in its graph: their gradients come when it is differentiated.
  at::Tensor with_sent(const at::Tensor& loss);
  /// Behind a backward pass: all that was sent has arrived.
  void finish();

 private:
  struct Link;
  class Receive;
  class Send;
  bool first() const { return share_.segment == 0; }
  bool last() const { return share_.segment + 1 == share_.segments; }
  std::vector<at::Tensor> empty_like(int64_t block, int64_t sequences) const;
  at::Tensor needs_gradient() const;
  void check(int64_t block, at::TensorList state) const;
  void post(const at::Tensor& tensor, int64_t to);

  models::LanguageModel& model_;
  ProcessGroup& group_;
  BatchShare share_;
  int64_t before_, after_;     ///< ranks of the neighbours
  models::ModelState shapes_;  ///< of one sequence
  at::Tensor sent_;            ///< zero, from the states that were sent
  std::vector<ProcessGroup::Wait> under_way_;
};

}  // namespace xlstm::train
