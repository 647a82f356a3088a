// selective_scan and wkv in ATen calls, which CUDA tensors take, on the CPU: against loops over the tokens in float64 that
// autograd differentiates, and against the operators for the CPU; how much memory they take.
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "csrc/ops/block_scan.h"
#include "csrc/ops/selective_scan.h"
#include "csrc/ops/selective_scan_generic.h"
#include "csrc/ops/wkv.h"
#include "csrc/ops/wkv_generic.h"
#include "tests/support/catch.h"

namespace {

using at::Tensor;
using namespace xlstm::ops;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr int64_t kTimes[] = {1, 17, 63, 64, 65, 127, 200};

Tensor random(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

/// The same numbers with other strides.
Tensor scattered(const Tensor& t) {
  return at::stack({t, t}, -1).transpose(0, -1).contiguous().transpose(0, -1).select(-1, 1);
}

/// An operator with its arguments; state0 and reset may be absent.
struct Case {
  std::vector<std::string> names;
  Tensors inputs;    ///< in float64, undefined where absent
  size_t fixed = 0;  ///< how many of the last inputs have no gradient
  OptionalTensor reset;
  /// Outputs that have gradients, from inputs of any dtype.
  std::function<Tensors(const Tensors&, const OptionalTensor&)> loop, cpu, generic;
  /// Of the inputs that have gradients, from those of the outputs.
  std::function<Tensors(const Tensors&, const Tensors&, const OptionalTensor&)> backward;
};

OptionalTensor given(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct Results {
  Tensors outputs, gradients;
};

Results by_autograd(const Case& c, const Tensors& inputs, const Tensors& weights, bool loop) {
  Tensors leaves, defined;
  for (size_t i = 0; i < inputs.size(); ++i) {
    leaves.push_back(inputs[i].defined() ? inputs[i].detach() : inputs[i]);
    if (!leaves[i].defined() || i + c.fixed >= inputs.size()) continue;
    defined.push_back(leaves[i].requires_grad_());
  }
  Results r{(loop ? c.loop : c.cpu)(leaves, c.reset), {}};
  r.gradients = torch::autograd::grad(r.outputs, defined, weights, std::nullopt, false, true);
  for (size_t i = 0; i < defined.size(); ++i)
    if (!r.gradients[i].defined()) r.gradients[i] = at::zeros_like(defined[i]);
  return r;
}

Results by_blocks(const Case& c, const Tensors& inputs, const Tensors& weights) {
  Results r{c.generic(inputs, c.reset), {}};
  const Tensors found = c.backward(inputs, weights, c.reset);
  for (size_t i = 0; i + c.fixed < inputs.size(); ++i)
    if (inputs[i].defined()) r.gradients.push_back(found[i]);
  return r;
}

Tensors rounded(const Tensors& tensors, at::ScalarType type) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(t.defined() ? t.to(type) : t);
  return result;
}

double difference(const Tensor& got, const Tensor& wanted) {
  REQUIRE(got.sizes() == wanted.sizes());
  if (got.numel() == 0) return 0;
  const double size = at::linalg_vector_norm(wanted).item<double>();
  const double error = at::linalg_vector_norm(got.to(at::kDouble) - wanted).item<double>();
  return std::isfinite(error) ? error / std::max(size, 1e-30) : INFINITY;
}

/// In float64 against the loop and the CPU operator; in float32 no more than twice as far from the loop in float64 as the
/// loop in float32 is.
void check(const Case& c) {
  const auto each = [](const Results& r, const std::function<void(size_t, const Tensor&)>& f) {
    size_t i = 0;
    for (const Tensor& t : r.outputs) f(i++, t.detach());
    for (const Tensor& t : r.gradients) f(i++, t);
  };
  const auto collect = [&](const Results& r) {
    Tensors all;
    each(r, [&](size_t, const Tensor& t) { all.push_back(t); });
    return all;
  };
  Tensors weights;
  for (const Tensor& t : c.loop(c.inputs, c.reset)) weights.push_back(random(t.sizes()));
  const Tensors exact = collect(by_autograd(c, c.inputs, weights, true));
  const Tensors kernel = collect(by_autograd(c, c.inputs, weights, false));
  const Tensors got = collect(by_blocks(c, c.inputs, weights));
  REQUIRE((got.size() == exact.size() && kernel.size() == exact.size()));
  for (size_t i = 0; i < exact.size(); ++i) {
    CAPTURE(i);
    CHECK(got[i].scalar_type() == at::kDouble);
    CHECK(difference(got[i], exact[i]) < 1e-11);
    CHECK(difference(got[i], kernel[i]) < 1e-11);
  }
  const Tensors low = rounded(c.inputs, at::kFloat), low_weights = rounded(weights, at::kFloat);
  const Tensors truth =
      collect(by_autograd(c, rounded(low, at::kDouble), rounded(low_weights, at::kDouble), true));
  const Tensors plain = collect(by_autograd(c, low, low_weights, true));
  const Tensors ours = collect(by_blocks(c, low, low_weights));
  for (size_t i = 0; i < truth.size(); ++i) {
    CAPTURE(i, difference(plain[i], truth[i]));
    CHECK(ours[i].scalar_type() == at::kFloat);
    CHECK(difference(ours[i], truth[i]) <= 2 * difference(plain[i], truth[i]) + 1e-6);
  }
}

Tensor resets(int64_t batch, int64_t time) {
  const Tensor reset = at::zeros({batch, time}, at::kBool);
  reset[0][time / 2].fill_(true);
  reset[batch - 1][0].fill_(true);
  reset[batch - 1][time - 1].fill_(true);
  if (time > 64) reset[0][64].fill_(true);
  return reset;
}

/// h_t = e^{delta a} h_{t-1} + delta b x from token to token.
Tensors selective_scan_loop(const Tensors& in, const OptionalTensor& reset) {
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

SelectiveScanArguments scan_arguments(const Tensors& in, const OptionalTensor& state0,
                                      const OptionalTensor& reset) {
  return {in[0], in[1], in[2], in[3], in[4], in[5], state0, reset};
}

Case scan_case(int64_t time, bool state, bool with_resets, double spread, int64_t block = 64) {
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

/// Stabilised sums from token to token; the exponents are constants.
Tensors wkv_loop(const Tensors& in, const OptionalTensor& reset) {
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
  return {at::stack(rows, 1), a, b};
}

WkvArguments wkv_arguments(const Tensors& in, const OptionalTensor* states,
                           const OptionalTensor& reset) {
  return {in[0], in[1], in[2], in[3], states[0], states[1], states[2], reset};
}

Case wkv_case(int64_t time, bool state, bool with_resets, double spread, int64_t block = 64) {
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
    return {y, a, b};
  };
  c.generic = [block](const Tensors& in, const OptionalTensor& reset) -> Tensors {
    const OptionalTensor states[] = {given(in[4]), given(in[5]), given(in[6])};
    auto [y, a, b, p] = wkv_generic(wkv_arguments(in, states, reset), block);
    return {y, a, b};
  };
  c.backward = [block](const Tensors& in, const Tensors& d, const OptionalTensor& reset) {
    const OptionalTensor states[] = {given(in[4]), given(in[5]), given(in[6])};
    auto [dk, dv, dw, du, da, db] = wkv_generic_backward(given(d[0]), given(d[1]), given(d[2]),
                                                         wkv_arguments(in, states, reset), block);
    return Tensors{dk, dv, dw, du, da, db};
  };
  return c;
}

/// Bytes that the CPU allocator has given out on this thread, and the most at any time.
class Memory : public c10::MemoryReportingInfoBase {
 public:
  bool memoryProfilingEnabled() const override { return true; }
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
    held_ += bytes;
    peak = std::max(peak, held_);
  }
  int64_t peak = 0;

 private:
  int64_t held_ = 0;
};

/// The most bytes at any time of a forward and a backward pass.
int64_t peak_bytes(const Case& c) {
  Tensors weights;
  for (const Tensor& t : c.generic(c.inputs, c.reset)) weights.push_back(at::randn_like(t));
  const auto memory = std::make_shared<Memory>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, memory);
    c.generic(c.inputs, c.reset);
    c.backward(c.inputs, weights, c.reset);
  }
  return memory->peak;
}

}  // namespace

