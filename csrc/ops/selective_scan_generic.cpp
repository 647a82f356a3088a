#include "csrc/ops/selective_scan_generic.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "csrc/ops/block_scan.h"
#include "csrc/ops/full_precision.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Of the block's tokens, in the dtype of accumulation; states are (B,L,D,N).
struct Block {
  Block(const SelectiveScanArguments& in, int64_t first, int64_t count) {
    const at::ScalarType type = accumulate_type(in.x.scalar_type());
    const auto part = [&](const Tensor& t) { return t.narrow(1, first, count).to(type); };
    x = part(in.x), delta = part(in.delta), b = part(in.b), c = part(in.c);
    input = delta * x;
    keep = (delta.unsqueeze(-1) * in.a.to(type)).exp_();
    if (in.reset) reset = in.reset->narrow(1, first, count);
  }

  /// After every token, from the state before the block.
  Tensor states(const Tensor& before) const {
    Tensor h = input.unsqueeze(-1) * b.unsqueeze(2);
    add_passed(h.select(1, 0), keep.select(1, 0), before, reset_of_token(reset, 0, 3));
    return scan_block(h, keep, reset, false);
  }
  int64_t last() const { return x.size(1) - 1; }
  /// What is zero at resets although a factor may be NaN.
  void cut(const Tensor& t) const {
    if (reset.defined()) t.masked_fill_(reset.unsqueeze(-1).unsqueeze(-1), 0);
  }

  Tensor x, delta, b, c;
  Tensor input, keep;  ///< delta x (B,L,D); e^{delta a} (B,L,D,N)
  Tensor reset;        ///< (B,L), undefined where absent
};

Tensor first_state(const SelectiveScanArguments& in) {
  const auto options = in.x.options().dtype(accumulate_type(in.x.scalar_type()));
  const Tensor h = at::zeros({in.x.size(0), in.x.size(2), in.a.size(1)}, options);
  return in.state0 ? h.copy_(*in.state0) : h;
}

/// A copy of one token's, so that the block is not kept alive.
Tensor at_token(const Tensor& states, int64_t t) {
  return states.select(1, t).clone(at::MemoryFormat::Contiguous);
}

/// Sums over the states and over the channels.
Tensor over_states(const Tensor& h, const Tensor& by_state) {
  return at::matmul(h, by_state.unsqueeze(-1)).squeeze(-1);
}
Tensor over_channels(const Tensor& by_channel, const Tensor& h) {
  return at::matmul(by_channel.unsqueeze(2), h).squeeze(2);
}

/// Filled block by block.
struct Sums {
  explicit Sums(const SelectiveScanArguments& in)
      : dx(empty(in.x)), ddelta(empty(in.delta)), db(empty(in.b)), dc(empty(in.c)) {
    const auto options = in.x.options().dtype(accumulate_type(in.x.scalar_type()));
    da = at::zeros(in.a.sizes(), options), dskip = at::zeros(in.skip.sizes(), options);
  }
  static Tensor empty(const Tensor& like) { return at::empty(like.sizes(), like.options()); }
  Tensor dx, ddelta, db, dc, da, dskip;
};

/// dstate: what reaches the state after the block; returned is what reaches the one before it.
Tensor backward_block(const SelectiveScanArguments& in, int64_t first, const Block& block,
                      const Tensor& before, const Tensor& dy, const Tensor& dstate, Sums& sums) {
  const int64_t count = block.last() + 1;
  const auto put = [&](const Tensor& to, const Tensor& value) {
    to.narrow(1, first, count).copy_(value);
  };
  const Tensor h = block.states(before);
  put(sums.dc, over_channels(dy, h));
  Tensor dh = dy.unsqueeze(-1) * block.c.unsqueeze(2);
  dh.select(1, block.last()).add_(dstate);
  dh = scan_block(dh, block.keep, block.reset, true);
  put(sums.db, over_channels(block.input, dh));
  const Tensor dinput = over_states(dh, block.b);
  put(sums.dx, dinput * block.delta + dy * in.skip.to(dy.scalar_type()));
  sums.dskip.add_((dy * block.x).sum(at::IntArrayRef{0, 1}));
  // What passes to the state before each token; times that state it is the gradient of delta a.
  const Tensor passed = dh.mul_(block.keep);
  block.cut(passed);
  const Tensor result = at_token(passed, 0);
  passed.select(1, 0).mul_(before);
  if (count > 1) passed.narrow(1, 1, count - 1).mul_(h.narrow(1, 0, count - 1));
  block.cut(passed);
  sums.da.add_((passed * block.delta.unsqueeze(-1)).sum(at::IntArrayRef{0, 1}));
  put(sums.ddelta, dinput * block.x + passed.mul_(in.a.to(dy.scalar_type())).sum(-1));
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> selective_scan_generic(const SelectiveScanArguments& in, int64_t block) {
  const FullPrecision precision;
  const Tensor y = at::empty(in.x.sizes(), in.x.options());
  Tensor state = first_state(in);
  each_block(in.x.size(1), block, [&](int64_t first, int64_t count) {
    const Block now(in, first, count);
    const Tensor h = now.states(state);
    y.narrow(1, first, count)
        .copy_(over_states(h, now.c) + now.x * in.skip.to(now.x.scalar_type()));
    state = at_token(h, now.last());
  });
  return {y, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_generic_backward(
    const OptionalTensor& dy, const OptionalTensor& dstate, const SelectiveScanArguments& in,
    int64_t block) {
  const FullPrecision precision;
  const int64_t time = in.x.size(1);
  std::vector<Tensor> entering{first_state(in)};
  each_block(time, block, [&](int64_t first, int64_t count) {
    if (first + count == time) return;  // nothing enters behind the last one
    const Block now(in, first, count);
    entering.push_back(at_token(now.states(entering.back()), now.last()));
  });
  Sums sums(in);
  Tensor passed = at::zeros_like(entering[0]);
  if (dstate) passed.copy_(*dstate);
  each_block_backwards(time, block, [&](int64_t first, int64_t count) {
    const Block now(in, first, count);
    const Tensor given =
        dy ? dy->narrow(1, first, count).to(now.x.scalar_type()) : at::zeros_like(now.x);
    passed = backward_block(in, first, now, entering.back(), given, passed, sums);
    if (entering.size() > 1) entering.pop_back();
  });
  return {sums.dx, sums.ddelta, sums.da.to(in.a.scalar_type()),
          sums.db, sums.dc,     sums.dskip.to(in.skip.scalar_type()),
          passed};
}

}  // namespace xlstm::ops
