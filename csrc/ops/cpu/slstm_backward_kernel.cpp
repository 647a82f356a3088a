// Backward of the sLSTM and LSTM. An item (head, tile of sequences) walks its steps in pieces of kSlstmSegment from the
// last to the first. In each piece the states are computed again from the checkpoint and the saved gates (no
// exponentials but the LSTM's tanh c), then the gate gradients in reverse, with dy_{t-1} += sum_g R_g^T dg_t per step;
// dR and db take the whole piece at once while it is in the cache. Every sum has a fixed order. With recompute the gates
// were not saved: each piece's steps are run again first, from a checkpoint that has m as well.
#include "csrc/ops/cpu/slstm_recurrence.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class Real>
struct BackwardItem {
  static constexpr int64_t kWidth = Simd<Real>::kWidth;

  BackwardItem(const SlstmBackwardParams& params, int64_t item)
      : p(params),
        part(params, item),
        head(part.head),
        dh(p.dh),
        pitch(p.dh_padded),
        gate_pitch(slstm_gate_pitch(pitch)),
        count(part.count),
        rows(part.first) {
    Real* space = static_cast<Real*>(p.workspace);
    const auto take = [&space](int64_t size) {
      Real* const begin = space;
      space += size;
      return begin;
    };
    recurrent = take(4 * pitch * pitch);
    Real** const per_row[] = {&dy, &dy_carried, &dc, &dn};
    for (Real** buffer : per_row) *buffer = take(p.tile_rows * pitch);
    const int64_t steps = kSlstmSegment * p.tile_rows;
    gates = take(steps * gate_pitch);
    Real** const per_step[] = {&y_before, &c_before, &n_before, &aux0, &aux1};
    for (Real** buffer : per_step) *buffer = take(steps * pitch);
    recomputed = p.recompute ? take(steps * 4 * pitch) : nullptr;
    rest = space;
    dr = static_cast<Real*>(p.dr) + item * 4 * dh * pitch;
    db = static_cast<Real*>(p.db) + item * 4 * pitch;
  }

  int64_t width_of(int64_t unit) const { return dh - unit < kWidth ? dh - unit : kWidth; }
  int64_t panel_of(
      int64_t unit) const {  // vectors in the panel of up to four that starts at this unit
    const int64_t vectors = (pitch - unit) / kWidth;
    return vectors < 4 ? vectors : 4;
  }
  bool reset_at(int64_t row, int64_t t) const { return reset_before(p, rows[row], t); }

