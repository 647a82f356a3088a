#pragma once
// What the forward and backward mLSTM kernels share: how work is handed to threads, the state of a head and its update
// over a chunk, and the split of a sequence into parts.
//
// One part per sequence is the ordinary case: a thread sweeps through the chunks of a (sequence, head) and carries the
// state. With more parts, the stabilisers of all chunks come first (they depend on the gates alone); then the recurrence
// C <- gamma C + (u k) v^T is linear with known coefficients, so each part sums its own tokens from an empty state, a scan
// over the parts turns those sums into start states, and every part is swept with its start state. The backward pass
// does the same with the state gradients, in reverse.
#include <ATen/Parallel.h>

#include "csrc/ops/cpu/gemm.h"
#include "csrc/ops/cpu/mlstm_gates.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {

/// Runs worker.run(i) for all i < count; each thread makes one Worker(p, args...) and takes the next free i, so that long
/// and short sequences share the threads evenly. Results do not depend on who runs what.
template <class Worker, class... Args>
void run_items(int64_t count, const MlstmChunkwiseParams& p, const Args&... args) {
  int64_t next = 0;
  const int64_t workers = min_of(count, p.num_threads);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Worker worker(p, args...);
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) return;
      worker.run(i);
    }
  });
}

// ---- products with a causal (lower triangular) length x length matrix ---------------------------------------------
// By blocks of rows, so that most of the upper triangle is neither computed nor read: entry (t, s) counts for
// s < causal_end(t, length), and must be zero there for s > t.

constexpr int64_t kCausalBlock = 32;
inline int64_t causal_end(int64_t t, int64_t length) {
  return min_of(length, (t / kCausalBlock + 1) * kCausalBlock);
}

/// scores = a b^T; a, b (length, width)
template <class T>
inline void causal_scores(int64_t length, int64_t width, const Tile<const T>& a,
                          const Tile<const T>& b, T* scores) {
  for (int64_t t = 0; t < length; t += kCausalBlock) {
    const int64_t end = causal_end(t, length);
    gemm<T>(Op::kNone, Op::kTranspose, end - t, end, width, T(1), a.row(t), a.ld, b.data, b.ld,
            T(0), scores + t * length, length);
  }
}

/// out = scores x; x, out (length, width)
template <class T>
inline void causal_times(int64_t length, int64_t width, const T* scores, const Tile<const T>& x,
                         const Tile<T>& out) {
  for (int64_t t = 0; t < length; t += kCausalBlock) {
    const int64_t end = causal_end(t, length);
    gemm<T>(Op::kNone, Op::kNone, end - t, width, end, T(1), scores + t * length, length, x.data,
            x.ld, T(0), out.row(t), out.ld);
  }
}

/// out = scores^T x
template <class T>
inline void causal_transposed_times(int64_t length, int64_t width, const T* scores,
                                    const Tile<const T>& x, const Tile<T>& out) {
  for (int64_t s = 0; s < length; s += kCausalBlock) {
    const int64_t end = causal_end(s, length);
    gemm<T>(Op::kTranspose, Op::kNone, end - s, width, length - s, T(1), scores + s * length + s,
            length, x.row(s), x.ld, T(0), out.row(s), out.ld);
  }
}

/// State of a head, or its gradient: (DQK,DV) and (DQK). Null pointers: the empty state.
template <class T>
struct StateRef {
  T* c;
  T* n;
};

/// One (C, n) per (part, head), plus how much of what enters the part leaves it.
template <class T>
struct PartStates {
  explicit PartStates(const MlstmChunkwiseParams& p)
      : heads(p.num_heads),
        c_size(p.dqk * p.dv),
        size(c_size + p.dqk),
        data(p.num_parts * heads * size),
        decay(p.num_parts * heads) {}
  StateRef<T> at(int64_t part, int64_t head) const {
    T* start = data + (part * heads + head) * size;
    return {start, start + c_size};
  }
  T& decay_at(int64_t part, int64_t head) const { return decay[part * heads + head]; }

  int64_t heads, c_size, size;
  Buffer<T> data, decay;  // decay: product of gamma; negative where the chain is cut by a reset
};

/// Whether state flows out of chunk i: into the next chunk of the sequence, or at its end where `at_end`.
inline bool has_successor(const MlstmChunkwiseParams& p, const MlstmPart& part, int64_t i,
                          bool at_end) {
  if (i + 1 < part.chunk_end || !part.last) return !p.chunks[i + 1].fresh;
  return at_end;
}

