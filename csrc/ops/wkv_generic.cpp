#include "csrc/ops/wkv_generic.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "csrc/ops/block_scan.h"
#include "csrc/ops/full_precision.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Numerator and denominator (B,2,D) in units of e^exponent (B,D).
struct State {
  Tensor sums, exponent;
};

State first_state(const WkvArguments& in) {
  const auto options = in.k.options().dtype(accumulate_type(in.k.scalar_type()));
  const int64_t batch = in.k.size(0), dim = in.k.size(2);
  State s{at::zeros({batch, 2, dim}, options), at::full({batch, dim}, kWkvEmpty, options)};
  if (!in.a0) return s;
  s.sums.select(1, 0).copy_(*in.a0), s.sums.select(1, 1).copy_(*in.b0);
  s.exponent.copy_(*in.p0);
  return s;
}

/// For every token what stood before it.
Tensor shifted(const Tensor& first, const Tensor& x) {
  return at::cat({first.unsqueeze(1), x.narrow(1, 0, x.size(1) - 1)}, 1);
}

/// p_t = max(p_{t-1} - w, k_t) in log2(L) passes: after each it is the largest of twice as many tokens, k_s - (t - s) w.
Tensor exponents(const Tensor& k, const Tensor& w, const Tensor& first, const Tensor& reset) {
  const int64_t length = k.size(1);
  Tensor entering = first - w, document;
  if (reset.defined()) {
    entering.masked_fill_(reset_of_token(reset, 0, 2), kWkvEmpty);
    document = reset.cumsum(1).unsqueeze(-1);
  }
  Tensor p = k.clone();
  p.select(1, 0).copy_(at::maximum(k.select(1, 0), entering));
  for (int64_t step = 1; step < length; step *= 2) {
    const auto late = [&](const Tensor& t) { return t.narrow(1, step, length - step); };
    const auto early = [&](const Tensor& t) { return t.narrow(1, 0, length - step); };
    Tensor before = early(p) - static_cast<double>(step) * w;
    if (document.defined()) before.masked_fill_(late(document) != early(document), kWkvEmpty);
    p = at::cat({p.narrow(1, 0, step), at::maximum(late(p), before)}, 1);
  }
  return p;
}

/// Of the block's tokens, (B,L,D) in the dtype of accumulation unless it says otherwise. Exponents are float64 within a block:
/// they come from sums of several w, whose rounding would enter the weights.
struct Block {
  Block(const WkvArguments& in, int64_t first, int64_t count, const State& from)
      : type(accumulate_type(in.k.scalar_type())) {
    const Tensor w = in.w.to(at::kDouble);
    k = in.k.narrow(1, first, count).to(at::kDouble);
    v = in.v.narrow(1, first, count).to(type);
    if (in.reset) reset = in.reset->narrow(1, first, count);
    const Tensor entering = from.exponent.to(at::kDouble);
    exponent = exponents(k, w, entering, reset);
    const Tensor leaving = exponent.select(1, last());
    leaving.copy_(leaving.to(type));  // as it is returned: sums count in units of it
    before = shifted(entering, exponent);
    if (reset.defined()) before.masked_fill_(reset.unsqueeze(-1), kWkvEmpty);
    kept = power(before - w - exponent).unsqueeze(2);
    entered = power(k - exponent);
    sums = at::stack({entered * v, entered}, 2);
    add_passed(sums.select(1, 0), kept.select(1, 0), from.sums, reset_of_token(reset, 0, 3));
    sums = scan_block(sums, kept, reset, false);
  }
  int64_t last() const { return k.size(1) - 1; }
  Tensor power(const Tensor& x) const { return x.to(type).exp(); }
  /// Copies, so that the block is not kept alive.
  State state() const {
    return {sums.select(1, last()).clone(at::MemoryFormat::Contiguous),
            exponent.select(1, last()).to(type, /*non_blocking=*/false, /*copy=*/true)};
  }

  at::ScalarType type;
  Tensor k, v;              ///< k in float64
  Tensor reset;             ///< (B,L), undefined where absent
  Tensor before, exponent;  ///< of the states before and after every token, float64
  Tensor kept,
      entered;  ///< weights (B,L,1,D) of the state before, and of the token in the state after it
  Tensor sums;  ///< after every token (B,L,2,D)
};

