// Forward of the sLSTM and LSTM: each item (head, tile of sequences) runs through all its steps alone. The recurrence uses
// y in full precision.
#include "csrc/ops/cpu/slstm_recurrence.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class Real>
struct ForwardItem {
  ForwardItem(const SlstmForwardParams& params, int64_t item)
      : p(params),
        part(params, item),
        head(part.head),
        dh(p.dh),
        pitch(p.dh_padded),
        count(part.count),
        rows(part.first),
        cells(params, part, static_cast<Real*>(p.workspace)) {}

  void finish(int64_t row) {
    const int64_t state = (rows[row].state * p.heads + head) * dh;
    const auto copy = [&](const Real* from, void* to) {
      memcpy(static_cast<Real*>(to) + state, from + row * pitch, dh * sizeof(Real));
    };
    copy(cells.y, p.y_last);
    copy(cells.c, p.c);
    if (p.cell == SlstmCell::kLstm) return;
    copy(cells.n, p.n);
    copy(cells.m, p.m);
  }

  /// The states before token t of a row, where the backward will start a piece.
  void checkpoint(int64_t row, int64_t t) {
    const int64_t kept = slstm_checkpoint_states(p.cell, p.recompute);
    const int64_t slot = (rows[row].begin + t) / kSlstmSegment;
    Real* to = static_cast<Real*>(p.checkpoints) +
               ((rows[row].batch * p.heads + head) * p.checkpoint_slots + slot) * kept * dh;
    const Real* const from[4] = {cells.y, cells.c, cells.n, cells.m};
    for (int64_t s = 0; s < kept; ++s)
      memcpy(to + s * dh, from[s] + row * pitch, dh * sizeof(Real));
  }

  template <class Element>
  void store_y(int64_t alive, int64_t t) {
    for (int64_t row = 0; row < alive; ++row) {
      const int64_t token = rows[row].batch * p.time + rows[row].begin + t;
      Element* const to = static_cast<Element*>(p.y) + (token * p.heads + head) * dh;
      const Real* const from = cells.y + row * pitch;
      for (int64_t u = 0; u < dh; ++u) from_real(from[u], to[u]);
    }
  }

  template <class Cell>
  void step(int64_t alive, int64_t t) {
    for (int64_t row = 0; row < alive; ++row) {
      // The first one of a batch row has no reader, but no result may be left undefined.
      if (p.checkpoints && t % kSlstmSegment == 0 && (t > 0 || rows[row].begin == 0))
        checkpoint(row, t);
    }
    cells.template step<Cell>(alive, t, [&](int64_t row) -> Real* {
      if (!p.gates) return nullptr;
      const int64_t token = (rows[row].batch * p.heads + head) * p.time + rows[row].begin + t;
      return static_cast<Real*>(p.gates) + token * Cell::kSaved * dh;
    });
    with_element<Real>(p.dtype, [&](auto element) { store_y<decltype(element)>(alive, t); });
  }

  template <class Cell>
  void run() {
    for (int64_t row = 0; row < count; ++row) cells.start(row);
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
  ItemRows part;
  int64_t head, dh, pitch, count;
  const SlstmRow* rows;
  Recurrence<Real> cells;
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
