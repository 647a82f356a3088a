#pragma once
// Equations: csrc/ops/gated_linear_attention.h. Everything is contiguous and of the accumulation dtype; the operator converts.
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

struct GatedLinearAttentionParams {
  Dtype dtype = Dtype::kFloat;  // float or double
  int64_t batch = 0, time = 0, num_heads = 0, dk = 0, dv = 0;
  double scale = 1;
  const void *q = nullptr, *k = nullptr, *v = nullptr, *g = nullptr;  // (B,T,NH,DK), v (B,T,NH,DV)
  const void* u = nullptr;                                            // (NH,DK) or null
  const void* state0 = nullptr;                                       // (B,NH,DK,DV) or null: zero
  const bool* reset = nullptr;                                        // (B,T) or null
  void *h = nullptr, *state = nullptr;

  const void *dh = nullptr, *dstate = nullptr;  // backward only, as all below
  void *dq = nullptr, *d_k = nullptr, *d_v = nullptr, *dg = nullptr, *dstate0 = nullptr;
  void* du = nullptr;  // (B,NH,DK): sums of one row; null without u
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(gated_linear_attention, GatedLinearAttentionParams)
XLSTM_CPU_KERNEL(gated_linear_attention_backward, GatedLinearAttentionParams)
