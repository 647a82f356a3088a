#pragma once
// The sLSTM and LSTM on CUDA as the operators call it: no torch, no allocation, no synchronisation. Every function only
// launches kernels on the given stream, in an order that depends on sizes alone, so that it can be captured in a CUDA
// graph; a decoding step is a call with time = 1. The same functions run in the emulator of tests/simt. Equations:
// docstring of csrc/ops/slstm.h.
//
// One persistent kernel per direction does all time steps: the recurrent matrices stay in registers and shared memory,
// the states in registers. The recurrent product takes y in the type of the inputs (bfloat16), or with 16 significant
// bits in two parts (float32, float16); everything else is float32.
//
// For the backward pass the forward pass keeps checkpoints and, where the caller gives memory for them, the gates'
// pre-activations g_t = wx_t + R y_{t-1} + b. A caller that did not keep these computes them anew from y for all tokens
// at once, by one matrix product, before it calls slstm_backward. The gradients of R and b are the caller's as well:
// sums over tokens of dwx_t y_{t-1}^T and of dwx_t.
#include "cuda/tensors.h"

namespace xlstm::cuda {

enum class SlstmCell : int { kSlstm, kSlstmExpf, kLstm };  ///< kSlstmExpf: exponential forget gate

/// How the blocks that share the units of a head pass y on from one time step to the next.
enum class SlstmExchange : int {
  kAuto,
  kBlock,    ///< one block per head and tile of sequences: within its shared memory
  kCluster,  ///< a cluster, through distributed shared memory (compute capability 9.0)
  kGrid,     ///< blocks that are resident together, through global memory
};

struct SlstmProblem {
  SlstmCell cell = SlstmCell::kSlstm;
  int64_t batch = 0, time = 0, num_heads = 0, dh = 0;
  int64_t num_sequences = 0;            ///< B, or N with cu_seqlens
  Dtype dtype = Dtype::kFloat32;        ///< of wx, y and their gradients
  Dtype r_dtype = Dtype::kFloat32;      ///< of R: float32 or dtype
  Dtype b_dtype = Dtype::kFloat32;      ///< of b: float32 or dtype
  Dtype gates_dtype = Dtype::kFloat32;  ///< of the pre-activations: float32 or dtype
  SlstmExchange exchange = SlstmExchange::kAuto;
};

/// A (B,T,4,NH,DH) tensor, gates in the order i, f, z, o. Strides in elements, none negative.
struct GateView {
  void* data = nullptr;
  int64_t batch = 0, time = 0, gate = 0, head = 0, unit = 1;
};

/// Shared by both directions. States are contiguous (N,NH,DH) float32, null where absent (all together): then the state
/// is empty, y = c = n = 0, m = -inf. The LSTM has no n and m; they are neither read nor written.
struct SlstmInputs {
  const void* r = nullptr;  ///< (4,NH,DH_out,DH_in) contiguous
  const float *y0 = nullptr, *c0 = nullptr, *n0 = nullptr;
  const bool* reset =
      nullptr;  ///< (B,T), strides reset_batch, reset_time: empty state before that token
  int64_t reset_batch = 0, reset_time = 0;
  const int32_t* cu_seqlens = nullptr;  ///< (N+1), on the device, rising from 0 to T; B is 1
};

struct SlstmForward {
  SlstmInputs in;
  GateView wx;
  const void* b = nullptr;  ///< (4,NH,DH) contiguous
  const float* m0 = nullptr;
  View y;
  float *y_last = nullptr, *c = nullptr, *n = nullptr, *m = nullptr;  ///< final states
  GateView gates;  ///< pre-activations in gates_dtype, kept for the backward pass; null: not wanted
  float* checkpoints = nullptr;  ///< of slstm_checkpoint_numbers() numbers; null: not wanted
};

struct SlstmBackward {
  SlstmInputs in;                      ///< of these y0, c0, n0 are not read
  GateView gates;                      ///< pre-activations in gates_dtype
  const float* checkpoints = nullptr;  ///< of the forward pass
  View dy;                             ///< may have stride 0; null: zero
  const float *dy_last = nullptr, *dc = nullptr,
              *dn = nullptr;  ///< of the final states (c, n in units of e^m); or null
  GateView dwx;
  float *dy0 = nullptr, *dc0 = nullptr, *dn0 = nullptr;  ///< null: not wanted
  float recurrent_clip = 0;  ///< what y_{t-1} gets from step t is cut to [-clip, clip]; 0: not cut
  bool recurrent_cut = false;  ///< y_{t-1} gets nothing from step t (and dy0 is zero)
};

/// Tokens between checkpoints of one sequence: the states entering its tokens 0, 16, 32, ...
constexpr int64_t kSlstmCheckpointTokens = 16;

/// States of a checkpoint: c and, but for the LSTM, n and m.
constexpr int64_t slstm_kept_states(SlstmCell cell) { return cell == SlstmCell::kLstm ? 1 : 3; }

/// Checkpoints of all sequences; those of packed ones need a few more. One is (NH,K,DH) float32 with the states above.
constexpr int64_t slstm_checkpoint_slots(const SlstmProblem& p) {
  return p.batch == 1 ? p.time / kSlstmCheckpointTokens + p.num_sequences
                      : p.batch * ((p.time + kSlstmCheckpointTokens - 1) / kSlstmCheckpointTokens);
}
constexpr int64_t slstm_checkpoint_numbers(const SlstmProblem& p) {
  return slstm_checkpoint_slots(p) * p.num_heads * slstm_kept_states(p.cell) * p.dh;
}

/// What the current device says of the kernels; not in the emulator. The text of the CUDA error where the build has no code
/// for it, null where it has: true of all kernels of cuda/, which are built for the same targets.
const char* slstm_code_error();
/// DeviceLimits::largest_cluster of a device of compute capability 9.0: a part of a GPU may have less than 8 multiprocessors
/// side by side.
int slstm_largest_cluster(size_t shared_bytes);

/// Whether a persistent kernel takes this problem on this device, forward and, with `gradients`, backward; with an
/// exchange other than kAuto, the kernel of that exchange. Everything else is the caller's, with the functions of
/// slstm_pointwise below.
bool slstm_supported(const SlstmProblem& problem, const DeviceLimits& device,
                     bool gradients = true);

/// Bytes of scratch memory that the direction needs, aligned to 256 bytes. Backward these are 24 (bfloat16) or 32 for each
/// of B T NH DH units, until the call is over.
size_t slstm_forward_workspace(const SlstmProblem& problem, const DeviceLimits& device);
size_t slstm_backward_workspace(const SlstmProblem& problem, const DeviceLimits& device);

/// T, B, NH, DH >= 1. Throw std::runtime_error where a launch fails (text of the CUDA error and kernel).
void slstm_forward(const SlstmProblem& problem, const DeviceLimits& device,
                   const SlstmForward& call, void* workspace, Stream stream);
void slstm_backward(const SlstmProblem& problem, const DeviceLimits& device,
                    const SlstmBackward& call, void* workspace, Stream stream);

// Step by step: any DH, one launch per step between matrix products of the caller -----------------------------------------

/// Step `t` of every sequence, that is of its token t; sequences that are shorter stay as they are.
struct SlstmStep {
  int64_t t = 0;
  /// Forward: R y_{t-1} of every sequence (N for B, one token), from `y` below; where t is 0, from y0 or null.
  GateView product;
  Dtype product_dtype = Dtype::kFloat32;
  /// Backward: sum over gates of R_g^T dwx_{t+1}, (N,NH,DH) contiguous float32; null at the first step of a call. Where a
  /// sequence ends at t, or the token t + 1 has a reset, it is not used.
  const float* dy_recurrent = nullptr;
  /// Contiguous (N,NH,DH) in dtype, respectively (N,4,NH,DH): y_t, dwx_t, for the next product. Null: not wanted.
  void* y = nullptr;
  void* dwx = nullptr;
};

/// Steps 0, 1, ..., max length - 1. The final states of the call, all of them wanted, hold the state between steps.
void slstm_pointwise_forward(const SlstmProblem& problem, const SlstmForward& call,
                             const SlstmStep& step, Stream stream);
/// Steps max length - 1, ..., 1, 0. dc0 and dn0 of the call, both wanted (the LSTM: dc0), hold the gradients of c and n
/// between steps and at the end those of the initial states. dy0 is the product after step 0, which the caller clips; 0 with
/// recurrent_cut and where token 0 has a reset, dy_last where a sequence has no tokens.
void slstm_pointwise_backward(const SlstmProblem& problem, const SlstmBackward& call,
                              const SlstmStep& step, Stream stream);

}  // namespace xlstm::cuda