template <class T>
inline const T* head_of(const void* base, int64_t sequence, int64_t head,
                        const MlstmChunkwiseParams& p, int64_t width) {
  return base == nullptr ? nullptr
                         : static_cast<const T*>(base) + (sequence * p.num_heads + head) * width;
}
template <class T>
inline T* head_of(void* base, int64_t sequence, int64_t head, const MlstmChunkwiseParams& p,
                  int64_t width) {
  return base == nullptr ? nullptr
                         : static_cast<T*>(base) + (sequence * p.num_heads + head) * width;
}

/// dst = src, or zero where src is null
template <class T>
inline void copy_or_zero(T* dst, const T* src, int64_t count) {
  if (src != nullptr) {
    copy_row(dst, src, count);
  } else {
    zero_row(dst, count);
  }
}

template <class T>
inline double start_m(const MlstmChunkwiseParams& p, int64_t sequence, int64_t head) {
  const T* m0 = head_of<T>(p.m0, sequence, head, p, 1);
  return m0 == nullptr || p.sigmoid_input_gate ? 0.0
                                               : floor_nan(static_cast<double>(*m0), kMinLogInput);
}

/// Start state of a sequence: c0 and n0, zero where absent.
template <class T>
inline void load_start_state(const MlstmChunkwiseParams& p, int64_t sequence, int64_t head,
                             StateRef<T> state) {
  copy_or_zero(state.c, head_of<T>(p.c0, sequence, head, p, p.dqk * p.dv), p.dqk * p.dv);
  copy_or_zero(state.n, head_of<T>(p.n0, sequence, head, p, p.dqk), p.dqk);
}

/// The state update of one chunk, with its scratch.
template <class T>
class StateUpdate {
 public:
  explicit StateUpdate(const MlstmChunkwiseParams& params)
      : p(params), weighted_k_(params.max_length * params.dqk) {}

  /// to = gamma * from + (u k)^T v; from may be to, or have null pointers for the empty state. k, v: the chunk's tiles.
  void run(const ChunkGates<T>& gates, const Tile<const T>& k, const Tile<const T>& v,
           StateRef<T> from, StateRef<T> to) {
    const bool empty = from.c == nullptr;
    T beta = empty ? T(0) : gates.gamma;
    if (empty) {
      zero_row(to.n, p.dqk);
    } else {
      if (from.c != to.c) {
        scale_row(to.c, from.c, gates.gamma, p.dqk * p.dv);
        beta = T(1);
      }
      scale_row(to.n, from.n, gates.gamma, p.dqk);
    }
    for (int64_t s = 0; s < gates.length; ++s) {
      T* row = weighted_k_ + s * p.dqk;
      scale_row(row, k.row(s), gates.u[s], p.dqk);
      add_row(to.n, row, T(1), p.dqk);
    }
    gemm<T>(Op::kTranspose, Op::kNone, p.dqk, p.dv, gates.length, T(1), weighted_k_, p.dqk, v.data,
            v.ld, beta, to.c, p.dv);
  }

 private:
  const MlstmChunkwiseParams& p;
  Buffer<T> weighted_k_;
};

// ---- parts --------------------------------------------------------------------------------------------------------

/// Sum and peak of the gates of every chunk, (chunk, head).
template <class T>
class PeakWorker {
 public:
  PeakWorker(const MlstmChunkwiseParams& params, double* totals, double* peaks)
      : p(params), gates_(params), totals_(totals), peaks_(peaks) {}
  void run(int64_t item) {
    const MlstmPart& part = p.parts[item / p.num_heads];
    const int64_t head = item % p.num_heads;
    for (int64_t i = part.chunk_begin; i < part.chunk_end; ++i) {
      gates_.load(p.chunks[i], head);
      totals_[i * p.num_heads + head] = gates_.total;
      peaks_[i * p.num_heads + head] = gates_.peak;
    }
  }

 private:
  const MlstmChunkwiseParams& p;
  ChunkGates<T> gates_;
  double *totals_, *peaks_;
};

