// mLSTM backward on the CPU: the exact gradient of the chunkwise form with the stabiliser m held constant. Everything but
// h is computed again from the inputs. Per chunk, with P, D, w, u, gamma, N as in the forward kernel (w and D carry the
// scale of q), C the state that enters and dC the gradient of the state that leaves:
//   G = dH / N     z = -<G, h> sign(l) [|l| > exp(-m)],  l = sum_s P + (w q) . n
//   dS = (G V^T + z) o D
//   dq = dS K + (w G) C^T + w z n      dk = dS^T Q + (u V) dC^T + u dn      dv = P^T G + (u K) dC
//   dC <- gamma dC + Q^T (w G)         dn <- gamma dn + Q^T (w z)
//   d log i = <k, dk>                  d log f_t = sum_{t' >= t} (<q, dq> - <k, dk>) + <C', dC> + <n', dn>  (' = leaving)
#include "csrc/ops/cpu/mlstm_sweep.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

/// Gradients of one chunk.
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
    gemm<T>(Op::kNone, Op::kTranspose, length, length, p.dqk, T(1), q.data, q.ld, k.data, k.ld,
            T(0), probs_, length);
    for (int64_t t = 0; t < length; ++t) {
      T *probs = probs_ + t * length, *decay = decay_ + t * length, *g = g_ + t * p.dv;
      gates.decay_row(decay, t);
      T sum = multiply_sum(probs, decay, t + 1);
      zero_row(probs + t + 1, length - t - 1);
      if (!p.normalize) {
        copy_row(g, dh.row(t), p.dv);
        z_[t] = 0;
        continue;
      }
      if (!chunk.fresh) sum += gates.w[t] * dot<T>(q.row(t), state.n, p.dqk);
      const T size = sum < 0 ? -sum : sum;
      const bool active = !(size <= gates.exp_neg_m[t]);  // also where NaN
      const T norm = (active ? size : gates.exp_neg_m[t]) + static_cast<T>(p.eps);
      scale_row<T>(g, dh.row(t), T(1) / norm, p.dv);
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
    gate_gradients(chunk, head, dq, dk, end, dend);
    store_tile(p.dq, chunk, head, p.dqk, dq);
    store_tile(p.dk, chunk, head, p.dqk, dk);
    store_tile(p.dv_out, chunk, head, p.dv, dv);
  }

  /// dstate <- gamma dstate + what the chunk's outputs ask of the state that enters; `empty`: nothing came from behind.
  void update_dstate(int64_t length, StateRef<T> dstate, bool empty) {
    for (int64_t t = 0; t < length; ++t)
      scale_row<T>(weighted_ + t * p.dv, g_ + t * p.dv, gates.w[t], p.dv);
    gemm<T>(Op::kTranspose, Op::kNone, p.dqk, p.dv, length, T(1), q.data, q.ld, weighted_, p.dv,
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
    gemm<T>(Op::kNone, Op::kTranspose, length, length, p.dv, T(1), g_, p.dv, v.data, v.ld, T(0),
            dscores_, length);
    for (int64_t t = 0; t < length; ++t) {
      T* row = dscores_ + t * length;
      const T *decay = decay_ + t * length, z = z_[t];
      for (int64_t s = 0; s <= t; ++s) row[s] = (row[s] + z) * decay[s];
      zero_row(row + t + 1, length - t - 1);
    }
  }

  void value_gradients(int64_t length, const Tile<T>& dv, StateRef<T> dend) {
    gemm<T>(Op::kTranspose, Op::kNone, length, p.dv, length, T(1), probs_, length, g_, p.dv, T(0),
            dv.data, dv.ld);
    if (dend.c == nullptr) return;
    for (int64_t s = 0; s < length; ++s)
      scale_row<T>(weighted_ + s * p.dqk, k.row(s), gates.u[s], p.dqk);
    gemm<T>(Op::kNone, Op::kNone, length, p.dv, p.dqk, T(1), weighted_, p.dqk, dend.c, p.dv, T(1),
            dv.data, dv.ld);
  }

  void key_gradients(int64_t length, const Tile<T>& dk, StateRef<T> dend) {
    gemm<T>(Op::kTranspose, Op::kNone, length, p.dqk, length, T(1), dscores_, length, q.data, q.ld,
            T(0), dk.data, dk.ld);
    if (dend.c == nullptr) return;
    for (int64_t s = 0; s < length; ++s)
      scale_row<T>(weighted_ + s * p.dv, v.row(s), gates.u[s], p.dv);
    gemm<T>(Op::kNone, Op::kTranspose, length, p.dqk, p.dv, T(1), weighted_, p.dv, dend.c, p.dv,
            T(1), dk.data, dk.ld);
    for (int64_t s = 0; s < length; ++s) add_row<T>(dk.row(s), dend.n, gates.u[s], p.dqk);
  }

  void query_gradients(const MlstmChunk& chunk, const Tile<T>& dq, StateRef<T> state) {
    const int64_t length = chunk.length;
    gemm<T>(Op::kNone, Op::kNone, length, p.dqk, length, T(1), dscores_, length, k.data, k.ld, T(0),
            dq.data, dq.ld);
    if (chunk.fresh) return;
    for (int64_t t = 0; t < length; ++t)
      scale_row<T>(weighted_ + t * p.dv, g_ + t * p.dv, gates.w[t], p.dv);
    gemm<T>(Op::kNone, Op::kTranspose, length, p.dqk, p.dv, T(1), weighted_, p.dv, state.c, p.dv,
            T(1), dq.data, dq.ld);
    for (int64_t t = 0; t < length; ++t) add_row<T>(dq.row(t), state.n, gates.w[t] * z_[t], p.dqk);
  }

  void gate_gradients(const MlstmChunk& chunk, int64_t head, const Tile<T>& dq, const Tile<T>& dk,
                      StateRef<T> end, StateRef<T> dend) {
    const int64_t length = chunk.length;
    double sum = 0;
    if (dend.c != nullptr) {
      for (int64_t i = 0; i < p.dqk; ++i) sum += dot<T>(end.c + i * p.dv, dend.c + i * p.dv, p.dv);
      sum += dot<T>(end.n, dend.n, p.dqk);
    }
    for (int64_t t = length - 1; t >= 0; --t) {
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
  Buffer<T> q_, k_, v_, h_, dh_, dq_, dk_, dv_, g_, weighted_, probs_, decay_, dscores_, z_;
  Buffer<double> digate_, dfgate_;
};

/// A row of states with their stabilisers.
template <class T>
class StateSlots {
 public:
  StateSlots(const MlstmChunkwiseParams& p, int64_t slots)
      : c_size_(p.dqk * p.dv), size_(c_size_ + p.dqk), data_(slots * size_), m_(slots) {}
  StateRef<T> at(int64_t slot) const {
    T* start = data_ + slot * size_;
    return {start, start + c_size_};
  }
  double& m(int64_t slot) const { return m_[slot]; }
  void copy_from(int64_t slot, const StateSlots& other, int64_t other_slot) const {
    copy_row(at(slot).c, other.at(other_slot).c, size_);
    m(slot) = other.m(other_slot);
  }

 private:
  int64_t c_size_, size_;
  Buffer<T> data_;
  Buffer<double> m_;
};

/// Sweeps through a part: forward for the states, a span at a time, then in reverse for the gradients.
template <class T>
class BackwardWorker {
 public:
  /// dends: the state gradient that leaves each part, null where a sequence is one part. local: do not write gradients;
  /// sum what the part alone asks of the state that enters it, into dends.
  BackwardWorker(const MlstmChunkwiseParams& params, const PartStarts<T>* starts,
                 const PartStates<T>* dends, bool local)
      : p(params),
        starts_(starts),
        dends_(dends),
        local_(local),
        chunk_(params),
        update_(params),
        k_(params.max_length * params.dqk),
        v_(params.max_length * params.dv),
        states_(params, params.span_chunks + 1),
        span_starts_(params, max_of(1, (params.max_part_chunks + params.span_chunks - 1) /
                                           params.span_chunks)),
        dc_(params.dqk * params.dv),
        dn_(params.dqk) {}

  void run(int64_t item) {
    const int64_t index = item / p.num_heads, head = item % p.num_heads;
    const MlstmPart& part = p.parts[index];
    if (local_ && part.first) return;  // nobody asks for what enters it
    empty_ = cut_ = false;
    decay_product_ = 1;
    load_dend(part, index, head);
    load_start(part, index, head);
    const int64_t span = p.span_chunks, end = part.chunk_end;
    const int64_t count = (end - part.chunk_begin + span - 1) / span;
    for (int64_t j = 0; j < count; ++j) {
      fill_states(part, head, j);
      if (j + 1 < count) span_starts_.copy_from(j + 1, states_, span);
    }
    for (int64_t j = count - 1; j >= 0; --j) {
      if (j + 1 < count) fill_states(part, head, j);
      const int64_t first = part.chunk_begin + j * span;
      for (int64_t i = min_of(end, first + span) - 1; i >= first; --i)
        run_chunk(part, i, i - first, head);
    }
    if (local_) {
      save_local(index, head);
    } else if (part.first) {
      save_dstart(part, head);
    }
  }

 private:
  /// The states around the chunks of span j, as far as a state is passed on: slot i enters the span's chunk i.
  void fill_states(const MlstmPart& part, int64_t head, int64_t j) {
    const int64_t begin = part.chunk_begin + j * p.span_chunks,
                  end = min_of(part.chunk_end, begin + p.span_chunks);
    states_.copy_from(0, span_starts_, j);
    for (int64_t i = begin, slot = 0; i < end; ++i, ++slot) {
      const MlstmChunk& chunk = p.chunks[i];
      if (chunk.fresh) states_.m(slot) = 0;
      states_.m(slot + 1) = 0;
      if (!has_successor(p, part, i, p.dc != nullptr)) continue;
      chunk_.gates.compute(chunk, head, states_.m(slot));
      states_.m(slot + 1) = chunk_.gates.m_end;
      update_.run(chunk_.gates, load_tile<T>(p.k, chunk, head, p.dqk, k_),
                  load_tile<T>(p.v, chunk, head, p.dv, v_),
                  chunk.fresh ? StateRef<T>{nullptr, nullptr} : states_.at(slot),
                  states_.at(slot + 1));
    }
  }

  void run_chunk(const MlstmPart& part, int64_t i, int64_t slot, int64_t head) {
    const MlstmChunk& chunk = p.chunks[i];
    const StateRef<T> state = states_.at(slot), dstate{dc_, dn_}, none{nullptr, nullptr};
    const bool passed_on = has_successor(p, part, i, p.dc != nullptr);
    if (!passed_on || chunk.fresh) cut_ = true;
    if (!passed_on) empty_ = true;
    if (local_ && chunk.fresh) {
      empty_ = true;
      return;
    }
    chunk_.prepare(chunk, head, states_.m(slot), state);
    if (!local_) {
      chunk_.gradients(chunk, head, state, passed_on ? states_.at(slot + 1) : none,
                       passed_on ? dstate : none);
    }
    if (chunk.fresh) {
      empty_ = true;
    } else {
      chunk_.update_dstate(chunk.length, dstate, empty_);
      decay_product_ *= chunk_.gates.gamma;
      empty_ = false;
    }
  }

  void load_dend(const MlstmPart& part, int64_t index, int64_t head) {
    if (local_) {
      empty_ = true;
    } else if (dends_ != nullptr) {
      copy_row<T>(dc_, dends_->at(index, head).c, p.dqk * p.dv);
      copy_row<T>(dn_, dends_->at(index, head).n, p.dqk);
    } else {
      copy_or_zero<T>(dc_, head_of<T>(p.dc, part.sequence, head, p, p.dqk * p.dv), p.dqk * p.dv);
      copy_or_zero<T>(dn_, head_of<T>(p.dn, part.sequence, head, p, p.dqk), p.dqk);
    }
  }

  void load_start(const MlstmPart& part, int64_t index, int64_t head) {
    const StateRef<T> state = span_starts_.at(0);
    if (starts_ == nullptr) {
      load_start_state<T>(p, part.sequence, head, state);
      span_starts_.m(0) = start_m<T>(p, part.sequence, head);
    } else {
      copy_row<T>(state.c, starts_->states.at(index, head).c, starts_->states.size);
      span_starts_.m(0) = part.chunk_begin == part.chunk_end
                              ? 0
                              : starts_->m_starts[part.chunk_begin * p.num_heads + head];
    }
  }

  void save_local(int64_t index, int64_t head) {
    const StateRef<T> to = dends_->at(index, head);
    copy_or_zero<T>(to.c, empty_ ? nullptr : static_cast<T*>(dc_), p.dqk * p.dv);
    copy_or_zero<T>(to.n, empty_ ? nullptr : static_cast<T*>(dn_), p.dqk);
    dends_->decay_at(index, head) = cut_ ? T(-1) : decay_product_;
  }

  void save_dstart(const MlstmPart& part, int64_t head) {
    T* dc0 = head_of<T>(p.dc0, part.sequence, head, p, p.dqk * p.dv);
    T* dn0 = head_of<T>(p.dn0, part.sequence, head, p, p.dqk);
    if (dc0 != nullptr) copy_or_zero<T>(dc0, empty_ ? nullptr : static_cast<T*>(dc_), p.dqk * p.dv);
    if (dn0 != nullptr) copy_or_zero<T>(dn0, empty_ ? nullptr : static_cast<T*>(dn_), p.dqk);
  }

  const MlstmChunkwiseParams& p;
  const PartStarts<T>* starts_;
  const PartStates<T>* dends_;
  bool local_;
  ChunkBackward<T> chunk_;
  StateUpdate<T> update_;
  Buffer<T> k_, v_;
  StateSlots<T> states_, span_starts_;
  Buffer<T> dc_, dn_;
  bool empty_ = false;  // dc_, dn_ hold nothing: they count as zero
  bool cut_ = false;    // a reset lies in the part
  T decay_product_ = 1;
};

/// Turns the parts' own sums into the state gradients that leave them.
template <class T>
class DstateScanWorker {
 public:
  DstateScanWorker(const MlstmChunkwiseParams& params, const PartStates<T>& states)
      : p(params), states_(states), carried_(states.size) {}
  void run(int64_t head) {
    for (int64_t index = p.num_parts - 1; index >= 0; --index) {
      const MlstmPart& part = p.parts[index];
      if (part.last) {
        copy_or_zero<T>(carried_, head_of<T>(p.dc, part.sequence, head, p, states_.c_size),
                        states_.c_size);
        copy_or_zero<T>(carried_ + states_.c_size, head_of<T>(p.dn, part.sequence, head, p, p.dqk),
                        p.dqk);
      }
      if (part.first) {
        copy_row<T>(states_.at(index, head).c, carried_, states_.size);
      } else {
        scan_step<T>(carried_, states_.at(index, head).c, states_.decay_at(index, head),
                     states_.size);
      }
    }
  }

 private:
  const MlstmChunkwiseParams& p;
  const PartStates<T>& states_;
  Buffer<T> carried_;
};

template <class T>
void backward(const MlstmChunkwiseParams& p) {
  using Starts = const PartStarts<T>*;
  using Dends = const PartStates<T>*;
  const int64_t items = p.num_parts * p.num_heads;
  if (p.num_parts == p.num_sequences) {
    run_items<BackwardWorker<T>>(items, p, Starts(nullptr), Dends(nullptr), false);
    return;
  }
  const PartStarts<T> starts(p);
  const PartStates<T> dends(p);
  run_items<BackwardWorker<T>>(items, p, Starts(&starts), Dends(&dends), true);
  run_items<DstateScanWorker<T>>(p.num_heads, p, dends);
  run_items<BackwardWorker<T>>(items, p, Starts(&starts), Dends(&dends), false);
}

}  // namespace

void mlstm_chunkwise_backward(const MlstmChunkwiseParams& p) {
  if (p.float64) {
    backward<double>(p);
  } else {
    backward<float>(p);
  }
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
