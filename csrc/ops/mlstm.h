#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace xlstm::ops {

struct MlstmOptions {
  std::optional<at::Tensor> reset;       ///< (B,T) bool: the state is empty before that token
  std::optional<at::Tensor> cu_seqlens;  ///< (N+1) integers; B must be 1; states are then (N,...)
  std::string_view input_gate = "exp";   ///< "exp" | "sigmoid"
  bool normalize = true;                 ///< false: h is not divided
  std::optional<double> scale;           ///< applied to q; default DQK^-1/2
  double eps = 1e-6;                     ///< added to the divisor of h
  /// 0: automatic, above 1024: 1024; never changes the result beyond rounding
  int64_t chunk_size = 0;
};

/// mLSTM over a sequence (arXiv 2405.04517, eq. 19-27), chunkwise-parallel, linear memory in T.
///   m_t = max(logsig(f_t) + m_{t-1}, i_t)   C_t = f' C_{t-1} + i' k_t v_t^T   n_t = f' n_{t-1} + i' k_t
///   h_t = C_t^T (scale q_t) / (max(|n_t . scale q_t|, exp(-m_t)) + eps)
/// q,k (B,T,NH,DQK)  v (B,T,NH,DV)  igate,fgate (B,T,NH) pre-activations; any strides; T >= 0.
/// c0 (B,NH,DQK,DV) n0 (B,NH,DQK) m0 (B,NH): float32 (float64 for float64 inputs), all or none, which is zero.
/// Returns h (B,T,NH,DV) in q's dtype and the states c, n, m after the last token, shaped as c0, n0, m0.
/// input_gate "sigmoid": logsig(i_t) in place of i_t, and every m is 0, m0 too, which may be absent. normalize = false:
/// h_t = C_t^T (scale q_t), meant for the sigmoid gate (with "exp" it is h relative to e^m); n0 may be absent.
/// Gradients are exact with m detached: m carries no gradient and dm0 = 0; the path eps -> m is left out, which
/// is nothing at eps = 0 and at most 1e-3 of the gate gradients in extreme gates at 1e-6. Those of the last c and n mean
/// c and n in units of e^m.
/// A forget gate whose logarithm is below -1e8 forgets everything, whatever the input gate. Numbers that are not finite in
/// v may reach earlier tokens of their chunk. Throws c10::Error (Python: RuntimeError) naming the argument, what was
/// expected and what came; so for cu_seqlens that do not rise from 0 to T. The CUDA kernels do not look at these, which
/// would wait for the device: there the first counts as 0, the last as T, others beyond as the nearer of both, one that
/// falls as the one before. On CUDA numbers that are not finite may reach other documents of their row past a reset,
/// though never past a border of cu_seqlens.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlstm_chunkwise(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& igate,
    const at::Tensor& fgate, const std::optional<at::Tensor>& c0 = {},
    const std::optional<at::Tensor>& n0 = {}, const std::optional<at::Tensor>& m0 = {},
    const MlstmOptions& options = {});

/// One token, without a T axis: q,k (B,NH,DQK) v (B,NH,DV) igate,fgate (B,NH). Updates c, n, m in place; returns h
/// (B,NH,DV). No gradient.
at::Tensor mlstm_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                      at::Tensor& n, at::Tensor& m, const MlstmOptions& options = {});

/// What an mLSTM layer of C channels does before its cell: Q, K and V are block-diagonal with blocks of S channels. In x's
/// dtype but for the convolution's, which may have any.
struct MlstmInputParameters {
  at::Tensor conv_weight;               ///< (C,W), W of 2 to 8, as of causal_conv1d
  std::optional<at::Tensor> conv_bias;  ///< (C)
  at::Tensor q_weight;                  ///< (C/S,S,S), as of block_linear
  std::optional<at::Tensor> q_bias;     ///< (C)
  at::Tensor k_weight;                  ///< (C/S,S,S)
  std::optional<at::Tensor> k_bias;     ///< (C)
  at::Tensor v_weight;                  ///< (C/S,S,S)
  std::optional<at::Tensor> v_bias;     ///< (C)
  at::Tensor igate_weight;              ///< (NH,3*C)
  at::Tensor igate_bias;                ///< (NH)
  at::Tensor fgate_weight;              ///< (NH,3*C)
  at::Tensor fgate_bias;                ///< (NH)
};
struct MlstmStepInputs {
  at::Tensor a, q, k, v;    ///< (B,C)
  at::Tensor igate, fgate;  ///< (B,NH) pre-activations
};

