#pragma once
// train.shard_weights: the weights of the blocks in equal parts, one for each process (ZeRO stage 3, arXiv 1910.02054;
// FSDP, arXiv 2304.11277).
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "csrc/models/language_model.h"
#include "csrc/nn/recompute.h"
#include "train/distributed.h"

namespace xlstm::train {

/// A run of a parameter's elements that one process holds, of the parameter's shape where it is all of them.
struct HeldPart {
  int64_t owner, begin, end;
  at::Tensor
      weights;  ///< the elements, with their gradient as its grad(); undefined in other processes
};

/// Of each block's weights a process holds the elements of its part alone. During a pass of the block (nn::checkpoint())
/// it has them all, collected from the processes while the block before computes; behind the backward pass the gradients
/// are summed, each part where it is held.
/// What is no block's (embedding, head, out norm) stays whole everywhere. Every function is called by all processes
/// together.
class ShardedWeights {
 public:
  /// The model, on its device and with activation checkpointing, has the same weights in all processes. group must outlive
  /// this.
  ShardedWeights(models::LanguageModel& model, ProcessGroup& group);
  /// The model is of no use any more.
  ~ShardedWeights();
  ShardedWeights(const ShardedWeights&) = delete;
  ShardedWeights& operator=(const ShardedWeights&) = delete;

  /// While one lives, all weights are everywhere.
  class Whole {
   public:
    /// weights: null where nothing is divided.
    explicit Whole(ShardedWeights* weights);
    Whole(const Whole&) = delete;
    Whole& operator=(const Whole&) = delete;
    /// What the weights have been changed to, by all processes alike, they stay.
    void keep_changes();

   private:
    ShardedWeights* weights_;
    std::vector<nn::Fetched> fetched_;
  };

  /// In the order of their elements; null for a parameter that is whole.
  const std::vector<HeldPart>* parts(const at::Tensor& parameter) const;
  /// Behind the backward passes: waits for sums of gradients that are on their way, and drops what was fetched ahead in vain.
  void finish_gradients();
  void zero_grad();

 private:
  class Reduction;
  class Unit;
  std::unique_ptr<Reduction> reduction_;
  std::vector<std::shared_ptr<nn::Block>> blocks_;
  std::vector<std::shared_ptr<Unit>> units_;  ///< one for each block
  std::map<const void*, std::vector<HeldPart>> parts_;
};

}  // namespace xlstm::train