/// How the tokens of a block are read.
struct Read {
  Read(const Block& block, const Tensor& u, const State& from) {
    const Tensor now = block.k + u.to(at::kDouble), peak = at::maximum(block.before, now);
    old = block.power(block.before - peak), fresh = block.power(now - peak);
    sums = shifted(from.sums, block.sums);
    if (block.reset.defined()) sums.masked_fill_(block.reset.unsqueeze(-1).unsqueeze(-1), 0);
    norm = old * sums.select(2, 1) + fresh;
    y = (old * sums.select(2, 0) + fresh * block.v) / norm;
  }
  Tensor old, fresh;  ///< weights of the state before and of the token
  Tensor sums;        ///< before every token (B,L,2,D)
  Tensor norm, y;
};

/// Filled block by block.
struct Sums {
  explicit Sums(const WkvArguments& in)
      : dk(at::empty(in.k.sizes(), in.k.options())), dv(at::empty(in.v.sizes(), in.v.options())) {
    const auto options = in.k.options().dtype(accumulate_type(in.k.scalar_type()));
    dw = at::zeros(in.w.sizes(), options), du = at::zeros(in.u.sizes(), options);
  }
  Tensor dk, dv, dw, du;
};

/// dstate (B,2,D): what reaches the sums after the block; returned is what reaches those before it. Exponents are
/// constants: nothing depends on them.
Tensor backward_block(const WkvArguments& in, int64_t first, const State& from, const Tensor& dy,
                      const Tensor& dstate, Sums& sums) {
  const int64_t count = dy.size(1);
  const Block block(in, first, count, from);
  const Read read(block, in.u, from);
  const Tensor dsum = dy / read.norm, dnorm = -dsum * read.y;
  const Tensor dgate = (dsum * block.v + dnorm) * read.fresh;
  sums.du.add_(dgate.sum(at::IntArrayRef{0, 1}));
  const Tensor reading = at::stack({dsum * read.old, dnorm * read.old}, 2);  // of the state before
  if (block.reset.defined()) reading.masked_fill_(block.reset.unsqueeze(-1).unsqueeze(-1), 0);
  Tensor d = at::cat({reading.narrow(1, 1, count - 1), dstate.unsqueeze(1)}, 1);
  d = scan_block(d, block.kept, block.reset, true);
  const Tensor da = d.select(2, 0), db = d.select(2, 1);
  const auto put = [&](const Tensor& to, const Tensor& value) {
    to.narrow(1, first, count).copy_(value);
  };
  put(sums.dk, dgate + (da * block.v + db) * block.entered);
  put(sums.dv, dsum * read.fresh + da * block.entered);
  sums.dw.sub_(((d * read.sums).sum(2) * block.kept.squeeze(2)).sum(at::IntArrayRef{0, 1}));
  const Tensor result = reading.select(1, 0).clone(at::MemoryFormat::Contiguous);
  add_passed(result, block.kept.select(1, 0), d.select(1, 0), reset_of_token(block.reset, 0, 3));
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv_generic(const WkvArguments& in, int64_t block) {
  const FullPrecision precision;
  const Tensor y = at::empty(in.k.sizes(), in.k.options());
  State state = first_state(in);
  each_block(in.k.size(1), block, [&](int64_t first, int64_t count) {
    const Block now(in, first, count, state);
    y.narrow(1, first, count).copy_(Read(now, in.u, state).y);
    state = now.state();
  });
  return {y, state.sums.select(1, 0).clone(), state.sums.select(1, 1).clone(), state.exponent};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv_generic_backward(
    const OptionalTensor& dy, const OptionalTensor& da, const OptionalTensor& db,
    const WkvArguments& in, int64_t block) {
  const FullPrecision precision;
  const int64_t time = in.k.size(1);
  std::vector<State> entering{first_state(in)};
  each_block(time, block, [&](int64_t first, int64_t count) {
    if (first + count == time) return;  // nothing enters behind the last one
    entering.push_back(Block(in, first, count, entering.back()).state());
  });
  Sums sums(in);
  Tensor passed = at::zeros_like(entering[0].sums);
  if (da) passed.select(1, 0).copy_(*da);
  if (db) passed.select(1, 1).copy_(*db);
  each_block_backwards(time, block, [&](int64_t first, int64_t count) {
    const Tensor given = dy ? dy->narrow(1, first, count).to(passed.scalar_type())
                            : at::zeros({in.k.size(0), count, in.k.size(2)}, passed.options());
    passed = backward_block(in, first, entering.back(), given, passed, sums);
    if (entering.size() > 1) entering.pop_back();
  });
  return {sums.dk,
          sums.dv,
          sums.dw.to(in.w.scalar_type()),
          sums.du.to(in.u.scalar_type()),
          passed.select(1, 0).clone(),
          passed.select(1, 1).clone()};
}

}  // namespace xlstm::ops
