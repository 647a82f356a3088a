// mLSTM backward on the CPU: sweeps over the chunks of a sequence for the states, then in reverse for the gradients
// (mlstm_chunk_backward.h), one (sequence, head) or part of one per task.
#include "csrc/ops/cpu/mlstm_chunk_backward.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

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
      if (!has_successor(p, part, i, p.dn != nullptr)) continue;
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
    const bool passed_on = has_successor(p, part, i, p.dn != nullptr);
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
