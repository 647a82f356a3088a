// Forward: step by step, g_t = wx_t + b + r y_{t-1}. Backward: the states once more from the gates' pre-activations, which
// were kept or are computed anew for all tokens at once; then the gate gradients in reverse, with r^T dg per step; dr and
// db for all tokens at once.
#include "csrc/ops/slstm_generic.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <limits>

#include "csrc/ops/full_precision.h"
#include "csrc/ops/products.h"
#include "csrc/ops/slstm_products.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using cpu::SlstmCell;

constexpr double kEmptyM = -std::numeric_limits<double>::infinity();

/// Token t of every sequence that has one. Sequences stand longest first, so these are the first alive(t) of them.
class Steps {
 public:
  Steps(int64_t batch, int64_t time, const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
        at::Device device)
      : reset_(reset), packed_(cu_seqlens.has_value()) {
    rows_ = slstm_sequences(batch, time, cu_seqlens);
    if (!packed_) return;
    std::vector<int64_t> order, begins;
    for (const cpu::SlstmRow& row : rows_) {
      order.push_back(row.state);
      begins.push_back(row.begin);
    }
    order_ = at::tensor(order, at::kLong).to(device);
    begins_ = at::tensor(begins, at::kLong).to(device);
  }

  int64_t sequences() const { return static_cast<int64_t>(rows_.size()); }
  int64_t count() const { return rows_.empty() ? 0 : rows_[0].length; }
  int64_t alive(int64_t t) const {
    if (!packed_) return sequences();
    int64_t n = sequences();
    while (n > 0 && rows_[n - 1].length <= t) --n;
    return n;
  }

  /// (alive,...) of (B,T,...)
  Tensor get(const Tensor& tokens, int64_t t) const {
    return packed_ ? tokens.select(0, 0).index_select(0, places(t)) : tokens.select(1, t);
  }
  void put(const Tensor& tokens, int64_t t, const Tensor& values) const {
    if (packed_) {
      tokens.select(0, 0).index_copy_(0, places(t), values.to(tokens.scalar_type()));
    } else {
      tokens.select(1, t).copy_(values);
    }
  }
  /// Selected, not multiplied: rows whose token t has a reset become `value`.
  void fill_at_resets(Tensor& rows, int64_t t, double value) const {
    if (reset_) rows.masked_fill_(get(*reset_, t).unsqueeze(-1).unsqueeze(-1), value);
  }

  /// States in the callers' order to the order of this class, in new memory, and back.
  Tensor sorted(const OptionalTensor& state, const Tensor& like, double otherwise) const {
    if (!state) return at::full_like(like, otherwise);
    return packed_ ? state->index_select(0, order_) : state->clone();
  }
  void unsort(const Tensor& to, const Tensor& state) const {
    if (packed_) {
      to.index_copy_(0, order_, state);
    } else {
      to.copy_(state);
    }
  }

 private:
  Tensor places(int64_t t) const { return begins_.narrow(0, 0, alive(t)) + t; }

  const OptionalTensor& reset_;
  bool packed_;
  std::vector<cpu::SlstmRow> rows_;
  Tensor order_, begins_;
};

Tensor log_forget(const Tensor& f, SlstmCell cell) {
  return cell == SlstmCell::kSlstmExpf ? f : at::log_sigmoid(f);
}

/// The stabilised gates; an empty state loses even to i = -inf.
std::pair<Tensor, Tensor> stabilised(const Tensor& input, const Tensor& carried, const Tensor& m) {
  const Tensor nothing = m == kEmptyM;
  return {(input - m).exp_().masked_fill_(nothing, 1),
          (carried - m).exp_().masked_fill_(nothing, 0)};
}

/// (rows,NH,DH) in the type of computation.
struct States {
  Tensor y, c, n, m;

  States first(int64_t rows) const {
    const auto part = [rows](const Tensor& x) { return x.narrow(0, 0, rows); };
    return {part(y), part(c), part(n), part(m)};
  }
};

/// One token of the rows in `s`, in place. g: (rows,4,NH,DH).
void step(const Tensor& g, SlstmCell cell, const States& s) {
  const Tensor i = g.select(1, 0), f = g.select(1, 1), z = g.select(1, 2).tanh(),
               o = g.select(1, 3).sigmoid();
  if (cell == SlstmCell::kLstm) {
    s.c.mul_(f.sigmoid()).addcmul_(i.sigmoid(), z);
    s.y.copy_(o * s.c.tanh());
    return;
  }
  const Tensor carried = log_forget(f, cell) + s.m, m = at::maximum(carried, i);
  const auto [input, forget] = stabilised(i, carried, m);
  s.m.copy_(m);
  s.c.mul_(forget).addcmul_(input, z);
  s.n.mul_(forget).add_(input);
  s.y.copy_(o * s.c / s.n);
}

