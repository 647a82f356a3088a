#pragma once
// Gradients of one chunk of the mLSTM: the exact gradient of the chunkwise form with the stabiliser m held constant. Everything but
// h is computed again from the inputs. Per chunk, with P, D, w, u, gamma, N as in the forward kernel (w and D carry the
// scale of q), C the state that enters and dC the gradient of the state that leaves:
//   G = dH / N     z = -<G, h> sign(l) [|l| > exp(-m)],  l = sum_s P + (w q) . n
//   dS = (G V^T + z) o D
//   dq = dS K + (w G) C^T + w z n      dk = dS^T Q + (u V) dC^T + u dn      dv = P^T G + (u K) dC
//   dC <- gamma dC + Q^T (w G)         dn <- gamma dn + Q^T (w z)
//   d log i = <k, dk>                  d log f_t = sum_{t' >= t} (<q, dq> - <k, dk>) + <C', dC> + <n', dn>  (' = leaving)
#include "csrc/ops/cpu/mlstm_sweep.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {

template <class T>
class ChunkBackward {
 public:
  explicit ChunkBackward(const MlstmChunkwiseParams& params)
      : p(params),
        gates(params),
        rows_(params.max_length),
        q_(rows_ * params.dqk),
        k_(rows_ * params.dqk),
        v_(rows_ * params.dv),
        h_(rows_ * params.dv),
        dh_(rows_ * params.dv),
        dq_(rows_ * params.dqk),
        dk_(rows_ * params.dqk),
        dv_(rows_ * params.dv),
        g_(rows_ * params.dv),
        weighted_g_(rows_ * params.dv),
        weighted_(rows_ * max_of(params.dqk, params.dv)),
        probs_(rows_ * rows_),
        decay_(rows_ * rows_),
        dscores_(rows_ * rows_),
        z_(rows_),
        digate_(rows_),
        dfgate_(rows_) {}

  /// Gates, scores, G and z of a chunk. state: what enters it (not read where the chunk is fresh).
  void prepare(const MlstmChunk& chunk, int64_t head, double m_start, StateRef<T> state) {
    gates.compute(chunk, head, m_start);
    const int64_t length = chunk.length;
    q = load_tile<T>(p.q, chunk, head, p.dqk, q_);
    k = load_tile<T>(p.k, chunk, head, p.dqk, k_);
    v = load_tile<T>(p.v, chunk, head, p.dv, v_);
    const Tile<const T> h = load_tile<T>(p.h, chunk, head, p.dv, h_);
    const Tile<const T> dh = load_tile<T>(p.dh, chunk, head, p.dv, dh_);
    causal_scores<T>(length, p.dqk, q, k, probs_);
    for (int64_t t = 0; t < length; ++t) {
      T *probs = probs_ + t * length, *decay = decay_ + t * length, *g = g_ + t * p.dv;
      gates.decay_row(decay, t);
      T sum = multiply_sum(probs, decay, t + 1);
      zero_row(probs + t + 1, causal_end(t, length) - t - 1);
      if (!chunk.fresh) sum += gates.w[t] * dot<T>(q.row(t), state.n, p.dqk);
      const T size = sum < 0 ? -sum : sum;
      const bool active = p.normalize && !(size <= gates.exp_neg_m[t]);  // also where NaN
      T norm = 1;
      if (p.normalize) norm = (active ? size : gates.exp_neg_m[t]) + static_cast<T>(p.eps);
      scale_row<T>(g, dh.row(t), T(1) / norm, p.dv);
      if (!chunk.fresh) scale_row<T>(weighted_g_ + t * p.dv, g, gates.w[t], p.dv);
      const T projection = active ? dot<T>(g, h.row(t), p.dv) : T(0);
      z_[t] = sum < 0 ? projection : -projection;
    }
  }

  /// After prepare: all gradients. state: what enters the chunk. end, dend: the state that leaves it and its gradient,
  /// null where none does.
  void gradients(const MlstmChunk& chunk, int64_t head, StateRef<T> state, StateRef<T> end,
                 StateRef<T> dend) {
    const Tile<T> dq = output_tile<T>(p.dq, chunk, head, p.dqk, dq_);
    const Tile<T> dk = output_tile<T>(p.dk, chunk, head, p.dqk, dk_);
    const Tile<T> dv = output_tile<T>(p.dv_out, chunk, head, p.dv, dv_);
    score_gradients(chunk.length);
    value_gradients(chunk.length, dv, dend);
    key_gradients(chunk.length, dk, dend);
    query_gradients(chunk, dq, state);
    finish_rows(chunk, head, dq, dk, state, end, dend);
    store_tile(p.dq, chunk, head, p.dqk, dq);
    store_tile(p.dk, chunk, head, p.dqk, dk);
    store_tile(p.dv_out, chunk, head, p.dv, dv);
  }