TEST_CASE("a block's scan is its recurrence, both ways", "[scan_generic]") {
  torch::manual_seed(1);
  for (const int64_t time : {1, 2, 3, 4, 7, 16, 17, 63, 64, 65, 200})
    for (const bool with_resets : {false, true})
      for (const bool reverse : {false, true}) {
        CAPTURE(time, with_resets, reverse);
        const Tensor x = random({2, time, 3, 4}), keep = random({2, time, 1, 4}).sigmoid();
        const Tensor reset = with_resets ? resets(2, time) : Tensor();
        Tensor wanted = x.clone();
        for (int64_t i = 1; i < time; ++i) {
          const int64_t t = reverse ? time - 1 - i : i, from = reverse ? t + 1 : t - 1;
          const int64_t gate = std::max(t, from);
          Tensor passed = keep.select(1, gate) * wanted.select(1, from);
          if (with_resets) passed = passed.masked_fill(reset.select(1, gate).view({-1, 1, 1}), 0);
          wanted.select(1, t).add_(passed);
        }
        CHECK(at::allclose(scan_block(x.clone(), keep, reset, reverse), wanted, 1e-12, 1e-12));
      }
}

TEST_CASE("selective_scan in blocks equals a loop and the CPU operator", "[scan_generic]") {
  torch::manual_seed(2);
  for (const int64_t time : kTimes)
    for (const bool state : {false, true})
      for (const double spread : {0.5, 3.0}) {  // decays from 0.99 to e^-5, from 1 to 0
        const bool with_resets = state == (spread > 1);
        CAPTURE(time, state, with_resets, spread);
        check(scan_case(time, state, with_resets, spread));
      }
  check(scan_case(200, true, true, 1, 7));
}