/// (rows,NH,DH) rounded, times the head's matrix (NH,DH,K): (rows,NH,K)
Tensor by_head(const Tensor& rows, const Tensor& matrix) {
  return full_product(rows.to(matrix.scalar_type()).transpose(0, 1), matrix).transpose(0, 1);
}

/// Everything that the gate gradients of a token are made of, (B,T,NH,DH): gates, and states before and after.
struct Replay {
  Replay(const SlstmBackwardArguments& a, const Steps& steps, const Tensor& gates, SlstmCell which)
      : cell(which) {
    const auto gate = [&](int64_t index) { return gates.select(2, index); };
    z = gate(2).tanh();
    output = gate(3).sigmoid();
    const Tensor state = at::empty({steps.sequences(), z.size(2), z.size(3)}, z.options());
    if (cell == SlstmCell::kLstm) {
      input = gate(0).sigmoid();
      forget = gate(1).sigmoid();
    } else {
      stabilise(a, steps, gate(0), log_forget(gate(1), cell), state);
      if (cell == SlstmCell::kSlstm) not_forget = (-gate(1)).sigmoid();
    }
    std::tie(c_before, c) = accumulate(steps, input * z, steps.sorted(a.c0, state, 0));
    if (cell != SlstmCell::kLstm)
      std::tie(n_before, n) = accumulate(steps, input, steps.sorted(a.n0, state, 0));
  }

  SlstmCell cell;
  Tensor input, forget, z, output;
  Tensor not_forget;  // undefined where the factor is 1
  Tensor c_before, c, n_before, n;

 private:
  void stabilise(const SlstmBackwardArguments& a, const Steps& steps, const Tensor& log_input,
                 const Tensor& log_f, const Tensor& state) {
    const Tensor carried = at::empty(z.sizes(), z.options()), m_after = at::empty_like(carried);
    const Tensor m_all = steps.sorted(a.m0, state, kEmptyM);
    for (int64_t t = 0; t < steps.count(); ++t) {
      Tensor m = m_all.narrow(0, 0, steps.alive(t));
      steps.fill_at_resets(m, t, kEmptyM);
      const Tensor kept = steps.get(log_f, t) + m;
      m.copy_(at::maximum(kept, steps.get(log_input, t)));
      steps.put(carried, t, kept);
      steps.put(m_after, t, m);
    }
    std::tie(input, forget) = stabilised(log_input, carried, m_after);
  }

  /// x_t = forget_t x_{t-1} + added_t: before and after every token.
  std::pair<Tensor, Tensor> accumulate(const Steps& steps, const Tensor& added,
                                       const Tensor& start) const {
    const Tensor before = at::empty(added.sizes(), added.options()), after = at::empty_like(before);
    for (int64_t t = 0; t < steps.count(); ++t) {
      Tensor x = start.narrow(0, 0, steps.alive(t));
      steps.fill_at_resets(x, t, 0);
      steps.put(before, t, x);
      x.mul_(steps.get(forget, t)).add_(steps.get(added, t));
      steps.put(after, t, x);
    }
    return {before, after};
  }
};

/// Gate gradients (rows,4,NH,DH) of token t. dc, dn: of the states after the token, on return of those before it.
Tensor step_backward(const Replay& r, const Steps& steps, int64_t t, const Tensor& dy,
                     const Tensor& dc, const Tensor& dn) {
  const auto get = [&](const Tensor& x) { return steps.get(x, t); };
  const Tensor i = get(r.input), f = get(r.forget), z = get(r.z), o = get(r.output), c = get(r.c),
               dh = dy * o;
  Tensor di, df, squashed;
  if (r.cell == SlstmCell::kLstm) {
    squashed = c.tanh();
    dc.add_(dh * (1 - squashed * squashed));
    di = dc * z * i * (1 - i);
    df = dc * get(r.c_before) * f * (1 - f);
  } else {
    const Tensor n = get(r.n);
    squashed = c / n;
    const Tensor part = dh / n;
    dc.add_(part);
    dn.sub_(part * squashed);
    di = i * (dc * z + dn);
    df = f * (dc * get(r.c_before) + dn * get(r.n_before));
    if (r.not_forget.defined()) df.mul_(get(r.not_forget));
    dn.mul_(f);
  }
  const Tensor dz = dc * i * (1 - z * z), d_o = dh * squashed * (1 - o);
  dc.mul_(f);
  return at::stack({di, df, dz, d_o}, 1);
}

}  // namespace

