#pragma once
// Parameters of the mLSTM kernels: what one launch reads and writes. mlstm_forward.cu and mlstm_backward.cu fill them.
//
// A chunk is a run of L tokens of one sequence (fewer at its end); L is a multiple of 64. Chunks are numbered by slots:
// those of a sequence lie side by side, some slots stay unused. What depends on the gates alone is computed once per
// call, in natural or base-2 logarithms, by the gates kernel:
//   b_t     sum of log sigmoid(f) from the chunk's start (or the last reset in it) to t
//   alpha_s = log i_s - b_s
//   peak_t  = max(m before the chunk or 0 after a reset, alpha_s for s <= t);  with the sigmoid input gate: -b_t
//   m_t     = b_t + peak_t
// so that the weight of token s in the state of token t is exp(alpha_s - peak_t), for start_t <= s <= t.
#include <cstdint>

#include "cuda/mlstm/mlstm.h"

namespace xlstm::cuda {

/// One token of one head. Positions of a slot beyond the sequence's end: w = u = 0, start = L, alpha = -1e38, peak = 0.
struct alignas(16) GateRecord {
  float alpha,
      alpha_rest;  ///< alpha / ln 2 as a sum of two floats: it reaches 1e6 and its differences must stay exact
  float peak, peak_rest;  ///< likewise
  float w;        ///< scale * (state before the chunk -> row t); 0 after a reset within the chunk
  float u;        ///< token s -> state after the chunk; 0 before a reset within the chunk
  float floor;    ///< exp(-m_t), -m_t cut off at -87 and 80; 1 with the sigmoid gate
  int32_t start;  ///< position in the chunk of the first token whose state reaches t
};
static_assert(sizeof(GateRecord) == 32);

/// How tokens are grouped; sequence_at() of mlstm_chunks.cuh turns it into ranges.
struct Chunks {
  const int32_t* cu_seqlens = nullptr;  ///< null: sequence s is batch row s, all of `time`
  int32_t num_sequences = 0, time = 0, num_heads = 0;
  int32_t length = 64;  ///< L
  int32_t slots = 0;    ///< per head
  int32_t segments =
      1;               ///< every sequence is cut into so many runs of chunks, worked on in parallel
  int32_t anchor = 8;  ///< slots between anchors, see Anchors
};

/// The gradient of the forget gates is a running sum whose rounding errors would grow with the sequence. At every slot
/// that is a multiple of Chunks::anchor it starts anew from <C, dC> + <n, dn>, which is exact there: kDq leaves its
/// registers of C and n as they enter the slot, kDk multiplies its own into them. Without the fused sweep the states are
/// in memory anyway, and the anchors kernel does both.
struct Anchors {
  float* states = nullptr;  ///< [tiles][NH][count][registers of a block]; null: no anchors
  float* dots = nullptr;    ///< [tiles][NH][count][kAnchorWarps]: parts of the sum
  int32_t count = 0;        ///< per head
};
constexpr int32_t kAnchorWarps = 8;   ///< warps that add to a dot, in every kernel
constexpr int32_t kLongestRun = 512;  ///< tokens between anchors, or of all sequences without any

/// A (B,T,NH,D) operand. `vector`: rows may be read 16 bytes at a time (inner = 1, addresses and strides aligned).
struct Operand {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0, inner = 1;
  int32_t width = 0;  ///< D
  Dtype dtype = Dtype::kFloat32;
  bool vector = false;
};

/// What some tokens in a row come to.
struct GateRun {
  double b;     ///< since their start or the last reset
  double peak;  ///< of alpha since then, and of 0 if there was a reset
  int last;     ///< 1 + position in its chunk of the last reset; 0: none
};

/// gates: a warp per chunk of 64, 128 or 256 tokens.
struct GatesParams {
  Chunks chunks;
  View igate, fgate;
  Dtype igate_dtype, fgate_dtype;
  bool sigmoid_input_gate = false;
  float scale = 1;
  const float* m0 = nullptr;  ///< (N,NH)
  const bool* reset = nullptr;
  int64_t reset_batch = 0, reset_time = 0;
  GateRun* ends = nullptr;        ///< [NH][slots], for the kernels themselves
  GateRecord* records = nullptr;  ///< [NH][slots][L]
  float* gamma =
      nullptr;         ///< [NH][slots]: state before -> state after the chunk; 0 with a reset in it
  float* m = nullptr;  ///< (N,NH): after the last token; null: not wanted
};

/// prep, before the backward sweeps: G_t = dh_t / N_t and z_t, the gradient of the normaliser's product.
struct PrepParams {
  Chunks chunks;
  Operand h, dh;
  const GateRecord* records = nullptr;
  const float* product = nullptr;  ///< (B,T,NH)
  bool normalize = true;
  float eps = 0;
  Operand g;           ///< (B,T,NH,DV) contiguous: bfloat16 for bfloat16 inputs, else float32
  float* z = nullptr;  ///< [NH][slots][L], 0 beyond the end
};

/// The four results are one operation with its operands permuted (out = [mask(A B^T * D)] X + outer weight * A S):
///   use     A  B  X  S            time      extra
///   kH      q  k  v  C            forward   normaliser, product
///   kDv     k  q  G  dC           backward
///   kDq     G  v  k  C^T          forward   z_row on A B^T; out += w z n
///   kDk     v  G  q  dC^T         backward  z_column on A B^T; out += u dn
enum class Use : int { kH, kDv, kDq, kDk };

/// sweep: all chunks of a segment in one block, the state stays on the chip. One block per (sequence, head, segment, tile
/// of X's columns). out: one block per (row block of 64, head, tile), states come from memory. Both take these.
struct SweepParams {
  Chunks chunks;
  Operand a, b, x, out;
  float scale = 1;
  const GateRecord* records = nullptr;
  const float* gamma = nullptr;
  const float* z = nullptr;  ///< kDq, kDk with normalize; else null
  // kH
  bool normalize = true;
  float eps = 0;
  float* product = nullptr;  ///< (B,T,NH) or null
  // kDq, kDk: row dots of out with q (k), summed over tiles by the gate gradients
  Operand dot;
  float* dots = nullptr;  ///< [tiles][NH][slots][L]
  Anchors anchors;
  // States: C or dC as [DQK][DV], n or dn as [DQK], float32. Item = ((sequence * NH) + head) * segments + segment.
  int32_t dqk = 0, dv = 0;
  const float *start_c = nullptr,
              *start_n = nullptr;  ///< [item]...: enters a segment in its direction; null: zero
  float *end_c = nullptr,
        *end_n = nullptr;  ///< [sequence * NH + head]...: after the last segment; or null
  int32_t stages = 1;      ///< tiles in flight: 1 or 2, by shared memory
  // out: the state entering each chunk in its direction, written by the state kernel
  const void* states =
      nullptr;  ///< [NH][slots][planes][DQK padded to 64][DV padded to 64] bfloat16
  const float* state_n = nullptr;  ///< [NH][slots][DQK padded to 64]
};

/// state: C (B = k, X = v, weights u, forward) or dC (B = q, X = G, weights w, backward) over the chunks of a segment.
struct StateParams {
  Chunks chunks;
  bool reverse = false;
  Operand b, x;
  const GateRecord* records = nullptr;
  const float* gamma = nullptr;
  const float* z =
      nullptr;  ///< with reverse: n's weights are w z instead of u; null: n is not computed in reverse
  int32_t dqk = 0, dv = 0;
  const float *start_c = nullptr, *start_n = nullptr;  ///< as in SweepParams
  float *end_c = nullptr, *end_n = nullptr;            ///< as in SweepParams
  void* states = nullptr;                              ///< as in SweepParams, or null
  float* state_n = nullptr;                            ///< as in SweepParams, or null
  // Sums of one segment alone, from nothing: [item][DQK][DV], [item][DQK], and the product of its gammas [item]; or null.
  float *segment_c = nullptr, *segment_n = nullptr, *segment_gamma = nullptr;
  int32_t stages = 1;
};

/// anchors, after the forward and, with `dot`, after the reverse state kernel.
struct AnchorParams {
  Chunks chunks;
  Anchors anchors;
  bool dot = false;
  int32_t dqk = 0, dv = 0, planes = 1;
  void* states = nullptr;    ///< as in SweepParams
  float* state_n = nullptr;  ///< as in SweepParams
};

/// segment scan: turns the segments' own sums into the states that enter them, in place.
struct SegmentScanParams {
  int32_t items = 0;  ///< sequences * heads
  int32_t segments = 1;
  bool reverse = false;
  int64_t size = 0;              ///< elements per item
  const float* start = nullptr;  ///< [item][size] or null
  const float* gamma = nullptr;  ///< [item][segment]
  float* sums = nullptr;         ///< [item][segment][size]
  bool vector = false;           ///< set by the launch: 16 bytes at a time
};

/// gate gradients: one block per head and run of tokens between anchors. With r_t = q_t . dq_t and c_t = k_t . dk_t (float32, before rounding):
///   d log i_t = c_t    d log sigmoid(f)_t = sum_{t' < t} (c_t' - r_t') + <C_0, dC_0> + <n_0, dn_0>, from the last reset on
/// At the end of the sequence the sum is <C, dC> + <n, dn> of the final states, and 0 before a reset.
struct StateAndGradient {
  const float *c = nullptr, *dc = nullptr, *n = nullptr, *dn = nullptr;
};
struct GateGradientParams {
  Chunks chunks;
  View igate, fgate;
  Dtype igate_dtype, fgate_dtype;
  bool sigmoid_input_gate = false;
  const bool* reset = nullptr;
  int64_t reset_batch = 0, reset_time = 0;
  const float *dots_r = nullptr, *dots_c = nullptr;  ///< [tiles][NH][slots][L]
  int32_t tiles = 1;
  Anchors anchors;
  int32_t anchor_tiles = 1;
  int64_t state_size = 0, n_size = 0;  ///< DQK * DV, DQK
  StateAndGradient start,              ///< null without an initial state
      end;                             ///< null where the final states have no gradients
  View digate, dfgate;
};

/// step: one token, the state updated in place. One block per (batch, head, tile of DV).
struct StepParams {
  MlstmStep call;
  int32_t batch = 0, num_heads = 0, dqk = 0, dv = 0;
  Dtype dtype, igate_dtype, fgate_dtype;
  bool sigmoid_input_gate = false, normalize = true;
  float scale = 1, eps = 0;
};

}  // namespace xlstm::cuda
