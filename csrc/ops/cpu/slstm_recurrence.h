#pragma once
// The steps of one item (head, tile of sequences), with the head's recurrent matrix repacked once. A step is a product
// with four accumulators per vector of units (the four gates), and the cell's arithmetic on them while they are in the
// L1 cache. Used by the forward pass, and by a backward pass that computes the gates again: the same bits both times.
#include "csrc/ops/cpu/slstm_cells.h"
#include "csrc/ops/cpu/slstm_tile.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

/// The rows of an item: sequences, longest first.
struct ItemRows {
  ItemRows(const SlstmShape& p, int64_t item) : head(item / p.tile_count) {
    const int64_t begin = item % p.tile_count * p.tile_rows;
    first = p.rows + begin;
    count = p.row_count - begin < p.tile_rows ? p.row_count - begin : p.tile_rows;
  }
  int64_t head, count;
  const SlstmRow* first;
};

inline bool reset_before(const SlstmShape& p, const SlstmRow& row, int64_t t) {
  return p.reset && p.reset[row.batch * p.reset_stride[0] + (row.begin + t) * p.reset_stride[1]];
}

template <class Real>
struct Recurrence {
  static constexpr int64_t kWidth = Simd<Real>::kWidth;

  /// Takes slstm_forward_workspace() Reals from `space`.
  Recurrence(const SlstmInputs& params, const ItemRows& item, Real* space)
      : p(params),
        head(item.head),
        dh(p.dh),
        pitch(p.dh_padded),
        panels(pitch / kWidth),
        rows(item.first) {
    const auto take = [&space](int64_t size) {
      Real* const part = space;
      space += size;
      return part;
    };
    recurrent = take(4 * dh * pitch);
    bias = take(4 * pitch);
    gates = take(p.tile_rows * 4 * pitch);
    Real** const per_row[] = {&y, &y_next, &c, &n, &m};
    for (Real** buffer : per_row) *buffer = take(p.tile_rows * pitch);
    pack();
  }

  int64_t width_of(int64_t panel) const {
    return dh - panel * kWidth < kWidth ? dh - panel * kWidth : kWidth;
  }

