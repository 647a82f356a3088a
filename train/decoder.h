#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "csrc/models/language_model.h"
#include "train/step_graph.h"

namespace xlstm::train {

/// Feeds a model one token after another, of one sequence or of several side by side. It owns the state, which is updated
/// in place; on a GPU the step is recorded as a CUDA graph after a few tokens and replayed from then on, where this build
/// and the model allow that. Needs no-grad mode and nothing dropped (nn::NoDropout).
class Decoder {
 public:
  /// `state`: after the tokens so far (empty: none), of so many sequences; its tensors are written to. `lazy_fold`: as
  /// nn::InPlaceStateGuard takes it.
  Decoder(models::LanguageModel& model, models::ModelState state,
          std::optional<bool> lazy_fold = {}, int64_t sequences = 1);
  /// Takes a token of each sequence (B,1), on any device, and returns the logits of the next ones (B,V) on the model's device, which the
  /// next call may overwrite.
  const at::Tensor& next(const at::Tensor& tokens);
  /// Goes on without a sequence, whose row the last one takes. On a CPU: a recorded step would go on with all rows.
  void drop(int64_t row);
  /// Behind all tokens so far, which the next call writes to. What mLSTM cells let lag does so here.
  const models::ModelState& state() const { return state_; }

 private:
  void advance();
  void work();
  void record();

  models::LanguageModel& model_;
  models::ModelState state_;
  const std::optional<bool> lazy_fold_;
  at::Tensor ids_, logits_;  ///< (B,1) int64 and (B,V) on the model's device
  StepGraph graph_;
  bool may_record_;
  int64_t tokens_ = 0;
};

}  // namespace xlstm::train