SlstmResults slstm_generic_forward(const SlstmArguments& a, bool saved) {
  const FullPrecision precision;
  SlstmArguments sizes = a;
  sizes.preactivations = true;
  const SlstmResults results = empty_slstm_results(sizes, saved);
  const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
  const SlstmCell cell = slstm_cell(a.cell);
  const bool lstm = cell == SlstmCell::kLstm;
  const at::ScalarType type = y_last.scalar_type();
  const Steps steps(y.size(0), y.size(1), a.reset, a.cu_seqlens, y.device());
  const States all{steps.sorted(a.y0, y_last, 0), steps.sorted(a.c0, y_last, 0),
                   steps.sorted(lstm ? std::nullopt : a.n0, y_last, 0),
                   steps.sorted(lstm ? std::nullopt : a.m0, y_last, lstm ? 0 : kEmptyM)};
  const Tensor columns = slstm_recurrent_rows(a.r, a.wx.scalar_type()).transpose(1, 2);
  const Tensor bias = a.b.to(type);
  for (int64_t t = 0; t < steps.count(); ++t) {
    States s = all.first(steps.alive(t));
    for (Tensor* state : {&s.y, &s.c, &s.n}) steps.fill_at_resets(*state, t, 0);
    if (!lstm) steps.fill_at_resets(s.m, t, kEmptyM);
    const Tensor product = by_head(s.y, columns);  // (rows,NH,4*DH)
    const Tensor g = steps.get(a.wx, t).to(type) + bias +
                     product.view({product.size(0), product.size(1), 4, -1}).transpose(1, 2);
    if (saved && !a.recompute) steps.put(gates, t, g);
    step(g, cell, s);
    steps.put(y, t, s.y);
  }
  steps.unsort(y_last, all.y);
  steps.unsort(c, all.c);
  steps.unsort(n, all.n);
  steps.unsort(m, all.m);
  if (saved) checkpoints.fill_(std::numeric_limits<double>::quiet_NaN());
  return results;
}

SlstmGradients slstm_generic_backward(const SlstmBackwardArguments& a) {
  const FullPrecision precision;
  SlstmGradients gradients = empty_slstm_gradients(a);
  auto& [dwx, dr, db, dy0, dc0, dn0] = gradients;
  const SlstmCell cell = slstm_cell(a.cell);
  const Steps steps(a.y.size(0), a.y.size(1), a.reset, a.cu_seqlens, a.y.device());
  const Tensor previous = slstm_previous_y(a.y, a.y0, a.reset, a.cu_seqlens);
  const Tensor gates = a.recompute() ? slstm_preactivations(a, previous) : a.gates;
  const Replay replay(a, steps, gates, cell);
  const Tensor rows = slstm_recurrent_rows(a.r, a.y.scalar_type());
  const Tensor dy_all = steps.sorted(a.dy_last, dy0, 0), dc_all = steps.sorted(a.dc, dy0, 0),
               dn_all = steps.sorted(a.dn, dy0, 0);
  for (int64_t t = steps.count() - 1; t >= 0; --t) {
    const int64_t alive = steps.alive(t);
    Tensor dy = dy_all.narrow(0, 0, alive), dc = dc_all.narrow(0, 0, alive),
           dn = dn_all.narrow(0, 0, alive);
    if (a.dy) dy.add_(steps.get(*a.dy, t));
    const Tensor dg = step_backward(replay, steps, t, dy, dc, dn);
    steps.put(dwx, t, dg);
    if (a.recurrent_cut) {
      dy.zero_();
    } else {
      dy.copy_(by_head(dg.transpose(1, 2).flatten(2), rows));
      if (a.recurrent_clip > 0) dy.clamp_(-a.recurrent_clip, a.recurrent_clip);
    }
    for (Tensor* state : {&dy, &dc, &dn}) steps.fill_at_resets(*state, t, 0);
  }
  steps.unsort(dy0, dy_all);
  steps.unsort(dc0, dc_all);
  steps.unsort(dn0, dn_all);
  std::tie(dr, db) = slstm_parameter_gradients(dwx, previous);
  return gradients;
}

}  // namespace xlstm::ops
