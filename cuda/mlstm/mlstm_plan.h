#pragma once
// How a call is cut into chunks, segments and kernels. Depends on sizes and device alone.
#include "cuda/mlstm/mlstm_params.h"
#include "cuda/workspace.h"

namespace xlstm::cuda {

struct MlstmPlan {
  Chunks chunks;
  bool fused = true;       ///< sweep kernels; else state and out kernels, with the states in memory
  bool sm90 = false;       ///< fused by the sweep kernels for sm_90a
  bool sm90_wide = false;  ///< backward: dq and dk by the wide sweep for sm_90a
  bool sm90_dv = false;    ///< with it, dv by the other one, in chunks of its own (dv_chunks)
  Chunks dv_chunks;
  int32_t planes = 1;     ///< bfloat16 planes per number
  int32_t dot_tiles = 1;  ///< column tiles of DQK: partial row dots per token
  int32_t anchor_tiles = 1, anchor_count = 0,
          anchor_numbers = 0;  ///< see Anchors; no anchors for short sequences
  int64_t items() const { return int64_t{chunks.num_sequences} * chunks.num_heads; }
};

/// With DeviceLimits::hopper the plan may turn out to be one for operands that the call does not have: the kernels for sm_90a
/// do not take all strides. The call then plans again for without_hopper(device).
MlstmPlan plan_mlstm(const MlstmProblem& problem, const DeviceLimits& device, Direction direction);
DeviceLimits without_hopper(DeviceLimits device);

/// What the segments' own sums and the states that enter them are kept in; empty with one segment.
struct SegmentMemory {
  float *c = nullptr, *n = nullptr, *gamma = nullptr;
  SegmentMemory(const MlstmPlan& plan, const MlstmProblem& problem, Workspace& workspace);
};

/// States entering every chunk, for the out kernels; empty where the sweep is fused.
struct StateMemory {
  void* c = nullptr;
  float* n = nullptr;
  StateMemory(const MlstmPlan& plan, const MlstmProblem& problem, Workspace& workspace);
};

/// Anchors of the backward pass.
Anchors take_anchors(const MlstmPlan& plan, Workspace& workspace);

Operand operand_of(const View& view, int64_t width, Dtype dtype);

/// Tokens of all chunks of all heads, the last one of a sequence counted in full.
int64_t positions_of(const Chunks& chunks);

GatesParams gates_params(const Chunks& chunks, const MlstmProblem& problem, const MlstmInputs& in,
                         GateRun* ends, GateRecord* records, float* gamma, float* m);

/// The states that enter the segments: C forward or dC in reverse. Fills `memory` where there are several; afterwards
/// start_c, start_n of the kernels are `c`, `n`.
struct SegmentStarts {
  const float *c, *n;
};
SegmentStarts segment_starts(const MlstmPlan& plan, const StateParams& state,
                             const SegmentMemory& memory, const DeviceLimits& device,
                             Stream stream);

}  // namespace xlstm::cuda
