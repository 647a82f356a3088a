// mLSTM forward on the CPU: chunkwise-parallel form. Per chunk and head:
//   S = Q K^T, P = S o (scale D), H = (P V + (w q) C) / N, N = max(|sum_s P + (w q) . n|, exp(-m)) + eps,
//   C <- gamma C + (u k)^T V
// The products are BLAS calls on (chunk x head size) tiles.
#include "csrc/ops/cpu/mlstm_sweep.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class T>
class ForwardWorker {
 public:
  ForwardWorker(const MlstmChunkwiseParams& params, const PartStarts<T>* starts)
      : p(params),
        starts_(starts),
        gates_(params),
        update_(params),
        q_(params.max_length * params.dqk),
        k_(params.max_length * params.dqk),
        v_(params.max_length * params.dv),
        h_(params.max_length * params.dv),
        weighted_q_(params.max_length * params.dqk),
        scores_(params.max_length * params.max_length),
        decay_(params.max_length),
        sums_(params.max_length),
        c_(params.dqk * params.dv),
        n_(params.dqk) {}

  /// Sweeps through part item / NH for head item % NH.
  void run(int64_t item) {
    const int64_t index = item / p.num_heads, head = item % p.num_heads;
    const MlstmPart& part = p.parts[index];
    const StateRef<T> state{c_, n_};
    double m = start_m<T>(p, part.sequence, head);
    if (starts_ == nullptr) {
      load_start_state<T>(p, part.sequence, head, state);
    } else {
      copy_row<T>(c_, starts_->states.at(index, head).c, p.dqk * p.dv);
      copy_row<T>(n_, starts_->states.at(index, head).n, p.dqk);
    }
    for (int64_t i = part.chunk_begin; i < part.chunk_end; ++i) {
      if (p.chunks[i].fresh) m = 0;
      if (starts_ != nullptr) m = starts_->m_starts[i * p.num_heads + head];
      gates_.compute(p.chunks[i], head, m);
      run_chunk(p.chunks[i], head, has_successor(p, part, i, true));
      m = gates_.m_end;
    }
    if (!part.last) return;
    copy_row<T>(head_of<T>(p.c, part.sequence, head, p, p.dqk * p.dv), c_, p.dqk * p.dv);
    copy_row<T>(head_of<T>(p.n, part.sequence, head, p, p.dqk), n_, p.dqk);
    *head_of<T>(p.m, part.sequence, head, p, 1) = static_cast<T>(m);
  }

 private:
  void run_chunk(const MlstmChunk& chunk, int64_t head, bool state_goes_on) {
    const int64_t length = chunk.length;
    const StateRef<T> state{c_, n_};
    const Tile<const T> q = load_tile<T>(p.q, chunk, head, p.dqk, q_);
    const Tile<const T> k = load_tile<T>(p.k, chunk, head, p.dqk, k_);
    const Tile<const T> v = load_tile<T>(p.v, chunk, head, p.dv, v_);
    const Tile<T> h = output_tile<T>(p.h, chunk, head, p.dv, h_);
    causal_scores<T>(length, p.dqk, q, k, scores_);
    for (int64_t t = 0; t < length; ++t) {
      T* row = scores_ + t * length;
      gates_.decay_row(decay_, t);
      sums_[t] = multiply_sum<T>(row, decay_, t + 1);
      zero_row(row + t + 1, causal_end(t, length) - t - 1);
    }
    causal_times<T>(length, p.dv, scores_, v, h);
    if (!chunk.fresh) {
      for (int64_t t = 0; t < length; ++t) {
        T* row = weighted_q_ + t * p.dqk;
        scale_row(row, q.row(t), gates_.w[t], p.dqk);
        sums_[t] += dot<T>(row, n_, p.dqk);
      }
      gemm<T>(Op::kNone, Op::kNone, length, p.dv, p.dqk, T(1), weighted_q_, p.dqk, c_, p.dv, T(1),
              h.data, h.ld);
    }
    if (p.normalize) {
      normalise(h, length);
      if (p.product.data != nullptr) store_product(chunk, head);
    }
    store_tile<T>(p.h, chunk, head, p.dv, h);
    if (state_goes_on)
      update_.run(gates_, k, v, chunk.fresh ? StateRef<T>{nullptr, nullptr} : state, state);
  }

  void normalise(const Tile<T>& h, int64_t length) {
    for (int64_t t = 0; t < length; ++t) {
      const T size = sums_[t] < 0 ? -sums_[t] : sums_[t];
      const T norm =
          (gates_.exp_neg_m[t] > size ? gates_.exp_neg_m[t] : size) + static_cast<T>(p.eps);
      scale_row<T>(h.row(t), h.row(t), T(1) / norm, p.dv);
    }
  }

  void store_product(const MlstmChunk& chunk, int64_t head) {
    T* out = static_cast<T*>(p.product.data) + offset_of(p.product, chunk, head);
    for (int64_t t = 0; t < chunk.length; ++t) out[t * p.product.time] = sums_[t];
  }

  const MlstmChunkwiseParams& p;
  const PartStarts<T>* starts_;
  ChunkGates<T> gates_;
  StateUpdate<T> update_;
  Buffer<T> q_, k_, v_, h_, weighted_q_, scores_, decay_, sums_, c_, n_;
};

template <class T>
void forward(const MlstmChunkwiseParams& p) {
  const int64_t items = p.num_parts * p.num_heads;
  if (p.num_parts == p.num_sequences) {
    run_items<ForwardWorker<T>>(items, p, static_cast<const PartStarts<T>*>(nullptr));
  } else {
    const PartStarts<T> starts(p);
    run_items<ForwardWorker<T>>(items, p, &starts);
  }
}

}  // namespace

void mlstm_chunkwise_forward(const MlstmChunkwiseParams& p) {
  if (p.float64) {
    forward<double>(p);
  } else {
    forward<float>(p);
  }
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