  /// recurrent[panel of inputs][gate * pitch + output unit][lane]; zero beyond DH.
  void pack() {
    const Real* const r = static_cast<const Real*>(p.r);
    Real* to = recurrent;
    for (int64_t first = 0; first < pitch; first += 4 * kWidth) {
      const int64_t width = panel_of(first) * kWidth;
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t unit = 0; unit < pitch; ++unit, to += width)
          for (int64_t lane = 0; lane < width; ++lane)
            to[lane] = unit < dh && first + lane < dh
                           ? r[((gate * p.heads + head) * dh + unit) * dh + first + lane]
                           : Real(0);
    }
  }

  void start() {
    const auto fetch = [&](const void* from, int64_t row, Real* to) {
      for (int64_t u = 0; u < pitch; ++u)
        to[row * pitch + u] =
            from && u < dh
                ? static_cast<const Real*>(from)[(rows[row].state * p.heads + head) * dh + u]
                : Real(0);
    };
    for (int64_t row = 0; row < count; ++row) {
      fetch(p.dy_last, row, dy_carried);
      fetch(p.dc_last, row, dc);
      fetch(p.dn_last, row, dn);
    }
    for (int64_t i = 0; i < count * pitch; ++i) dy[i] = Real(0);
    for (int64_t i = 0; i < 4 * dh * pitch; ++i) dr[i] = Real(0);
    for (int64_t i = 0; i < 4 * pitch; ++i) db[i] = Real(0);
  }

  void finish() {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t state = (rows[row].state * p.heads + head) * dh;
      memcpy(static_cast<Real*>(p.dy0) + state, dy_carried + row * pitch, dh * sizeof(Real));
      memcpy(static_cast<Real*>(p.dc0) + state, dc + row * pitch, dh * sizeof(Real));
      if (p.cell != SlstmCell::kLstm)
        memcpy(static_cast<Real*>(p.dn0) + state, dn + row * pitch, dh * sizeof(Real));
    }
  }

  /// Of a row before token t = begin of a piece, t > 0.
  const Real* checkpoint(int64_t row, int64_t t) const {
    const int64_t kept = slstm_checkpoint_states(p.cell, p.recompute);
    const int64_t slot = (rows[row].begin + t) / kSlstmSegment;
    return static_cast<const Real*>(p.checkpoints) +
           ((rows[row].batch * p.heads + head) * p.checkpoint_slots + slot) * kept * dh;
  }

  /// State of a row before token t = begin of a piece, without m.
  State<Real> state_before(int64_t row, int64_t unit, int64_t t) const {
    const int64_t lanes = width_of(unit);
    State<Real> s{{}, {}, {}, {}};
    if (t > 0) {
      const Real* const from = checkpoint(row, t) + unit;
      s.y = load_part(from, lanes, Real(0));
      s.c = load_part(from + dh, lanes, Real(0));
      if (p.cell != SlstmCell::kLstm) s.n = load_part(from + 2 * dh, lanes, Real(0));
      return s;
    }
    const int64_t state = (rows[row].state * p.heads + head) * dh + unit;
    if (p.y0) s.y = load_part(static_cast<const Real*>(p.y0) + state, lanes, Real(0));
    if (p.c0) s.c = load_part(static_cast<const Real*>(p.c0) + state, lanes, Real(0));
    if (p.n0) s.n = load_part(static_cast<const Real*>(p.n0) + state, lanes, Real(0));
    return s;
  }

  template <class Cell>
  const Real* saved_gates(int64_t row, int64_t t) const {
    if (recomputed) return recomputed + (t % kSlstmSegment * count + row) * Cell::kSaved * dh;
    const int64_t token = (rows[row].batch * p.heads + head) * p.time + rows[row].begin + t;
    return static_cast<const Real*>(p.gates) + token * Cell::kSaved * dh;
  }
  template <class Cell>
  XLSTM_INLINE void load_saved(const Real* from, int64_t lanes, Vec<Real>* saved) const {
    saved[0] =
        load_part(from, lanes, Real(-0.0));  // beyond DH i' = 1, f' = 0: n = 1 and no gradient
    for (int i = 1; i < Cell::kSaved; ++i) saved[i] = load_part(from + i * dh, lanes, Real(0));
  }

  /// The gates of tokens [t0, t0 + steps).
  template <class Cell>
  void recompute(Recurrence<Real>& cells, int64_t t0, int64_t steps) {
    for (int64_t row = 0; row < alive_rows(rows, count, t0); ++row) {
      if (t0 == 0) {
        cells.start(row);
      } else {
        cells.restore(row, checkpoint(row, t0));
      }
    }
    for (int64_t i = 0; i < steps; ++i)
      cells.template step<Cell>(alive_rows(rows, count, t0 + i), t0 + i, [&](int64_t row) {
        return recomputed + (i * count + row) * Cell::kSaved * dh;
      });
  }

  /// y, c, n before each token of [t0, t0 + steps), and the cell's auxiliary values.
  template <class Cell>
  void replay(int64_t t0, int64_t steps) {
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t unit = 0; unit < pitch; unit += kWidth) {
        const int64_t lanes = width_of(unit);
        State<Real> s =
            t0 < rows[row].length ? state_before(row, unit, t0) : State<Real>{{}, {}, {}, {}};
        for (int64_t i = 0; i < steps; ++i) {
          const int64_t at = (i * count + row) * pitch + unit;
          if (t0 + i >= rows[row].length) {  // dR sums over all rows: this one adds nothing
            store(y_before + at, Vec<Real>{});
            continue;
          }
          if (reset_at(row, t0 + i)) s = State<Real>{{}, {}, {}, {}};
          store(y_before + at, s.y);
          store(c_before + at, s.c);
          if constexpr (Cell::kNormalized) store(n_before + at, s.n);
          Vec<Real> saved[4], aux[2];
          load_saved<Cell>(saved_gates<Cell>(row, t0 + i) + unit, lanes, saved);
          Cell::replay(saved, s, aux);
          store(aux0 + at, aux[0]);
          if constexpr (Cell::kNormalized) store(aux1 + at, aux[1]);
        }
      }
    }
  }

  /// dy = the output's gradient + the carried one.
  template <class Element>
  void load_dy(int64_t alive, int64_t t) {
    for (int64_t row = 0; row < alive; ++row) {
      Real* const to = dy + row * pitch;
      const Real* const carried = dy_carried + row * pitch;
      const Element* const from = static_cast<const Element*>(p.dy) +
                                  rows[row].batch * p.dy_stride[0] +
                                  (rows[row].begin + t) * p.dy_stride[1] + head * p.dy_stride[2];
      if (p.dy_stride[3] == 1) {
        for (int64_t u = 0; u < dh; u += 16) __builtin_prefetch(from + u - 3 * p.dy_stride[1]);
        for (int64_t u = 0; u < dh; ++u) to[u] = to_real(from[u]) + carried[u];
      } else {
        for (int64_t u = 0; u < dh; ++u) to[u] = to_real(from[u * p.dy_stride[3]]) + carried[u];
      }
    }
  }

  template <class Element>
  void store_dwx(int64_t alive, int64_t t, const Real* step_gates) {
    const int64_t* const stride = p.dwx_stride;
    for (int64_t row = 0; row < alive; ++row) {
      Element* const to = static_cast<Element*>(p.dwx) + rows[row].batch * stride[0] +
                          (rows[row].begin + t) * stride[1] + head * stride[3];
      const Real* const from = step_gates + row * gate_pitch;
      if (stride[4] == 1) {
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t u = 0; u < dh; u += 16)
            __builtin_prefetch(to + gate * stride[2] + u - 2 * stride[1], 1);
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t u = 0; u < dh; ++u)
            from_real(from[gate * pitch + u], to[gate * stride[2] + u]);
      } else {  // gate last
        for (int64_t u = 0; u < dh; ++u)
          for (int64_t gate = 0; gate < 4; ++gate)
            from_real(from[gate * pitch + u], to[u * 4 + gate]);
      }
    }
  }

  template <class Cell>
  void step_rows(int64_t alive, int64_t t, int64_t first) {
    for (int64_t row = 0; row < alive; ++row) {
      const Real* const from = saved_gates<Cell>(row, t);
      for (int64_t unit = 0; unit < pitch; unit += kWidth) {
        const int64_t at = (first + row) * pitch + unit, carried = row * pitch + unit;
        Vec<Real> saved[4];
        load_saved<Cell>(from + unit, width_of(unit), saved);
        // The next piece's gates come into the L2 cache behind this piece's arithmetic.
        for (int i = 0; i < Cell::kSaved && !recomputed; ++i)
          __builtin_prefetch(from + unit + (i - kSlstmSegment * Cell::kSaved) * dh, 0, 2);
        const Vec<Real> aux[2] = {load(aux0 + at),
                                  Cell::kNormalized ? load(aux1 + at) : Vec<Real>{}};
        Vec<Real> dc_row = load(dc + carried), dn_row = load(dn + carried);
        const Gates<Real> g = Cell::backward(saved, aux, load(c_before + at),
                                             Cell::kNormalized ? load(n_before + at) : Vec<Real>{},
                                             load(dy + carried), dc_row, dn_row);
        store(dc + carried, dc_row);
        store(dn + carried, dn_row);
        Real* const to = gates + (first + row) * gate_pitch + unit;
        store(to, g.i);
        store(to + pitch, g.f);
        store(to + 2 * pitch, g.z);
        store(to + 3 * pitch, g.o);
      }
    }
  }

  /// dy of the token before: sum_g R_g^T dg, each entry within the clip.
  void carry_dy(int64_t alive, const Real* step_gates) {
    for (int64_t i = 0; i < alive * pitch; ++i) dy_carried[i] = Real(0);
    if (p.recurrent_cut) return;
    const Real* packed = recurrent;
    for (int64_t unit = 0; unit < pitch; unit += 4 * kWidth) {
      const int64_t vectors = panel_of(unit);
      multiply_add<Real>(alive, vectors,
                         {step_gates, gate_pitch, 1, packed, vectors * kWidth, 4 * pitch,
                          dy_carried + unit, pitch});
      packed += 4 * pitch * vectors * kWidth;
    }
    const Real clip = static_cast<Real>(p.recurrent_clip);
    if (clip == Real(0)) return;
    for (int64_t i = 0; i < alive * pitch; ++i) {  // NaN stays
      const Real sum = dy_carried[i];
      dy_carried[i] = sum > clip ? clip : sum < -clip ? -clip : sum;
    }
  }

  template <class Cell>
  void step(int64_t t, int64_t first) {
    const int64_t alive = alive_rows(rows, count, t);
    Real* const step_gates = gates + first * gate_pitch;
    if (p.dy) {
      with_element<Real>(p.dtype, [&](auto element) { load_dy<decltype(element)>(alive, t); });
    } else {
      memcpy(dy, dy_carried, alive * pitch * sizeof(Real));
    }
    step_rows<Cell>(alive, t, first);
    for (int64_t i = alive * gate_pitch; i < count * gate_pitch; ++i) step_gates[i] = Real(0);
    with_element<Real>(p.dtype,
                       [&](auto element) { store_dwx<decltype(element)>(alive, t, step_gates); });
    carry_dy(alive, step_gates);
    for (int64_t row = 0; row < alive; ++row) {
      if (!reset_at(row, t)) continue;
      for (int64_t u = row * pitch; u < (row + 1) * pitch; ++u)
        dy_carried[u] = dc[u] = dn[u] = Real(0);
    }
  }

  /// dR += dg y_before^T and db += dg over the piece.
  void parameter_gradients(int64_t steps) {
    const int64_t depth = steps * count;
    for (int64_t unit = 0; unit < pitch; unit += 4 * kWidth)
      for (int64_t gate = 0; gate < 4; ++gate)
        multiply_add<Real>(dh, panel_of(unit),
                           {gates + gate * pitch, 1, gate_pitch, y_before + unit, pitch, depth,
                            dr + gate * dh * pitch + unit, pitch});
    for (int64_t column = 0; column < 4 * pitch; column += kWidth) {
      Vec<Real> sum = load(db + column);
      for (int64_t i = 0; i < depth; ++i) sum += load(gates + i * gate_pitch + column);
      store(db + column, sum);
    }
  }

  /// cells: null, or what computes the gates again.
  template <class Cell>
  void run(Recurrence<Real>* cells) {
    pack();
    start();
    const int64_t longest = count > 0 ? rows[0].length : 0;
    for (int64_t t0 = (longest - 1) / kSlstmSegment * kSlstmSegment; longest > 0 && t0 >= 0;
         t0 -= kSlstmSegment) {
      const int64_t steps = longest - t0 < kSlstmSegment ? longest - t0 : kSlstmSegment;
      if (cells) recompute<Cell>(*cells, t0, steps);
      replay<Cell>(t0, steps);
      for (int64_t i = steps - 1; i >= 0; --i) step<Cell>(t0 + i, i * count);
      parameter_gradients(steps);
    }
    finish();
  }

  const SlstmBackwardParams& p;
  ItemRows part;
  int64_t head, dh, pitch, gate_pitch, count;
  const SlstmRow* rows;
  Real *recurrent, *dy, *dy_carried, *dc, *dn, *gates, *y_before, *c_before, *n_before, *aux0,
      *aux1, *recomputed, *rest, *dr, *db;
};

template <class Real>
void backward_items(const SlstmBackwardParams& p) {
  for (int64_t item = p.item_begin; item < p.item_end; ++item)
    with_cell<Real>(p.cell, [&](auto cell) {
      BackwardItem<Real> work(p, item);
      if (!p.recompute) return work.template run<decltype(cell)>(nullptr);
      Recurrence<Real> cells(p, work.part, work.rest);
      work.template run<decltype(cell)>(&cells);
    });
}

}  // namespace

void slstm_backward_items(const SlstmBackwardParams& p) {
  p.dtype == SlstmDtype::kFloat64 ? backward_items<double>(p) : backward_items<float>(p);
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
