#pragma once
// selective_scan and wkv, each as a loop over the tokens that autograd differentiates, as the operator for the CPU and as
// ATen calls block by block.
#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <vector>

#include "csrc/ops/selective_scan.h"
#include "csrc/ops/selective_scan_generic.h"
#include "csrc/ops/wkv.h"
#include "csrc/ops/wkv_generic.h"
#include "tests/support/catch.h"

namespace xlstm::scan_test {

using at::Tensor;
using namespace xlstm::ops;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

inline Tensor random(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

/// The same numbers with other strides.
inline Tensor scattered(const Tensor& t) {
  return at::stack({t, t}, -1).transpose(0, -1).contiguous().transpose(0, -1).select(-1, 1);
}

/// An operator with its arguments; state0 and reset may be absent.
struct Case {
  Tensors inputs;    ///< in float64, undefined where absent
  size_t fixed = 0;  ///< how many of the last inputs have no gradient
  OptionalTensor reset;
  /// Outputs that have gradients, from inputs of any dtype.
  std::function<Tensors(const Tensors&, const OptionalTensor&)> loop, cpu, generic;
  /// Of the inputs that have gradients, from those of the outputs.
  std::function<Tensors(const Tensors&, const Tensors&, const OptionalTensor&)> backward;
};

inline OptionalTensor given(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

struct Results {
  Tensors outputs, gradients;
};

inline Results by_autograd(const Case& c, const Tensors& inputs, const Tensors& weights,
                           bool loop) {
  Tensors leaves, defined;
  for (size_t i = 0; i < inputs.size(); ++i) {
    leaves.push_back(inputs[i].defined() ? inputs[i].detach() : inputs[i]);
    if (!leaves[i].defined() || i + c.fixed >= inputs.size()) continue;
    defined.push_back(leaves[i].requires_grad_());
  }
  Results r{(loop ? c.loop : c.cpu)(leaves, c.reset), {}};
  Tensors cast;
  for (size_t i = 0; i < weights.size(); ++i)
    cast.push_back(weights[i].to(r.outputs[i].scalar_type()));
  r.gradients = torch::autograd::grad(r.outputs, defined, cast, std::nullopt, false, true);
  for (size_t i = 0; i < defined.size(); ++i)
    if (!r.gradients[i].defined()) r.gradients[i] = at::zeros_like(defined[i]);
  return r;
}

inline Results by_blocks(const Case& c, const Tensors& inputs, const Tensors& weights) {
  Results r{c.generic(inputs, c.reset), {}};
  const Tensors found = c.backward(inputs, weights, c.reset);
  for (size_t i = 0; i + c.fixed < inputs.size(); ++i)
    if (inputs[i].defined()) r.gradients.push_back(found[i]);
  return r;
}

inline Tensors rounded(const Tensors& tensors, at::ScalarType type) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(t.defined() ? t.to(type) : t);
  return result;
}

/// Relative; of what is nearly zero, such as the bonus's gradient where nothing came before, rounding alone is left.
inline double difference(const Tensor& got, const Tensor& wanted) {
  constexpr double kLeast = 1e-4;
  REQUIRE(got.sizes() == wanted.sizes());
  if (got.numel() == 0) return 0;
  const double size = at::linalg_vector_norm(wanted).item<double>();
  const double error = at::linalg_vector_norm(got.to(at::kDouble) - wanted).item<double>();
  return std::isfinite(error) ? error / std::max(size, kLeast) : INFINITY;
}

/// Of the size of what they weigh.
inline Tensors weights_of(const Case& c) {
  Tensors weights;
  for (const Tensor& t : c.loop(c.inputs, c.reset))
    weights.push_back(random(t.sizes()) / (at::linalg_vector_norm(t) + 1e-30));
  return weights;
}

/// In float64 against the loop and the CPU operator; in float32 no more than twice as far from the loop in float64 as the
/// loop in float32 is.
inline void check(const Case& c, double tolerance = 1e-11) {
  const auto collect = [&](const Results& r) {
    Tensors all;
    for (const Tensor& t : r.outputs) all.push_back(t.detach());
    for (const Tensor& t : r.gradients) all.push_back(t);
    return all;
  };
  const Tensors weights = weights_of(c);
  const Tensors exact = collect(by_autograd(c, c.inputs, weights, true));
  const Tensors kernel = collect(by_autograd(c, c.inputs, weights, false));
  const Tensors got = collect(by_blocks(c, c.inputs, weights));
  REQUIRE((got.size() == exact.size() && kernel.size() == exact.size()));
  for (size_t i = 0; i < exact.size(); ++i) {
    CAPTURE(i);
    CHECK(difference(got[i], exact[i]) < tolerance);
    CHECK(difference(got[i], kernel[i]) < tolerance);
  }
  const Tensors low = rounded(c.inputs, at::kFloat), low_weights = rounded(weights, at::kFloat);
  const Tensors truth =
      collect(by_autograd(c, rounded(low, at::kDouble), rounded(low_weights, at::kDouble), true));
  const Tensors plain = collect(by_autograd(c, low, low_weights, true));
  const Tensors ours = collect(by_blocks(c, low, low_weights));
  for (size_t i = 0; i < truth.size(); ++i) {
    CAPTURE(i, difference(plain[i], truth[i]));
    CHECK(ours[i].scalar_type() == plain[i].scalar_type());
    CHECK(difference(ours[i], truth[i]) <= 2 * difference(plain[i], truth[i]) + 1e-6);
  }
}

inline Tensor resets(int64_t batch, int64_t time) {
  const Tensor reset = at::zeros({batch, time}, at::kBool);
  reset[0][time / 2].fill_(true);
  reset[batch - 1][0].fill_(true);
  reset[batch - 1][time - 1].fill_(true);
  if (time > 64) reset[0][64].fill_(true);
  return reset;
}

/// h_t = e^{delta a} h_{t-1} + delta b x from token to token.
inline Tensors selective_scan_loop(const Tensors& in, const OptionalTensor& reset) {
  const Tensor &x = in[0], &delta = in[1], &a = in[2], &b = in[3], &c = in[4];
  Tensor h = in[6].defined() ? in[6] : at::zeros({x.size(0), x.size(2), a.size(1)}, x.options());
  Tensors rows;
  for (int64_t t = 0; t < x.size(1); ++t) {
    if (reset) h = h.masked_fill(reset->select(1, t).view({-1, 1, 1}), 0);
    const Tensor step = delta.select(1, t).unsqueeze(-1), now = x.select(1, t);
    h = at::exp(step * a) * h + step * now.unsqueeze(-1) * b.select(1, t).unsqueeze(1);
    rows.push_back((h * c.select(1, t).unsqueeze(1)).sum(-1) + in[5] * now);
  }
  return {at::stack(rows, 1), h};
}

inline SelectiveScanArguments scan_arguments(const Tensors& in, const OptionalTensor& state0,
                                             const OptionalTensor& reset) {
  return {in[0], in[1], in[2], in[3], in[4], in[5], state0, reset};
}

inline Case scan_case(int64_t time, bool state, bool with_resets, double spread,
                      int64_t block = 64) {
  const int64_t batch = 2, dim = 5, n = 3;
  Case c;
  c.inputs = {random({batch, time, dim}),
              (random({batch, time, dim}) * spread).exp(),
              -(random({dim, n}) * spread).exp(),
              random({batch, time, n}),
              random({batch, time, n}),
              random({dim}),
              state ? random({batch, dim, n}) : Tensor()};
  if (with_resets) c.reset = resets(batch, time);
  c.loop = selective_scan_loop;
  c.cpu = [](const Tensors& in, const OptionalTensor& reset) -> Tensors {
    auto [y, h] = selective_scan(in[0], in[1], in[2], in[3], in[4], in[5], given(in[6]), reset);
    return {y, h};
  };
  c.generic = [block](const Tensors& in, const OptionalTensor& reset) -> Tensors {
    const OptionalTensor state0 = given(in[6]);
    auto [y, h] = selective_scan_generic(scan_arguments(in, state0, reset), block);
    return {y, h};
  };
  c.backward = [block](const Tensors& in, const Tensors& d, const OptionalTensor& reset) {
    const OptionalTensor state0 = given(in[6]);
    auto [dx, ddelta, da, db, dc, dskip, dstate0] = selective_scan_generic_backward(
        given(d[0]), given(d[1]), scan_arguments(in, state0, reset), block);
    return Tensors{dx, ddelta, da, db, dc, dskip, dstate0};
  };
  return c;
}

/// Sums as they are, whatever the exponent they are kept with; in float64.
inline Tensors without_exponent(const Tensor& y, const Tensor& a, const Tensor& b,
                                const Tensor& p) {
  const Tensor unit = p.detach().to(at::kDouble).exp();
  return {y, a.to(at::kDouble) * unit, b.to(at::kDouble) * unit};
}

/// Stabilised sums from token to token; the exponents are constants.
inline Tensors wkv_loop(const Tensors& in, const OptionalTensor& reset) {
  constexpr double kEmpty = -1e38;
  const Tensor &k = in[0], &v = in[1], &w = in[2], &u = in[3];
  Tensor a = at::zeros({k.size(0), k.size(2)}, k.options()), b = a,
         p = at::full({k.size(0), k.size(2)}, kEmpty, k.options());
  if (in[4].defined()) a = in[4], b = in[5], p = in[6];
  Tensors rows;
  for (int64_t t = 0; t < k.size(1); ++t) {
    if (reset) {
      const Tensor empty = reset->select(1, t).unsqueeze(-1);
      a = a.masked_fill(empty, 0), b = b.masked_fill(empty, 0), p = p.masked_fill(empty, kEmpty);
    }
    const Tensor now = k.select(1, t), value = v.select(1, t), bonus = u + now;
    const Tensor peak = at::maximum(p, bonus).detach(), next = at::maximum(p - w, now).detach();
    const Tensor old = at::exp(p - peak), fresh = at::exp(bonus - peak);
    rows.push_back((old * a + fresh * value) / (old * b + fresh));
    const Tensor kept = at::exp(p - w - next), entered = at::exp(now - next);
    a = kept * a + entered * value, b = kept * b + entered, p = next;
  }
  return without_exponent(at::stack(rows, 1), a, b, p);
}

inline WkvArguments wkv_arguments(const Tensors& in, const OptionalTensor* states,
                                  const OptionalTensor& reset) {
  return {in[0], in[1], in[2], in[3], states[0], states[1], states[2], reset};
}

inline Case wkv_case(int64_t time, bool state, bool with_resets, double spread,
                     int64_t block = 64) {
  const int64_t batch = 2, dim = 5;
  Case c;
  c.inputs = {random({batch, time, dim}) * 2 * spread, random({batch, time, dim}),
              (random({dim}) * spread).exp(), random({dim}) * spread};
  if (state)
    c.inputs.insert(c.inputs.end(), {random({batch, dim}), random({batch, dim}).exp(),
                                     random({batch, dim}) * spread});
  else
    c.inputs.resize(7);
  c.fixed = 1;
  if (with_resets) c.reset = resets(batch, time);
  c.loop = wkv_loop;
  c.cpu = [](const Tensors& in, const OptionalTensor& reset) -> Tensors {
    auto [y, a, b, p] =
        wkv(in[0], in[1], in[2], in[3], given(in[4]), given(in[5]), given(in[6]), reset);
    return without_exponent(y, a, b, p);
  };
  c.generic = [block](const Tensors& in, const OptionalTensor& reset) -> Tensors {
    const OptionalTensor states[] = {given(in[4]), given(in[5]), given(in[6])};
    auto [y, a, b, p] = wkv_generic(wkv_arguments(in, states, reset), block);
    return without_exponent(y, a, b, p);
  };
  c.backward = [block](const Tensors& in, const Tensors& d, const OptionalTensor& reset) {
    const OptionalTensor states[] = {given(in[4]), given(in[5]), given(in[6])};
    const WkvArguments arguments = wkv_arguments(in, states, reset);
    const Tensor unit = std::get<3>(wkv_generic(arguments, block)).to(at::kDouble).exp();
    const auto of_sum = [&](const Tensor& t) { return given(t.defined() ? t * unit : t); };
    auto [dk, dv, dw, du, da, db] =
        wkv_generic_backward(given(d[0]), of_sum(d[1]), of_sum(d[2]), arguments, block);
    return Tensors{dk, dv, dw, du, da, db};
  };
  return c;
}

}  // namespace xlstm::scan_test
