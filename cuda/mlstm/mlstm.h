#pragma once
// The mLSTM on CUDA as the operators call it: no torch, no allocation, no synchronisation. Every function only launches
// kernels on the given stream, in an order that depends on sizes alone, so that it can be captured in a CUDA graph.
// The same functions run in the emulator of tests/simt. Equations: docstring of csrc/ops/mlstm.h.
#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"

namespace xlstm::cuda {

struct MlstmProblem {
  int64_t batch = 0, time = 0, num_heads = 0, dqk = 0, dv = 0;
  int64_t num_sequences = 0;      ///< B, or N with cu_seqlens
  Dtype dtype = Dtype::kFloat32;  ///< of q, k, v, h and their gradients
  Dtype igate_dtype = Dtype::kFloat32, fgate_dtype = Dtype::kFloat32;  ///< and of their gradients
  bool sigmoid_input_gate = false, normalize = true;
  float scale = 1, eps = 0;
  int64_t chunk_size = 0;  ///< 0: automatic
  bool two_phase =
      false;  ///< the state and out kernels even where the fused sweep fits (to compare them)
};

/// Inputs shared by both directions. States are contiguous (N,NH,DQK,DV), (N,NH,DQK), (N,NH) float32, null where absent.
struct MlstmInputs {
  View q, k, v, igate, fgate;
  const float *c0 = nullptr, *n0 = nullptr, *m0 = nullptr;
  const bool* reset = nullptr;  ///< (B,T), strides reset_batch, reset_time
  int64_t reset_batch = 0, reset_time = 0;
  const int32_t* cu_seqlens = nullptr;  ///< (N+1), on the device, rising from 0 to T
};

struct MlstmForward {
  MlstmInputs in;
  View h;
  float *c = nullptr, *n = nullptr, *m = nullptr;  ///< final states
  float* product =
      nullptr;  ///< (B,T,NH) contiguous: scale * q_t . n_t, kept for the backward pass; null: not wanted
};

struct MlstmBackward {
  MlstmInputs in;
  View h;
  const float* product = nullptr;            ///< of the forward pass; not read without normalize
  View dh;                                   ///< may have stride 0
  const float *dc = nullptr, *dn = nullptr;  ///< gradients of the final states, both or neither
  View dq, dk, dv, digate, dfgate;
  float *dc0 = nullptr, *dn0 = nullptr;  ///< null: not wanted
};

/// One token: (B,NH,D) tensors as views with time = 0; c, n, m contiguous float32, updated in place.
struct MlstmStep {
  View q, k, v, igate, fgate, h;
  float *c = nullptr, *n = nullptr, *m = nullptr;
};

/// The last tokens of a head whose state lags behind: c, n and m are of the time before them. Keys (B,NH,R,DQK) and values
/// (B,NH,R,DV) of the problem's dtype, gates (B,NH,R,2) the logarithms of forget and input gate, count (B,NH) the
/// tokens that are there, 0 to R - 1. All contiguous.
struct MlstmRing {
  static constexpr int32_t kMaxTokens = 16;
  int32_t tokens = kMaxTokens;  ///< R, from 1 on
  void *keys = nullptr, *values = nullptr;
  float* gates = nullptr;
  int32_t* count = nullptr;
};

/// Whether the kernels take this problem on this device: compute capability 8.0 or later, sizes that fit 32-bit indices
/// of a tile. Everything else is the caller's (csrc/ops/mlstm_generic.cpp).
bool mlstm_supported(const MlstmProblem& problem, const DeviceLimits& device);

/// Bytes of scratch memory that the direction needs, aligned to 256 bytes. Backward they depend on which of the call's
/// states and gradients are there.
size_t mlstm_forward_workspace(const MlstmProblem& problem, const DeviceLimits& device);
size_t mlstm_backward_workspace(const MlstmProblem& problem, const DeviceLimits& device,
                                const MlstmBackward& call);

/// T >= 1, B, NH, DQK, DV >= 1. Throw std::runtime_error where a launch fails (text of the CUDA error and kernel).
void mlstm_forward(const MlstmProblem& problem, const DeviceLimits& device,
                   const MlstmForward& call, void* workspace, Stream stream);
void mlstm_backward(const MlstmProblem& problem, const DeviceLimits& device,
                    const MlstmBackward& call, void* workspace, Stream stream);
/// The problem's time is 1; needs no workspace.
void mlstm_step(const MlstmProblem& problem, const MlstmStep& call, Stream stream);
/// The same numbers, but C is read alone and written every Rth time: the token joins the ring, which is folded into the
/// state when it is full.
void mlstm_step_lazy(const MlstmProblem& problem, const MlstmStep& call, const MlstmRing& ring,
                     Stream stream);
/// Folds what is in the ring into c, n, m of `call`, which reads nothing else.
void mlstm_fold(const MlstmProblem& problem, const MlstmStep& call, const MlstmRing& ring,
                Stream stream);

}  // namespace xlstm::cuda