  /// dstate <- gamma dstate + what the chunk's outputs ask of the state that enters; `empty`: nothing came from behind.
  void update_dstate(int64_t length, StateRef<T> dstate, bool empty) {
    gemm<T>(Op::kTranspose, Op::kNone, p.dqk, p.dv, length, T(1), q.data, q.ld, weighted_g_, p.dv,
            empty ? T(0) : gates.gamma, dstate.c, p.dv);
    if (empty) {
      zero_row(dstate.n, p.dqk);
    } else {
      scale_row<T>(dstate.n, dstate.n, gates.gamma, p.dqk);
    }
    for (int64_t t = 0; t < length; ++t) add_row<T>(dstate.n, q.row(t), gates.w[t] * z_[t], p.dqk);
  }

  const MlstmChunkwiseParams& p;
  ChunkGates<T> gates;
  Tile<const T> q{}, k{}, v{};

 private:
  void score_gradients(int64_t length) {
    causal_scores<T>(length, p.dv, {g_, p.dv}, v, dscores_);
    for (int64_t t = 0; t < length; ++t) {
      T* row = dscores_ + t * length;
      const T *decay = decay_ + t * length, z = z_[t];
      for (int64_t s = 0; s <= t; ++s) row[s] = (row[s] + z) * decay[s];
      zero_row(row + t + 1, causal_end(t, length) - t - 1);
    }
  }

  void value_gradients(int64_t length, const Tile<T>& dv, StateRef<T> dend) {
    causal_transposed_times<T>(length, p.dv, probs_, {g_, p.dv}, dv);
    if (dend.n == nullptr) return;
    for (int64_t s = 0; s < length; ++s)
      scale_row<T>(weighted_ + s * p.dqk, k.row(s), gates.u[s], p.dqk);
    gemm<T>(Op::kNone, Op::kNone, length, p.dv, p.dqk, T(1), weighted_, p.dqk, dend.c, p.dv, T(1),
            dv.data, dv.ld);
  }

  void key_gradients(int64_t length, const Tile<T>& dk, StateRef<T> dend) {
    causal_transposed_times<T>(length, p.dqk, dscores_, q, dk);
    if (dend.n == nullptr) return;
    for (int64_t s = 0; s < length; ++s)
      scale_row<T>(weighted_ + s * p.dv, v.row(s), gates.u[s], p.dv);
    gemm<T>(Op::kNone, Op::kTranspose, length, p.dqk, p.dv, T(1), weighted_, p.dv, dend.c, p.dv,
            T(1), dk.data, dk.ld);
  }

  void query_gradients(const MlstmChunk& chunk, const Tile<T>& dq, StateRef<T> state) {
    const int64_t length = chunk.length;
    causal_times<T>(length, p.dqk, dscores_, k, dq);
    if (chunk.fresh) return;
    gemm<T>(Op::kNone, Op::kTranspose, length, p.dqk, p.dv, T(1), weighted_g_, p.dv, state.c, p.dv,
            T(1), dq.data, dq.ld);
  }

  /// The normaliser's share of dq and dk, and the gates, which need the finished rows.
  void finish_rows(const MlstmChunk& chunk, int64_t head, const Tile<T>& dq, const Tile<T>& dk,
                   StateRef<T> state, StateRef<T> end, StateRef<T> dend) {
    const int64_t length = chunk.length;
    double sum = 0;
    if (dend.n != nullptr) {
      for (int64_t i = 0; i < p.dqk; ++i) sum += dot<T>(end.c + i * p.dv, dend.c + i * p.dv, p.dv);
      sum += dot<T>(end.n, dend.n, p.dqk);
    }
    for (int64_t t = length - 1; t >= 0; --t) {
      if (dend.n != nullptr) add_row<T>(dk.row(t), dend.n, gates.u[t], p.dqk);
      if (!chunk.fresh) add_row<T>(dq.row(t), state.n, gates.w[t] * z_[t], p.dqk);
      digate_[t] = dot<T>(k.row(t), dk.row(t), p.dqk);
      sum += dot<T>(q.row(t), dq.row(t), p.dqk) - digate_[t];
      dfgate_[t] = sum;
    }
    if (chunk.fresh) dfgate_[0] = 0;  // it acts on the empty state
    times_sigmoid_neg(dfgate_, gates.forget, length);
    if (p.sigmoid_input_gate) times_sigmoid_neg(digate_, gates.input, length);
    scatter_row<double>(p.digate.data, p.digate.dtype, offset_of(p.digate, chunk, head),
                        p.digate.time, digate_, length);
    scatter_row<double>(p.dfgate.data, p.dfgate.dtype, offset_of(p.dfgate, chunk, head),
                        p.dfgate.time, dfgate_, length);
  }

  int64_t rows_;
  Buffer<T> q_, k_, v_, h_, dh_, dq_, dk_, dv_, g_, weighted_g_, weighted_, probs_, decay_,
      dscores_, z_;
  Buffer<double> digate_, dfgate_;
};

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