TEST_CASE("wkv in blocks equals a loop and the CPU operator", "[scan_generic]") {
  torch::manual_seed(3);
  for (const int64_t time : kTimes)
    for (const bool state : {false, true})
      for (const double spread :
           {0.5, 3.0, 20.0}) {  // at the end keys of e^{+-80}, decays from e^-1e-20 to 0
        if (spread == 20 && time > 100) continue;
        const bool with_resets = state == (spread > 1);
        CAPTURE(time, state, with_resets, spread);
        check(wkv_case(time, state, with_resets, spread));
      }
  check(wkv_case(200, true, true, 1, 7));
  check(wkv_case(300, true, false, 1, 256));
}

TEST_CASE("scans in blocks: any strides, absent gradients, low precision", "[scan_generic]") {
  torch::manual_seed(4);
  for (Case c : {scan_case(70, true, true, 1), wkv_case(70, true, true, 1)}) {
    Tensors weights;
    for (const Tensor& t : c.generic(c.inputs, c.reset)) weights.push_back(random(t.sizes()));
    const Results dense = by_blocks(c, c.inputs, weights);
    const auto compare = [&](const Results& got, const Results& wanted, double tolerance) {
      for (size_t i = 0; i < wanted.outputs.size(); ++i)
        CHECK(difference(got.outputs[i], wanted.outputs[i]) <= tolerance);
      for (size_t i = 0; i < wanted.gradients.size(); ++i)
        CHECK(difference(got.gradients[i], wanted.gradients[i]) <= tolerance);
    };
    Tensors strided, strided_weights;
    for (const Tensor& t : c.inputs) strided.push_back(scattered(t));
    for (const Tensor& t : weights) strided_weights.push_back(scattered(t));
    REQUIRE_FALSE(strided[0].is_contiguous());
    compare(by_blocks(c, strided, strided_weights), dense, 1e-13);

    Tensors only_y{weights[0], Tensor(), Tensor()}, zeros{weights[0]};
    for (size_t i = 1; i < weights.size(); ++i) zeros.push_back(at::zeros_like(weights[i]));
    compare(by_blocks(c, c.inputs, only_y), by_blocks(c, c.inputs, zeros), 0);
    Tensors only_state(3);
    only_state[1] = weights[1];
    zeros[1] = weights[1], zeros[0] = at::zeros_like(weights[0]);
    compare(by_blocks(c, c.inputs, only_state), by_blocks(c, c.inputs, zeros), 0);

    const Tensors low = rounded(c.inputs, at::kBFloat16);
    const Tensors low_weights = rounded(weights, at::kBFloat16);
    const Results got = by_blocks(c, low, low_weights);
    CHECK(got.outputs[0].scalar_type() == at::kBFloat16);
    CHECK(got.outputs[1].scalar_type() == at::kFloat);
    compare(got, by_blocks(c, rounded(low, at::kDouble), rounded(low_weights, at::kDouble)), 8e-3);
  }
}