/// m_starts (num_chunks, NH): the stabiliser that enters each chunk.
template <class T>
void chunk_stabilisers(const MlstmChunkwiseParams& p, double* m_starts) {
  Buffer<double> totals(p.num_chunks * p.num_heads), peaks(p.num_chunks * p.num_heads);
  run_items<PeakWorker<T>>(p.num_parts * p.num_heads, p, static_cast<double*>(totals),
                           static_cast<double*>(peaks));
  for (int64_t part = 0; part < p.num_parts; ++part) {
    for (int64_t i = p.parts[part].chunk_begin; i < p.parts[part].chunk_end; ++i) {
      const bool first = p.parts[part].first && i == p.parts[part].chunk_begin;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        double& m = m_starts[i * p.num_heads + head];
        const int64_t before = (i - 1) * p.num_heads + head;
        if (p.chunks[i].fresh) {
          m = 0;
        } else if (first) {
          m = start_m<T>(p, p.parts[part].sequence, head);
        } else {
          m = ChunkGates<T>::next_m(p, totals[before], peaks[before], m_starts[before]);
        }
      }
    }
  }
}

/// Sums the tokens of a part into a state that starts empty.
template <class T>
class LocalStateWorker {
 public:
  LocalStateWorker(const MlstmChunkwiseParams& params, const double* m_starts,
                   const PartStates<T>& states)
      : p(params),
        gates_(params),
        update_(params),
        k_(params.max_length * params.dqk),
        v_(params.max_length * params.dv),
        m_starts_(m_starts),
        states_(states) {}

  void run(int64_t item) {
    const int64_t index = item / p.num_heads, head = item % p.num_heads;
    const MlstmPart& part = p.parts[index];
    if (part.last) return;  // nobody asks for what leaves it
    const StateRef<T> state = states_.at(index, head);
    bool empty = true;
    T decay = 1;
    for (int64_t i = part.chunk_begin; i < part.chunk_end; ++i) {
      const MlstmChunk& chunk = p.chunks[i];
      if (chunk.fresh || !has_successor(p, part, i, true)) {
        empty = true;
        decay = -1;
      }
      if (!has_successor(p, part, i, true)) continue;
      gates_.compute(chunk, head, m_starts_[i * p.num_heads + head]);
      update_.run(gates_, load_tile<T>(p.k, chunk, head, p.dqk, k_),
                  load_tile<T>(p.v, chunk, head, p.dv, v_),
                  empty ? StateRef<T>{nullptr, nullptr} : state, state);
      empty = false;
      if (decay >= 0) decay *= gates_.gamma;
    }
    if (empty) zero_row(state.c, states_.size);
    states_.decay_at(index, head) = decay;
  }

 private:
  const MlstmChunkwiseParams& p;
  ChunkGates<T> gates_;
  StateUpdate<T> update_;
  Buffer<T> k_, v_;
  const double* m_starts_;
  const PartStates<T>& states_;
};

/// One step of a scan over parts: carried is what enters the part, local what the part adds; afterwards local holds what
/// enters it and carried what leaves it.
template <class T>
inline void scan_step(T* carried, T* local, T decay, int64_t count) {
  if (decay < 0) {  // cut by a reset: nothing passes, not even a NaN
    for (int64_t j = 0; j < count; ++j) {
      const T own = local[j];
      local[j] = carried[j];
      carried[j] = own;
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const T own = local[j];
    local[j] = carried[j];
    carried[j] = decay * carried[j] + own;
  }
}

/// Turns the parts' own sums into the states that enter them.
template <class T>
class StateScanWorker {
 public:
  StateScanWorker(const MlstmChunkwiseParams& params, const PartStates<T>& states)
      : p(params), states_(states), carried_(states.size) {}
  void run(int64_t head) {
    for (int64_t index = 0; index < p.num_parts; ++index) {
      const MlstmPart& part = p.parts[index];
      if (part.first)
        load_start_state<T>(p, part.sequence, head, {carried_, carried_ + states_.c_size});
      if (part.last) {
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

/// The stabilisers of all chunks and the state that enters each part; null where a sequence is one part.
template <class T>
struct PartStarts {
  explicit PartStarts(const MlstmChunkwiseParams& p)
      : m_starts(p.num_chunks * p.num_heads), states(p) {
    chunk_stabilisers<T>(p, m_starts);
    run_items<LocalStateWorker<T>>(p.num_parts * p.num_heads, p,
                                   static_cast<const double*>(m_starts), states);
    run_items<StateScanWorker<T>>(p.num_heads, p, states);
  }
  Buffer<double> m_starts;
  PartStates<T> states;
};

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
