// Forward of the sLSTM and LSTM: each item (head, tile of sequences) runs through all its steps alone, with the head's
// recurrent matrix repacked once. A step is a product with four accumulators per 16 units (the four gates), and the
// cell's arithmetic on them while they are in the L1 cache. The recurrence uses y in full precision.
#include "csrc/ops/cpu/slstm_cells.h"
#include "csrc/ops/cpu/slstm_tile.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class Real>
struct ForwardItem {
  static constexpr int64_t kWidth = Simd<Real>::kWidth;

  ForwardItem(const SlstmForwardParams& params, int64_t item)
      : p(params), head(item / p.tile_count), dh(p.dh), pitch(p.dh_padded), panels(pitch / kWidth) {
    const int64_t first = item % p.tile_count * p.tile_rows;
    rows = p.rows + first;
    count = p.row_count - first < p.tile_rows ? p.row_count - first : p.tile_rows;
    Real* space = static_cast<Real*>(p.workspace);
    const auto take = [&space](int64_t size) {
      Real* const part = space;
      space += size;
      return part;
    };
    recurrent = take(4 * dh * pitch);
    bias = take(4 * pitch);
    gates = take(p.tile_rows * 4 * pitch);
    y = take(p.tile_rows * pitch);
    y_next = take(p.tile_rows * pitch);
    c = take(p.tile_rows * pitch);
    n = take(p.tile_rows * pitch);
    m = take(p.tile_rows * pitch);
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

  void finish(int64_t row) {
    const int64_t state = (rows[row].state * p.heads + head) * dh;
    const auto copy = [&](const Real* from, void* to) {
      memcpy(static_cast<Real*>(to) + state, from + row * pitch, dh * sizeof(Real));
    };
    copy(y, p.y_last);
    copy(c, p.c);
    if (p.cell == SlstmCell::kLstm) return;
    copy(n, p.n);
    copy(m, p.m);
  }

  /// The states before token t of a row, where the backward will start a piece.
  void checkpoint(int64_t row, int64_t t) {
    const int64_t kept = slstm_checkpoint_states(p.cell);
    const int64_t slot = (rows[row].begin + t) / kSlstmSegment;
    Real* to = static_cast<Real*>(p.checkpoints) +
               ((rows[row].batch * p.heads + head) * p.checkpoint_slots + slot) * kept * dh;
    const Real* const from[3] = {y, c, n};
    for (int64_t s = 0; s < kept; ++s)
      memcpy(to + s * dh, from[s] + row * pitch, dh * sizeof(Real));
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

  template <class Cell>
  void step_panel(int64_t panel, int64_t alive, int64_t t) {
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
      if (!p.gates) continue;
      const int64_t token = (rows[row].batch * p.heads + head) * p.time + rows[row].begin + t;
      Real* const to = static_cast<Real*>(p.gates) + token * Cell::kSaved * dh + panel * kWidth;
      for (int64_t i = 0; i < Cell::kSaved; ++i) {
        store_part(to + i * dh, saved[i], lanes);
        __builtin_prefetch(to + (Cell::kSaved + i) * dh, 1);
      }
    }
  }

  template <class Element>
  void store_y(int64_t alive, int64_t t) {
    for (int64_t row = 0; row < alive; ++row) {
      const int64_t token = rows[row].batch * p.time + rows[row].begin + t;
      Element* const to = static_cast<Element*>(p.y) + (token * p.heads + head) * dh;
      const Real* const from = y + row * pitch;
      for (int64_t u = 0; u < dh; ++u) from_real(from[u], to[u]);
    }
  }

  template <class Cell>
  void step(int64_t alive, int64_t t) {
    for (int64_t row = 0; row < alive; ++row) {
      // The first one of a batch row has no reader, but no result may be left undefined.
      if (p.checkpoints && t % kSlstmSegment == 0 && (t > 0 || rows[row].begin == 0))
        checkpoint(row, t);
      if (p.reset &&
          p.reset[rows[row].batch * p.reset_stride[0] + (rows[row].begin + t) * p.reset_stride[1]])
        clear(row);
    }
    with_element<Real>(p.dtype, [&](auto element) { load_gates<decltype(element)>(alive, t); });
    for (int64_t panel = 0; panel < panels; ++panel) {
      multiply_add<Real>(alive, 4,
                         {y, pitch, 1, recurrent + panel * dh * 4 * kWidth, 4 * kWidth, dh,
                          gates + panel * p.tile_rows * 4 * kWidth, 4 * kWidth});
      step_panel<Cell>(panel, alive, t);
    }
    Real* const before = y;
    y = y_next;
    y_next = before;
    with_element<Real>(p.dtype, [&](auto element) { store_y<decltype(element)>(alive, t); });
  }

  template <class Cell>
  void run() {
    pack();
    for (int64_t row = 0; row < count; ++row) start(row);
    int64_t alive = alive_rows(rows, count, 0);
    for (int64_t row = alive; row < count; ++row) finish(row);
    for (int64_t t = 0; alive > 0; ++t) {
      step<Cell>(alive, t);
      const int64_t left = alive_rows(rows, alive, t + 1);
      for (int64_t row = left; row < alive; ++row) finish(row);
      alive = left;
    }
  }

  const SlstmForwardParams& p;
  int64_t head, dh, pitch, panels, count;
  const SlstmRow* rows;
  Real *recurrent, *bias, *gates, *y, *y_next, *c, *n, *m;
};

template <class Real>
void forward_items(const SlstmForwardParams& p) {
  for (int64_t item = p.item_begin; item < p.item_end; ++item)
    with_cell<Real>(p.cell,
                    [&](auto cell) { ForwardItem<Real>(p, item).template run<decltype(cell)>(); });
}

}  // namespace

void slstm_forward_items(const SlstmForwardParams& p) {
  p.dtype == SlstmDtype::kFloat64 ? forward_items<double>(p) : forward_items<float>(p);
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
