#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/safetensors.h"

namespace xlstm::train {

/// AdamW (decoupled weight decay, arXiv 1711.05101) with bias correction, one fused pass over each
/// parameter:
///   p <- p - lr wd p;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;
///   p <- p - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
class AdamW {
 public:
  /// `parameters`: name and tensor. Parameters that decays() names form the group with
  /// options.weight_decay, all others have none. The tensors are updated in place.
  AdamW(const NamedTensors& parameters, const config::OptimConfig& options);

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
  /// "exp_avg.<name>" and "exp_avg_sq.<name>" like the parameter, and "step" (float32, one
  /// element). The tensors are the optimizer's own: copy them to keep them.
  NamedTensors state() const;
  /// Throws Error(kCheckpoint) naming a missing, extra or misshapen tensor.
  void load_state(const NamedTensors& state);

  /// Whether a parameter decays: a matrix weight (its name holds "weight" and not "norm"; biases,
  /// skips and recurrent kernels are neither); the token embedding only with
  /// weight_decay_on_embedding.
  static bool decays(const std::string& name, const at::Tensor& parameter,
                     const config::OptimConfig& options);

 private:
  struct Group {
    double weight_decay = 0;
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, exp_avgs, exp_avg_sqs;
  };
  config::OptimConfig options_;
  std::vector<Group> groups_;
  at::Tensor step_;
};

}  // namespace xlstm::train
