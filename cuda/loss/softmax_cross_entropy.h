#pragma once
// Cross entropy of rows of logits and its gradient, one block per row. No allocation, no synchronisation.
#include "cuda/tensors.h"

namespace xlstm::cuda {

/// With s = soft_cap * tanh(logit / soft_cap), or the logit itself for soft_cap 0:
///   loss = log sum_j exp(s_j) - s_target        d loss / d logit_j = (softmax(s)_j - [j = target]) (1 - (s_j / soft_cap)^2)
/// Rows whose target is ignore_index: loss 0, gradient 0, whatever their logits are. A target outside of the vocabulary
/// makes loss and gradient NaN: the host, which could report it, waits for nothing.
struct SoftmaxCrossEntropyParams {
  int64_t rows = 0, vocab = 0;
  const float* logits = nullptr;  ///< (rows, vocab), packed
  const int64_t* targets = nullptr;
  int64_t ignore_index = -100;
  float soft_cap = 0;
  float* loss = nullptr;  ///< (rows)
  void* gradient =
      nullptr;  ///< (rows, vocab), packed; may be the logits themselves in float32; null: not wanted
  Dtype dtype = Dtype::kFloat32;  ///< of the gradient
  const float* scale =
      nullptr;  ///< one number on the device that all gradients are multiplied by; null: 1
  const float* row_scales = nullptr;  ///< (rows), likewise; null: 1
};

void launch_softmax_cross_entropy(const SoftmaxCrossEntropyParams& params, Stream stream);

}  // namespace xlstm::cuda
