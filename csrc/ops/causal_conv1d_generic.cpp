#include "csrc/ops/causal_conv1d_generic.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "csrc/ops/rows.h"
#include "csrc/ops/sequences.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// x[batch, at] of (B,T,C) for indices of one shape, which may lie beyond the ends: clamped, the caller masks.
Tensor rows_at(const Tensor& x, const Tensor& batch, const Tensor& at) {
  return x.index({batch, at.clamp(0, x.size(1) - 1)});
}

/// Which inputs every token sees, all in int64: (B,T), or (N,W-1) of what belongs to states.
class Sight {
 public:
  Sight(const CausalConv1dArguments& arguments, const CausalConv1dSizes& s)
      : a(arguments), sizes(s), accumulate(accumulate_type(a.x.scalar_type())) {
    const auto whole = a.x.options().dtype(at::kLong);
    const Tensor rows = at::arange(s.batch, whole).unsqueeze(1),
                 tokens = at::arange(s.time, whole).unsqueeze(0);
    batch = rows.expand({s.batch, s.time});
    token = tokens.expand({s.batch, s.time});
    if (a.cu_seqlens) {
      const Tensor bounds = sequence_offsets(*a.cu_seqlens, s.time).to(at::kLong);
      begins = bounds.slice(0, 0, s.num_sequences);
      ends = bounds.slice(0, 1, s.num_sequences + 1);
      sequence = s.num_sequences == 0
                     ? token
                     : at::bucketize(token, ends.contiguous(), false, /*right=*/true)
                           .clamp_max(s.num_sequences - 1);
    } else {
      begins = at::zeros({s.num_sequences}, whole);
      ends = begins + s.time;
      sequence = batch;
    }
    if (s.time == 0) return;
    last_reset = a.reset
                     ? std::get<0>(at::where(*a.reset, token, at::full_like(token, -1)).cummax(1))
                     : at::full_like(token, -1);
    begin = begins.index({sequence});
    end = ends.index({sequence});
    x = a.x.to(accumulate);
    if (a.state0) state0 = a.state0->to(accumulate);
    weight = a.weight.to(accumulate);
  }

  /// Tokens that see the one `distance` before them, (B,T).
  Tensor sees_token(int64_t distance) const {
    return (token - distance >= begin) & (token - distance >= last_reset);
  }
  /// The input of that distance, 0 where it is not seen.
  Tensor input(int64_t distance) const {
    const Tensor from_x = sees_token(distance).unsqueeze(2);
    const Tensor value = rows_at(x, batch, token - distance);
    Tensor other = at::zeros({1}, x.options());
    if (a.state0) {
      const Tensor seen =
          (token - distance < begin) & (last_reset < begin);  // no reset in the sequence yet
      const Tensor row = token - distance - begin + sizes.width - 1;
      other = at::where(seen.unsqueeze(2), rows_at(state0, sequence, row), other);
    }
    return at::where(from_x, value, other);
  }
  Tensor tap(int64_t distance) const { return weight.select(1, sizes.width - 1 - distance); }

  Tensor convolved() const {
    Tensor sum = a.bias ? a.bias->to(accumulate).expand(x.sizes()).clone()
                        : at::zeros(x.sizes(), x.options());
    for (int64_t j = sizes.width - 1; j >= 0; --j) sum += input(j) * tap(j);
    return sum;
  }

  /// (N,W-1): the token or, if negative, the position before the begin, of every row of the final states; counted from
  /// the sequence's begin.
  Tensor state_positions() const {
    const int64_t memory = sizes.width - 1;
    return (ends - begins - memory).unsqueeze(1) + at::arange(memory, begins.options());
  }
  /// (N,1): the last reset of every sequence as a token of its row, below its begin if it has none.
  Tensor last_resets() const {
    if (sizes.time == 0) return at::full_like(begins, -1).unsqueeze(1);
    const Tensor rows = a.cu_seqlens ? at::zeros({1}, begins.options()).expand(begins.sizes())
                                     : at::arange(sizes.batch, begins.options());
    const Tensor last = (ends - 1).clamp_min(0);
    return at::where(ends > begins, last_reset.index({rows, last}), begins - 1).unsqueeze(1);
  }

  const CausalConv1dArguments& a;
  const CausalConv1dSizes& sizes;
  at::ScalarType accumulate;
  Tensor batch, token, sequence;  // (B,T)
  Tensor begins, ends;            // (N)
  Tensor last_reset, begin, end;  // (B,T); -1: none
  Tensor x, state0, weight;       // in the type of accumulation
};

Tensor slope_of_silu(const Tensor& v) {
  const Tensor s = v.sigmoid();
  return s * (1 + v * (1 - s));
}

Tensor final_states(const Sight& sight) {
  const auto& [a, sizes] = std::tie(sight.a, sight.sizes);
  const Tensor position = sight.state_positions();
  const Tensor token = position + sight.begins.unsqueeze(1), reset = sight.last_resets();
  Tensor state = at::zeros({sizes.num_sequences, sizes.width - 1, sizes.channels}, a.x.options());
  if (sizes.num_sequences == 0) return state;
  if (sizes.time > 0) {
    const Tensor rows =
        a.cu_seqlens
            ? at::zeros_like(position)
            : at::arange(sizes.batch, position.options()).unsqueeze(1).expand(position.sizes());
    const Tensor kept = (position >= 0) & (token >= reset);
    state = at::where(kept.unsqueeze(2), rows_at(a.x, rows, token), state);
  }
  if (a.state0) {
    const Tensor kept = (position < 0) & (reset < sight.begins.unsqueeze(1));
    const Tensor sequences =
        at::arange(sizes.num_sequences, position.options()).unsqueeze(1).expand(position.sizes());
    const Tensor from =
        rows_at(a.state0->to(a.x.scalar_type()), sequences, position + sizes.width - 1);
    state = at::where(kept.unsqueeze(2), from, state);
  }
  return state;
}