TEST_CASE("scans in blocks: no tokens pass the state and its gradient on", "[scan_generic]") {
  for (Case c : {scan_case(1, true, false, 1), wkv_case(1, true, false, 1)}) {
    const bool wkv = c.fixed == 1;
    for (Tensor& t : c.inputs)
      if (t.dim() == 3 && t.size(1) == 1) t = t.narrow(1, 0, 0);
    const Tensors out = c.generic(c.inputs, {});
    CHECK(out[0].sizes() == at::IntArrayRef({2, 0, 5}));
    const size_t state0 = wkv ? 4 : 6;
    CHECK(at::equal(out[1], c.inputs[state0]));
    CHECK_FALSE(out[1].is_alias_of(c.inputs[state0]));
    Tensors weights;
    for (const Tensor& t : out) weights.push_back(random(t.sizes()));
    const Tensors d = c.backward(c.inputs, weights, {});
    CHECK(at::equal(d[state0], weights[1]));
    CHECK_FALSE(d[state0].is_alias_of(weights[1]));
    CHECK(d[0].sizes() == c.inputs[0].sizes());
    CHECK(d[2].eq(0).all().item<bool>());
  }
}

TEST_CASE("scans in blocks: NaN of one document does not reach the next", "[scan_generic]") {
  torch::manual_seed(5);
  constexpr int64_t kBorder = 75;
  for (Case c : {scan_case(150, true, false, 1), wkv_case(150, true, false, 1)}) {
    c.reset = at::zeros({2, 150}, at::kBool);
    c.reset->select(1, kBorder).fill_(true);
    Tensors weights;
    for (const Tensor& t : c.generic(c.inputs, c.reset)) weights.push_back(random(t.sizes()));
    const Results before = by_blocks(c, c.inputs, weights);
    for (Tensor& t : c.inputs)
      if (t.dim() == 3 && t.size(1) == 150) {
        t = t.clone();
        t.narrow(1, 0, kBorder).fill_(std::numeric_limits<double>::quiet_NaN());
      }
    c.inputs.back().fill_(std::numeric_limits<double>::infinity());  // of a state
    const Results after = by_blocks(c, c.inputs, weights);
    const auto late = [](const Tensor& t) { return t.narrow(1, kBorder, 150 - kBorder); };
    CHECK(at::equal(late(after.outputs[0]), late(before.outputs[0])));
    for (size_t i = 1; i < before.outputs.size(); ++i)
      CHECK(at::equal(after.outputs[i], before.outputs[i]));
    for (size_t i = 0; i < before.gradients.size(); ++i) {
      CAPTURE(i);
      if (before.gradients[i].dim() == 3 && before.gradients[i].size(1) == 150)
        CHECK(at::equal(late(after.gradients[i]), late(before.gradients[i])));
    }
  }
}

TEST_CASE("scans in blocks: memory grows as the inputs, not as the states of all tokens",
          "[scan_generic]") {
  constexpr int64_t kTokens = 1024, kDim = 64, kStates = 64;
  const auto scan = [](int64_t time) {
    Case c = scan_case(time, false, false, 1);
    c.inputs = {random({1, time, kDim}),
                random({1, time, kDim}).exp(),
                -random({kDim, kStates}).exp(),
                random({1, time, kStates}),
                random({1, time, kStates}),
                random({kDim}),
                Tensor()};
    return peak_bytes(c);
  };
  const int64_t grown = scan(2 * kTokens) - scan(kTokens);
  // What comes out, y and four gradients, and the states at the borders of blocks, each as large as 64 tokens of x.
  const int64_t outputs = 8 * kTokens * 3 * kDim + 8 * kTokens * 2 * kStates;
  const int64_t borders = 8 * kTokens / kSelectiveScanBlock * kDim * kStates;
  const int64_t states = 8 * kTokens * kDim * kStates;
  CAPTURE(grown, outputs, borders, states);
  CHECK(grown <= outputs + borders + states / 100);
  CHECK(grown < states / 8);
}
