#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/safetensors.h"
#include "train/distributed.h"
#include "train/sharded_weights.h"

namespace xlstm::train {

/// AdamW (decoupled weight decay, arXiv 1711.05101) with bias correction, one fused pass over each
/// parameter:
///   p <- p - lr wd p;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;
///   p <- p - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
/// Of several processes each holds all of m and v; with options.shard an equal part of them alone, updates that part of the
/// parameters and sends it to the others (ZeRO stage 1, arXiv 1910.02054). The results are the same, bit for bit. Of
/// ShardedWeights each holds what belongs to its part of the weights.
class AdamW {
 public:
  /// `parameters`: name and tensor (contiguous). Those that models::decays() names have options.weight_decay, all others none.
  /// The tensors are updated in place. group: the processes that train together, which then make all calls
  /// together where nothing else is said; null for one. weights: which of the parameters are divided, null for none; must
  /// outlive this.
  AdamW(const NamedTensors& parameters, const config::OptimConfig& options,
        ProcessGroup* group = nullptr, ShardedWeights* weights = nullptr);

  /// One update from the parameters' gradients, each divided by `divisor` first (clipping; it costs nothing here), or
  /// none at all where `skip` is 1. Numbers of one element on the parameters' device: learning_rate float64, the others
  /// float32, or undefined tensors for 1 and 0. The host waits for nothing. Parameters without a gradient stay as they
  /// are; on a GPU all parameters must be on the same one.
  void step(const at::Tensor& learning_rate, const at::Tensor& divisor = {},
            const at::Tensor& skip = {});
  /// Drops all gradients, so that the next backward pass hands its buffers over instead of adding
  /// to zeros.
  void zero_grad();

  int64_t steps() const;
  /// What this process holds of the moments.
  int64_t bytes() const;
  /// "exp_avg.<name>" and "exp_avg_sq.<name>" like the parameter, and "step" (float32, one
  /// element): the optimizer's own tensors, copy them to keep them. Where they are divided copies on the CPU, in the process
  /// that leads alone; the others have none.
  NamedTensors state() const;
  /// state: of the process that leads, which gives the others theirs. Throws as check_state() does.
  void load_state(const NamedTensors& state);
  /// By one process alone. Throws Error(kCheckpoint) naming a missing, extra or misshapen tensor.
  void check_state(const NamedTensors& state) const;

 private:
  /// A run of elements of a parameter that one process updates.
  struct Piece {
    int64_t owner, begin, end;
    at::Tensor weights;                 ///< the owner's, as its moments; undefined in the others
    std::array<at::Tensor, 2> moments;  ///< m and v
  };
  struct Parameter {
    std::string name;
    at::Tensor tensor;
    double weight_decay;
    bool divided;               ///< by ShardedWeights
    std::vector<Piece> pieces;  ///< one where nothing is shared
  };
  bool own(const Piece& piece) const { return piece.owner == place_.rank; }
  void divide();
  at::Tensor gradient(const Parameter& parameter, const Piece& piece) const;
  void update(double weight_decay, const at::Tensor& rate, const at::Tensor& divisor,
              const at::Tensor& skip);
  void exchange();
  at::Tensor collect(const Parameter& parameter, size_t moment) const;
  void hand_out(const at::Tensor& whole, Parameter& parameter, size_t moment);

  config::OptimConfig options_;
  ProcessGroup* group_;
  ProcessPlace place_;
  ShardedWeights* weights_;
  bool sharded_;
  std::vector<Parameter> parameters_;  ///< those that decay first
  at::Tensor step_;
};

}  // namespace xlstm::train