/// What the gradient of the final states adds to dx, (B,T,C).
Tensor kept_gradients(const Sight& sight, const Tensor& dstate) {
  const int64_t memory = sight.sizes.width - 1;
  const Tensor row = sight.token - (sight.end - memory);
  // Kept: the last reset of its sequence is not after the token.
  const Tensor resets = sight.last_resets().squeeze(1).index({sight.sequence});
  const Tensor kept = (row >= 0) & (resets <= sight.token);
  return at::where(kept.unsqueeze(2), rows_at(dstate, sight.sequence, row),
                   at::zeros({1}, dstate.options()));
}

/// (N,W-1,C). d: (B,T,C), undefined where dy is absent.
Tensor start_gradients(const Sight& sight, const Tensor& d, const OptionalTensor& dstate) {
  const CausalConv1dSizes& sizes = sight.sizes;
  const int64_t memory = sizes.width - 1;
  const auto options = sight.a.x.options().dtype(sight.accumulate);
  Tensor sum = at::zeros({sizes.num_sequences, memory, sizes.channels}, options);
  if (sizes.num_sequences == 0) return sum;
  const Tensor row =
      at::arange(memory, sight.begins.options()).expand({sizes.num_sequences, memory});
  const Tensor begins = sight.begins.unsqueeze(1), ends = sight.ends.unsqueeze(1);
  const Tensor zero = at::zeros({1}, options);
  const Tensor sequences =
      at::arange(sizes.num_sequences, row.options()).unsqueeze(1).expand(row.sizes());
  if (dstate) {
    const Tensor to = row - (ends - begins);
    const Tensor kept = (to >= 0) & (sight.last_resets() < begins);
    sum = sum + at::where(kept.unsqueeze(2), rows_at(*dstate, sequences, to), zero);
  }
  if (!d.defined()) return sum;
  const Tensor rows = sight.a.cu_seqlens ? at::zeros_like(row) : sequences;
  for (int64_t i = 0; i < memory; ++i) {  // token i of the sequence
    const Tensor token = begins + i;
    const Tensor clamped = token.clamp(0, sizes.time - 1);
    const Tensor seen = (row >= i) & (token < ends) &
                        (sight.last_reset.index({rows, clamped.expand(row.sizes())}) < begins);
    const Tensor gradient = rows_at(d, rows, token.expand(row.sizes()));
    const Tensor taps = sight.weight.t().index({(row - i).clamp_min(0)});  // (N,W-1,C)
    sum = sum + at::where(seen.unsqueeze(2), taps * gradient, zero);
  }
  return sum;
}

}  // namespace

CausalConv1dOutputs causal_conv1d_generic(const CausalConv1dArguments& a,
                                          const CausalConv1dSizes& sizes) {
  const Sight sight(a, sizes);
  const Tensor state = final_states(sight);
  if (a.x.numel() == 0) return {at::empty(a.x.sizes(), a.x.options()), state};
  const Tensor v = sight.convolved();
  return {(a.silu ? v * v.sigmoid() : v).to(a.x.scalar_type()), state};
}

CausalConv1dGradients causal_conv1d_generic_backward(const CausalConv1dArguments& a,
                                                     const CausalConv1dSizes& sizes,
                                                     const OptionalTensor& dy,
                                                     const OptionalTensor& dstate) {
  const Sight sight(a, sizes);
  const auto options = a.x.options().dtype(sight.accumulate);
  OptionalTensor dlast;
  if (dstate) dlast = dstate->to(sight.accumulate);
  Tensor d, dx = at::zeros(a.x.sizes(), options), dweight = at::zeros(a.weight.sizes(), options);
  Tensor dbias = at::zeros({a.bias ? sizes.channels : 0}, options);
  if (a.x.numel() > 0) {
    if (dlast) dx = dx + kept_gradients(sight, *dlast);
    if (dy) {
      d = dy->to(sight.accumulate);
      if (a.silu) d = d * slope_of_silu(sight.convolved());
      if (a.bias) dbias = d.sum(at::IntArrayRef{0, 1});
      const Tensor zero = at::zeros({1}, options);
      for (int64_t j = 0; j < sizes.width; ++j) {
        dweight.select(1, sizes.width - 1 - j)
            .copy_((d * sight.input(j)).sum(at::IntArrayRef{0, 1}));
        if (j >= sizes.time) continue;
        const Tensor seen = sight.sees_token(j).unsqueeze(2);
        const Tensor part = at::where(seen, d * sight.tap(j), zero).slice(1, j);
        dx.slice(1, 0, sizes.time - j).add_(part);
      }
    }
  }
  Tensor dstate0 = at::empty({0}, a.x.options());
  if (a.state0)
    dstate0 = start_gradients(sight, d, dlast).to(a.x.scalar_type()).to(a.state0->scalar_type());
  return {dx.to(a.x.scalar_type()), dweight.to(a.weight.scalar_type()),
          dbias.to(a.bias ? a.bias->scalar_type() : a.x.scalar_type()), dstate0};
}

Tensor causal_conv1d_generic_step(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  Tensor& state, bool silu) {
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const Tensor window = at::cat({state, x.unsqueeze(1)}, 1);  // (B,W,C)
  Tensor v = (window.to(accumulate) * weight.t().to(accumulate)).sum(1);
  if (bias) v = v + bias->to(accumulate);
  state.copy_(window.slice(1, 1));
  return (silu ? v * v.sigmoid() : v).to(x.scalar_type());
}

}  // namespace xlstm::ops
