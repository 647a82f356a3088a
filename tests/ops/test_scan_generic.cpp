// selective_scan and wkv in ATen calls, which CUDA tensors take, on the CPU: against loops over the tokens in float64 that
// autograd differentiates, and against the operators for the CPU; how much memory they take.
#include <ATen/ops/allclose.h>
#include <torch/utils.h>

#include <limits>

#include "csrc/ops/block_scan.h"
#include "tests/ops/scan_cases.h"
#include "tests/support/peak_memory.h"

namespace {

using namespace xlstm::scan_test;

constexpr int64_t kTimes[] = {1, 17, 63, 64, 65, 127, 200};

/// The most bytes at any time of a forward and a backward pass.
int64_t peak_bytes(const Case& c) {
  Tensors weights;
  for (const Tensor& t : c.generic(c.inputs, c.reset)) weights.push_back(at::randn_like(t));
  return xlstm::testing::peak_bytes([&] {
    c.generic(c.inputs, c.reset);
    c.backward(c.inputs, weights, c.reset);
  });
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
      for (const double spread : {0.5, 3.0, 20.0}) {  // at the end keys of e^{+-80}, decays 0 or 1
        if (spread == 20 && time > 100) continue;
        const bool with_resets = state == (spread > 1);
        CAPTURE(time, state, with_resets, spread);
        check(wkv_case(time, state, with_resets, spread), spread > 10 ? 1e-9 : 1e-11);
      }
  check(wkv_case(200, true, true, 1, 7));
  check(wkv_case(300, true, false, 1, 256));
}

TEST_CASE("scans in blocks: any strides, absent gradients, low precision", "[scan_generic]") {
  torch::manual_seed(4);
  for (Case c : {scan_case(70, true, true, 1), wkv_case(70, true, true, 1)}) {
    const Tensors weights = weights_of(c);
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
    for (size_t i = 0; i < 4; ++i) CHECK(got.gradients[i].scalar_type() == at::kBFloat16);
    CHECK(got.gradients.back().scalar_type() == at::kFloat);
    const Results exact =
        by_blocks(c, rounded(low, at::kDouble), rounded(low_weights, at::kDouble));
    const auto as_exact = [](const Tensor& mine,
                             const Tensor& wanted) {  // but for the last rounding
      const double rounding = difference(wanted.to(mine.scalar_type()), wanted);
      CHECK(difference(mine, wanted) <= 2 * rounding + 1e-5);
    };
    for (size_t i = 0; i < got.outputs.size(); ++i) as_exact(got.outputs[i], exact.outputs[i]);
    for (size_t i = 0; i < got.gradients.size(); ++i)
      as_exact(got.gradients[i], exact.gradients[i]);
  }
}

TEST_CASE("scans in blocks: no tokens pass the state and its gradient on", "[scan_generic]") {
  const auto check_copy = [](const Tensor& got, const Tensor& of) {
    CHECK(at::equal(got, of));
    CHECK_FALSE(got.is_alias_of(of));
  };
  const Tensor none = at::zeros({2, 0, 5}, at::kDouble), vector = random({5});
  const Tensor none_n = at::zeros({2, 0, 3}, at::kDouble), a = -random({5, 3}).exp();
  const OptionalTensor absent, state0 = random({2, 5, 3}), dstate = random({2, 5, 3});
  const SelectiveScanArguments scan{none, none, a, none_n, none_n, vector, state0, absent};
  const auto [y, state] = selective_scan_generic(scan);
  CHECK(y.sizes() == none.sizes());
  check_copy(state, *state0);
  const auto [dx, ddelta, da, db, dc, dskip, dstate0] =
      selective_scan_generic_backward(none, dstate, scan);
  check_copy(dstate0, *dstate);
  CHECK((dx.sizes() == none.sizes() && dc.sizes() == none_n.sizes()));
  CHECK((da.eq(0).all().item<bool>() && dskip.eq(0).all().item<bool>()));

  const OptionalTensor a0 = random({2, 5}), b0 = random({2, 5}), p0 = random({2, 5});
  const WkvArguments sums{none, none, vector, vector, a0, b0, p0, absent};
  const auto [out, last_a, last_b, last_p] = wkv_generic(sums);
  CHECK(out.sizes() == none.sizes());
  check_copy(last_a, *a0), check_copy(last_b, *b0), check_copy(last_p, *p0);
  const auto [dk, dv, dw, du, da0, db0] = wkv_generic_backward(none, b0, a0, sums);
  check_copy(da0, *b0), check_copy(db0, *a0);
  CHECK((dk.sizes() == none.sizes() && dw.eq(0).all().item<bool>()));
}

TEST_CASE("scans in blocks: NaN of one document does not reach the next", "[scan_generic]") {
  torch::manual_seed(5);
  constexpr int64_t kBorder = 75;
  for (Case c : {scan_case(150, true, false, 1), wkv_case(150, true, false, 1)}) {
    c.reset = at::zeros({2, 150}, at::kBool);
    c.reset->select(1, kBorder).fill_(true);
    const Tensors weights = weights_of(c);
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
  constexpr int64_t kTokens = 256, kDim = 64, kStates = 64;
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
