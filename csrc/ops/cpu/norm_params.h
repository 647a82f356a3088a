#pragma once
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// headwise_norm or residual_norm and its backward on `rows` rows of heads * dim channels. "Acc" is the dtype of
/// accumulation.
struct HeadwiseNormParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0, heads = 1, dim = 0;
  double eps = 0;
  bool rms = false;           // else layer norm
  bool sigmoid_gate = false;  // else SiLU
  Rows x, skip, gate;
  int64_t x_head_stride = 0;
  const void* weight = nullptr;  // Acc, heads * dim; null where absent, as the next two
  const void* bias = nullptr;
  const void* skip_weight = nullptr;
  void* y = nullptr;    // rows packed, forward only
  Rows terms[2];        // forward only: where present, x is their sum, which is written to `sum`
  void* sum = nullptr;  // x's memory, packed

  Rows dy;             // from here on backward only
  Rows dsum;           // further gradient of x; data null where absent
  void* dx = nullptr;  // packed, dtype of x; dskip and dgate null where skip and gate are absent
  void* dskip = nullptr;
  void* dgate = nullptr;
  int64_t block_count = 0, block_rows = 1;
  void* partials = nullptr;  // Acc, (block_count, 3, heads * dim): sums of one block of rows
  // Acc, heads * dim: gradients of weight, bias and skip_weight; null where those are absent.
  void* parameter_grads[3] = {nullptr, nullptr, nullptr};
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(headwise_norm, HeadwiseNormParams)
XLSTM_CPU_KERNEL(headwise_norm_backward, HeadwiseNormParams)
