#pragma once
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// One sequence: tokens start .. start + length of a batch row. Positions count from its first
/// token; position -1 is the newest row of its start state.
struct ConvSequence {
  int64_t batch = 0, start = 0, length = 0;
};

/// Positions begin .. end of one sequence. Begins below zero where the start state's gradient is
/// wanted.
struct ConvItem {
  int64_t sequence = 0, begin = 0, end = 0;
};

/// causal_conv1d and its backward. T is the tensors' dtype, Acc that of accumulation.
struct CausalConv1dParams {
  Dtype dtype = Dtype::kFloat;
  int64_t time = 0, channels = 0, width = 0;
  bool silu = false;
  const void* x = nullptr;  // T (B,T,C), unit channel stride
  int64_t x_batch_stride = 0, x_time_stride = 0;
  const void* weight = nullptr;  // Acc (W,C)
  const void* bias = nullptr;    // Acc (C) or null
  const void* state0 = nullptr;  // T (N,W-1,C) or null
  const bool* reset = nullptr;   // (B,T) or null
  const ConvSequence* sequences = nullptr;
  int64_t sequence_count = 0;
  const ConvItem* items = nullptr;
  int64_t item_count = 0;
  void* y = nullptr;      // T (B,T,C), forward only
  void* state = nullptr;  // T (N,W-1,C), forward only

  const void* dy = nullptr;  // T (B,T,C), unit channel stride, or null; from here on backward only
  int64_t dy_batch_stride = 0, dy_time_stride = 0;
  const void* dstate = nullptr;  // T (N,W-1,C) or null
  void* dx = nullptr;            // T (B,T,C)
  void* dstate0 = nullptr;       // T (N,W-1,C) or null
  int64_t group_items = 1;       // items whose weight gradients share one partial sum
  int64_t group_count = 0;
  void* partials = nullptr;  // Acc (group_count, W+1, C): weight taps, then bias
  void* dweight = nullptr;   // Acc (W,C)
  void* dbias = nullptr;     // Acc (C) or null
};

/// Positions of one item of work.
constexpr int64_t kConvItemRows = 64;

struct CausalConv1dStepParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, channels = 0, width = 0;
  bool silu = false;
  Rows x;                        // T (B,C)
  const void* weight = nullptr;  // Acc (W,C)
  const void* bias = nullptr;    // Acc (C) or null
  void* state = nullptr;         // T (B,W-1,C), unit channel stride, shifted in place
  int64_t state_batch_stride = 0, state_row_stride = 0;
  void* y = nullptr;  // T (B,C)
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(causal_conv1d, CausalConv1dParams)
XLSTM_CPU_KERNEL(causal_conv1d_backward, CausalConv1dParams)
XLSTM_CPU_KERNEL(causal_conv1d_step, CausalConv1dStepParams)
