#pragma once
// Parameters of the mLSTM CPU kernels: pointers, strides in elements, sizes. The plan (chunks and parts) is made once per
// call in mlstm_cpu.cpp and holds for all heads.
#include <cstdint>

#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// Gates below these act as zero; finite, so that differences of them stay numbers.
constexpr double kMinLogForget = -1e8, kMinLogInput = -1e30;
/// -m is cut off here: above, h is zero in float; below, exp(-m) would be zero for exp_shifted, and h without a query 0 / 0.
constexpr double kMinNegM = -86, kMaxNegM = 80;

/// A strided (B,T,NH,D) tensor; gates are (B,T,NH) with inner = 1.
struct MlstmView {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0, inner = 1;  // strides
  Dtype dtype = Dtype::kFloat;
};

/// A run of tokens of one sequence that is worked on as one tile. A chunk is `fresh` where no state enters it: at a
/// reset, and at the start of a sequence without an initial state.
struct MlstmChunk {
  int64_t batch = 0, begin = 0, length = 0;
  bool fresh = false;
};

/// A run of chunks of one sequence: what one thread sweeps through for one head. A sequence is one part where the heads
/// and sequences alone keep the threads busy, else several.
struct MlstmPart {
  int64_t sequence = 0, chunk_begin = 0, chunk_end = 0;
  bool first = true, last = true;  // of its sequence
};

struct MlstmChunkwiseParams {
  int64_t num_threads = 1;                                 // at most
  int64_t num_heads = 0, dqk = 0, dv = 0, max_length = 0;  // max_length: the longest chunk
  int64_t num_sequences = 0, num_chunks = 0, num_parts = 0;
  const MlstmChunk* chunks = nullptr;
  const MlstmPart* parts = nullptr;
  int64_t max_part_chunks = 0;  // chunks of the longest part
  int64_t span_chunks = 1;      // chunks whose states the backward pass holds at a time, at least 1
  bool sigmoid_input_gate = false, normalize = true, float64 = false;
  double scale = 1, eps = 0;
  MlstmView q, k, v, igate, fgate, h;
  // States, contiguous (N,NH,DQK,DV), (N,NH,DQK), (N,NH), in float or (float64) double; inputs may be null.
  const void *c0 = nullptr, *n0 = nullptr, *m0 = nullptr;
  void *c = nullptr, *n = nullptr, *m = nullptr;
  MlstmView
      product;  // (B,T,NH) in the states' type: scale q . n; data may be null; not written without normalize
  // Backward only.
  MlstmView dh, dq, dk, dv_out, digate, dfgate;
  const void *dc = nullptr, *dn = nullptr;  // both or neither
  void *dc0 = nullptr, *dn0 = nullptr;      // may be null
};

/// One token: all arrays contiguous, (items,...) with items = B * NH, in float or (float64) double.
struct MlstmStepParams {
  int64_t items = 0, dqk = 0, dv = 0;
  bool sigmoid_input_gate = false, normalize = true, float64 = false;
  double scale = 1, eps = 0;
  const void *q = nullptr, *k = nullptr, *v = nullptr, *igate = nullptr, *fgate = nullptr;
  void *c = nullptr, *n = nullptr, *m = nullptr, *h = nullptr;
};

/// The same with a state that lags behind a ring of tokens (ops::MlstmRing), its arrays contiguous, too.
struct MlstmLazyParams : MlstmStepParams {
  int64_t tokens = 0;  // R
  Dtype ring_dtype = Dtype::kFloat;
  void *keys = nullptr, *values = nullptr;  // (items,R,DQK), (items,R,DV) in ring_dtype
  void* gates = nullptr;                    // (items,R,2)
  int32_t* count = nullptr;                 // (items)
};

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(mlstm_chunkwise_forward, MlstmChunkwiseParams)
XLSTM_CPU_KERNEL(mlstm_chunkwise_backward, MlstmChunkwiseParams)
XLSTM_CPU_KERNEL(mlstm_step, MlstmStepParams)
XLSTM_CPU_KERNEL(mlstm_step_lazy, MlstmLazyParams)
