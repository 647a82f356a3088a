#pragma once
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// Cross entropy of rows of logits, in place. dtype is kFloat or kDouble ("Acc").
struct SoftmaxCrossEntropyParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0, vocab = 0;
  double soft_cap = 0;  // > 0: logits become soft_cap * tanh(logit / soft_cap)
  void* logits =
      nullptr;  // Acc (rows, vocab) packed; overwritten: by the gradient where it is wanted
  const int64_t* targets = nullptr;  // (rows), all within the vocabulary
  void* loss = nullptr;              // Acc (rows) or null
  bool gradient = false;             // logits become d loss / d logit * scale of the row
  double scale = 1;                  // of every row
  const void* row_scales = nullptr;  // Acc (rows) or null: times `scale`
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(softmax_cross_entropy, SoftmaxCrossEntropyParams)