/// What mlstm_step reads of one token of an mLSTM layer, from the layer's inner features x (B,C) on; on CUDA in one kernel for
/// blocks of S = 2, 4 or 8. With the inputs before the token, oldest first, in window (B,W-1,C), which is shifted in place:
///   a = silu(conv_bias + sum_j conv_weight[:, j] x_{t-W+1+j})
///   q = Q a + q_bias   k = K a + k_bias   v = V x + v_bias
///   igate = igate_weight [q, k, v] + igate_bias   fgate = fgate_weight [q, k, v] + fgate_bias
/// Returns a, q, k, v (B,C) and igate, fgate (B,NH) in x's dtype, to which each is rounded before it is read again: what
/// causal_conv1d_step, block_linear and a linear map give. Autocast changes nothing. Throws c10::Error naming the argument. No
/// gradient.
MlstmStepInputs mlstm_step_inputs(const at::Tensor& x, const MlstmInputParameters& parameters,
                                  at::Tensor& window);

/// Up to R - 1 tokens of every head that its state does not hold yet: c, n and m are of the time before them. All on the
/// device of c; what lies beyond count is unspecified.
struct MlstmRing {
  /// R as the decoder has it, and the most that the CUDA kernels take
  static constexpr int64_t kTokens = 16;
  at::Tensor keys;    ///< (B,NH,R,DQK), R >= 1, in q's dtype (under autocast: in its dtype)
  at::Tensor values;  ///< (B,NH,R,DV), as keys
  at::Tensor gates;   ///< (B,NH,R,2): logarithms of forget and input gate, in the dtype of c
  at::Tensor count;   ///< (B,NH) int32, 0 to R - 1
};

/// An empty ring for k (B,NH,DQK) and v (B,NH,DV).
MlstmRing empty_mlstm_ring(const at::Tensor& k, const at::Tensor& v,
                           int64_t tokens = MlstmRing::kTokens);

/// mlstm_step that reads C and writes it every Rth token alone: the token joins the ring, and a full ring is folded into
/// c, n and m, which leaves it empty. With b_j the sum of log forget gates after token j of the ring, and b and m_0 those
/// of the state,
///   m = max(b + m_0, max_j (b_j + i_j))   w = exp(b + m_0 - m)   w_j = exp(b_j + i_j - m)
///   h = (w C^T q + sum_j w_j (q . k_j) v_j) / (max(|w n . q + sum_j w_j (q . k_j)|, exp(-m)) + eps)   q as scaled
///   fold: C <- w C + sum_j w_j k_j v_j^T   n <- w n + sum_j w_j k_j   m_0 <- m
/// which is the chunkwise form of a chunk that began at the last fold: h and, after mlstm_fold, the states are those of
/// mlstm_step up to rounding. q, k, v, igate, fgate, c, n, m, options and errors as of mlstm_step. Writes to c, n, m and
/// the ring; reads no value back from a GPU, where count is not checked.
at::Tensor mlstm_step_lazy(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                           at::Tensor& n, at::Tensor& m, MlstmRing& ring,
                           const MlstmOptions& options = {});

/// Brings c, n and m up to date and empties the ring; of the options only input_gate counts. No gradient.
void mlstm_fold(at::Tensor& c, at::Tensor& n, at::Tensor& m, MlstmRing& ring,
                const MlstmOptions& options = {});

/// Whether mlstm_step_lazy on tokens as k (B,NH,DQK) and v (B,NH,DV) is to be preferred to mlstm_step: where
/// mlstm_lazy_moves_less, on CUDA if the kernels take them, on the CPU if C is too large for its caches.
bool mlstm_step_lazy_pays(const at::Tensor& k, const at::Tensor& v);
/// Whether reading C, writing and reading it once more every kTokens, and reading a ring of keys and values of so many
/// bytes each moves less memory than reading and writing C at every token.
bool mlstm_lazy_moves_less(int64_t dqk, int64_t dv, int64_t element_bytes);

}  // namespace xlstm::ops
