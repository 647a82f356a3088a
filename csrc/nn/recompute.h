#pragma once
#include "csrc/nn/layers.h"

namespace xlstm::nn {

/// block->forward(x, state, reset, fused) that keeps only its inputs and computes the rest again in the backward pass, under
/// the same autocast setting, in the same mode and with the same random numbers. Gradients reach x, the state tensors and
/// the block's parameters through the ordinary graph, so grad(), accumulation and hooks behave as without it. No second
/// derivative. `draws`: whether the block may draw random numbers; where it does not, no generator is asked, which a CUDA
/// graph cannot record. Where the block's parameters are `transient` they have memory during each of the two passes, and
/// their gradients go to that.
Result checkpoint(const std::shared_ptr<Block>& block, const at::Tensor& x, const State& state,
                  const std::optional<at::Tensor>& reset, bool fused = true, bool draws = true);

/// The parameters of a block have their values while one lives.
class Fetched {
 public:
  /// parameters: null where they always have them.
  Fetched(std::shared_ptr<TransientParameters> parameters, TransientParameters::Pass pass)
      : parameters_(std::move(parameters)) {
    if (parameters_) parameters_->fetch(pass);
  }
  ~Fetched() {
    if (parameters_) parameters_->release();
  }
  Fetched(Fetched&&) = default;
  Fetched& operator=(Fetched&&) = delete;

 private:
  std::shared_ptr<TransientParameters> parameters_;
};

}  // namespace xlstm::nn
