#pragma once
// Elementwise recurrences of the models that xLSTM is compared with. Everything is contiguous and of the accumulation
// dtype; the operators convert.
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// wkv and its backward; (B,T,D) tensors, (B,D) states, (D) parameters. Equations: csrc/ops/wkv.h.
struct WkvParams {
  Dtype dtype = Dtype::kFloat;  // float or double
  int64_t batch = 0, time = 0, dim = 0;
  const void *k = nullptr, *v = nullptr, *w = nullptr, *u = nullptr;
  const void *a0 = nullptr, *b0 = nullptr, *p0 = nullptr;  // null: the empty state
  const bool* reset = nullptr;                             // (B,T) or null
  void *y = nullptr, *a = nullptr, *b = nullptr, *p = nullptr;

  const void *dy = nullptr, *da = nullptr, *db = nullptr;  // backward only
  void *dk = nullptr, *dv = nullptr, *da0 = nullptr, *db0 = nullptr;
  void *dw = nullptr, *du = nullptr;  // (B,D): sums of one row
};

/// selective_scan and its backward; x, delta (B,T,D), a (N,D), b, c (B,T,N), skip (D), state (B,N,D). Equations:
/// csrc/ops/selective_scan.h.
struct SelectiveScanParams {
  Dtype dtype = Dtype::kFloat;  // float or double
  int64_t batch = 0, time = 0, dim = 0, states = 0;
  const void *x = nullptr, *delta = nullptr, *a = nullptr, *b = nullptr, *c = nullptr,
             *skip = nullptr;
  const void* state0 = nullptr;  // null: zero
  const bool* reset = nullptr;   // (B,T) or null
  void *y = nullptr, *state = nullptr;

  int64_t block = 1;                            // channels of a task; backward only, as all below
  const void *dy = nullptr, *dstate = nullptr;  // dstate null: zero
  void *dx = nullptr, *ddelta = nullptr, *dstate0 = nullptr;
  void *da = nullptr, *dskip = nullptr;  // (B,N,D), (B,D): sums of one row
  void *db = nullptr, *dc = nullptr;     // (tasks per row,B,T,N): sums of one task
};

/// h_t = a_t h_{t-1} + x_t from h = 0; everything (B,T,D).
struct GatedScanParams {
  Dtype dtype = Dtype::kFloat;  // float or double
  int64_t batch = 0, time = 0, dim = 0;
  const void *x = nullptr, *a = nullptr;
  const bool* reset = nullptr;  // (B,T), may be null: nothing passes by way of that token's a
  void* h = nullptr;
  bool reverse = false;  // from the last token to the first: h_t = a_{t+1} h_{t+1} + x_t
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(wkv, WkvParams)
XLSTM_CPU_KERNEL(wkv_backward, WkvParams)
XLSTM_CPU_KERNEL(selective_scan, SelectiveScanParams)
XLSTM_CPU_KERNEL(selective_scan_backward, SelectiveScanParams)
XLSTM_CPU_KERNEL(gated_scan, GatedScanParams)