  /// recurrent[panel][k][gate][lane], bias[panel][gate][lane]; units beyond DH are zero.
  void pack() {
    const Real* const r = static_cast<const Real*>(p.r);
    const Real* const b = static_cast<const Real*>(p.b);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t lanes = width_of(panel);
      for (int64_t gate = 0; gate < 4; ++gate) {
        const int64_t unit = (gate * p.heads + head) * dh + panel * kWidth;
        Real* const to = recurrent + panel * dh * 4 * kWidth + gate * kWidth;
        for (int64_t k = 0; k < dh; ++k)
          for (int64_t lane = 0; lane < kWidth; ++lane)
            to[k * 4 * kWidth + lane] = lane < lanes ? r[(unit + lane) * dh + k] : Real(0);
        for (int64_t lane = 0; lane < kWidth; ++lane)
          bias[(panel * 4 + gate) * kWidth + lane] = lane < lanes ? b[unit + lane] : Real(0);
      }
    }
  }

  void clear(int64_t row) {
    for (int64_t u = row * pitch; u < (row + 1) * pitch; ++u) {
      y[u] = c[u] = n[u] = Real(0);
      m[u] = Real(-kInfinity);
    }
  }

  /// The state before the first token of a row.
  void start(int64_t row) {
    clear(row);
    const int64_t state = (rows[row].state * p.heads + head) * dh;
    const auto copy = [&](const void* from, Real* to) {
      if (from) memcpy(to + row * pitch, static_cast<const Real*>(from) + state, dh * sizeof(Real));
    };
    copy(p.y0, y);
    copy(p.c0, c);
    if (p.cell == SlstmCell::kLstm) return;
    copy(p.n0, n);
    copy(p.m0, m);
  }

  /// y, c, n, m from a checkpoint: slstm_checkpoint_states() times DH numbers.
  void restore(int64_t row, const Real* from) {
    const int64_t kept = slstm_checkpoint_states(p.cell, true);
    Real* const to[4] = {y, c, n, m};
    clear(row);
    for (int64_t s = 0; s < kept; ++s)
      memcpy(to[s] + row * pitch, from + s * dh, dh * sizeof(Real));
  }

  /// gates[panel][row][gate][lane] = wx + b at step t.
  template <class Element>
  void load_gates(int64_t alive, int64_t t) {
    const int64_t* const stride = p.wx_stride;
    for (int64_t row = 0; row < alive; ++row) {
      const Element* const wx = static_cast<const Element*>(p.wx) + rows[row].batch * stride[0] +
                                (rows[row].begin + t) * stride[1] + head * stride[3];
      for (int64_t panel = 0; panel < panels; ++panel) {
        Real* const to = gates + (panel * p.tile_rows + row) * 4 * kWidth;
        load_vector_of_gates(wx + panel * kWidth * stride[4], width_of(panel),
                             bias + panel * 4 * kWidth, to);
      }
    }
  }
  template <class Element>
  void load_vector_of_gates(const Element* wx, int64_t lanes, const Real* b, Real* to) const {
    const int64_t gate_stride = p.wx_stride[2], unit_stride = p.wx_stride[4];
    if (lanes == kWidth && unit_stride == 1) {
      for (int64_t gate = 0; gate < 4; ++gate) {
        const Element* const from = wx + gate * gate_stride;
        // Each gate is a stream of its own, with steps too far apart for the hardware to foresee.
        __builtin_prefetch(from + 2 * p.wx_stride[1]);
        store(to + gate * kWidth, load_elements<Real>(from, 1) + load(b + gate * kWidth));
      }
    } else if (lanes == kWidth && unit_stride == 4) {
      for (int64_t gate = 0; gate < 4; ++gate) {
        const Element* const from = wx + gate * gate_stride;
        __builtin_prefetch(wx + gate * kWidth + 2 * p.wx_stride[1]);
        store(to + gate * kWidth, load_elements<Real>(from, 4) + load(b + gate * kWidth));
      }
    } else {
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t lane = 0; lane < kWidth; ++lane)
          to[gate * kWidth + lane] =
              lane < lanes
                  ? to_real(wx[gate * gate_stride + lane * unit_stride]) + b[gate * kWidth + lane]
                  : Real(0);
    }
  }

  template <class Cell, class Saved>
  XLSTM_INLINE void step_panel(int64_t panel, int64_t alive, const Saved& saved_at) {
    const int64_t lanes = width_of(panel);
    for (int64_t row = 0; row < alive; ++row) {
      const Real* const g = gates + (panel * p.tile_rows + row) * 4 * kWidth;
      const int64_t at = row * pitch + panel * kWidth;
      State<Real> s{{}, load(c + at), {}, {}};
      if constexpr (Cell::kNormalized) {
        s.n = load(n + at);
        s.m = load(m + at);
      }
      Vec<Real> saved[4];
      Cell::forward({load(g), load(g + kWidth), load(g + 2 * kWidth), load(g + 3 * kWidth)}, s,
                    saved);
      store(y_next + at, s.y);
      store(c + at, s.c);
      if constexpr (Cell::kNormalized) {
        store(n + at, s.n);
        store(m + at, s.m);
      }
      Real* const place = saved_at(row);
      if (!place) continue;
      Real* const to = place + panel * kWidth;
      for (int64_t i = 0; i < Cell::kSaved; ++i) {
        store_part(to + i * dh, saved[i], lanes);
        __builtin_prefetch(to + (Cell::kSaved + i) * dh, 1);
      }
    }
  }

  /// Token t of the first `alive` rows. What the backward pass needs of a row's token goes to saved_at(row), Cell::kSaved
  /// times DH numbers; null: nowhere.
  template <class Cell, class Saved>
  void step(int64_t alive, int64_t t, const Saved& saved_at) {
    for (int64_t row = 0; row < alive; ++row)
      if (reset_before(p, rows[row], t)) clear(row);
    with_element<Real>(p.dtype, [&](auto element) { load_gates<decltype(element)>(alive, t); });
    for (int64_t panel = 0; panel < panels; ++panel) {
      multiply_add<Real>(alive, 4,
                         {y, pitch, 1, recurrent + panel * dh * 4 * kWidth, 4 * kWidth, dh,
                          gates + panel * p.tile_rows * 4 * kWidth, 4 * kWidth});
      step_panel<Cell>(panel, alive, saved_at);
    }
    Real* const before = y;
    y = y_next;
    y_next = before;
  }

  const SlstmInputs& p;
  int64_t head, dh, pitch, panels;
  const SlstmRow* rows;
  Real *recurrent, *bias, *gates, *y, *y_next, *c, *n, *m;
};

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
