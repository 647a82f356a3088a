// mlstm_chunkwise and its gradients against the recurrence of tests/reference/mlstm_reference.h.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "tests/ops/mlstm_cases.h"
#include "tests/ops/mlstm_operators.h"

namespace {

using at::Tensor;
using xlstm::ops::mlstm_chunkwise;
using xlstm::ops::MlstmArguments;
using xlstm::ops::MlstmOptions;
using xlstm::test::arguments;
using xlstm::test::Case;
using xlstm::test::check_close;
using xlstm::test::MlstmResult;
using xlstm::test::numbers;
using xlstm::test::Problem;
using xlstm::test::Threads;

MlstmResult run_operator(Problem& p) {
  std::vector<Tensor> inputs{p.q, p.k, p.v, p.igate, p.fgate};
  if (p.c.states) inputs.insert(inputs.end(), {p.c0, p.n0});
  for (Tensor& x : inputs) x.requires_grad_();
  const MlstmArguments a = arguments(p);
  const auto [h, c, n, m] =
      mlstm_chunkwise(p.q, p.k, p.v, p.igate, p.fgate, a.c0, a.n0, a.m0, p.options());
  return {h,
          c,
          n,
          m,
          std::get<4>(xlstm::test::forward_operator(a)),
          torch::autograd::grad({h, c, n}, inputs, {p.dh, p.dc, p.dn}, {}, false, true)};
}

void check_case(const Case& which, double tolerance = 1e-10) {
  xlstm::test::check_case(which, run_operator, tolerance);
}

}  // namespace

TEST_CASE("mlstm_chunkwise equals the recurrence, gradients included") {
  for (const bool states : {false, true})
    for (const bool resets : {false, true})
      for (const int64_t time : {0, 1, 31, 70})
        for (const int64_t chunk : {0, 1, 3, 16})
          check_case({.time = time, .states = states, .resets = resets, .chunk = chunk});
}

TEST_CASE("mlstm_chunkwise with the sigmoid input gate") {
  for (const bool normalize : {false, true})
    for (const int64_t chunk : {0, 5})
      check_case({.sigmoid = true, .normalize = normalize, .chunk = chunk});
  check_case({.time = 150, .states = false, .sigmoid = true, .chunk = 64});
}

TEST_CASE("mlstm_chunkwise with odd sizes") {
  check_case({.batch = 0});
  check_case({.heads = 0});
  check_case({.dqk = 1, .dv = 1});
  check_case({.dqk = 1, .dv = 9});
  check_case({.dqk = 9, .dv = 1});
  check_case({.batch = 1, .time = 100, .heads = 1, .dqk = 33, .dv = 65, .chunk = 100});
}

TEST_CASE("mlstm_chunkwise with extreme gates") {
  for (const double size : {30.0, 1e3, 1e4})
    check_case({.time = 64, .chunk = 16, .gate_size = size, .eps = 0}, 1e-9);
}

TEST_CASE("mlstm_chunkwise split into segments equals the recurrence") {
  const Threads threads(7);  // smaller calls than these would run on one
  Case c{.batch = 1, .time = 301, .heads = 1, .dqk = 64, .dv = 60, .chunk = 16};
  for (const bool resets : {false, true}) {
    for (const bool sigmoid : {false, true}) {
      c.resets = resets;
      c.sigmoid = sigmoid;
      c.states = resets != sigmoid;
      check_case(c);
    }
  }
  check_case({.batch = 3, .time = 110, .heads = 1, .dqk = 64, .dv = 60, .chunk = 8});
}

TEST_CASE("mlstm_chunkwise computes states a second time where all would not fit") {
  // 300 * 301 * 8 bytes per state and a chunk of one token: more than 64 MB from 93 tokens on.
  check_case(
      {.batch = 1, .time = 110, .heads = 1, .dqk = 300, .dv = 300, .resets = false, .chunk = 1});
}

TEST_CASE("mlstm_chunkwise in float32 with extreme gates") {
  Problem p({.time = 80, .chunk = 16, .gate_size = 1e4});
  p.fgate.select(1, 20).fill_(-std::numeric_limits<double>::infinity());
  p.igate.select(1, 21).fill_(-std::numeric_limits<double>::infinity());
  const auto low = [](const Tensor& x) { return x.to(at::kFloat); };
  const auto wide = [&low](const Tensor& x) { return low(x).to(at::kDouble); };
  const Tensor h64 =
      std::get<0>(mlstm_chunkwise(wide(p.q), wide(p.k), wide(p.v), wide(p.igate), wide(p.fgate),
                                  wide(p.c0), wide(p.n0), wide(p.m0), p.options()));
  const Tensor h32 =
      std::get<0>(mlstm_chunkwise(low(p.q), low(p.k), low(p.v), low(p.igate), low(p.fgate),
                                  low(p.c0), low(p.n0), low(p.m0), p.options()));
  REQUIRE(h32.isfinite().all().item<bool>());
  check_close("h", h32, numbers(h64), 1e-5);
}

TEST_CASE("mlstm_chunkwise takes any strides") {
  Problem p({});
  const auto transposed = [](const Tensor& x) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  };
  const auto spread = [](const Tensor& x) {
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() *= 2;
    return at::empty(sizes, x.options()).fill_(NAN).slice(-1, 0, sizes.back(), 2).copy_(x);
  };
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto cast = [type](const Tensor& x) { return x.to(type); };
    const Tensor q = cast(p.q), k = cast(p.k), v = cast(p.v), i = cast(p.igate), f = cast(p.fgate);
    const auto plain = mlstm_chunkwise(q, k, v, i, f, {}, {}, {}, p.options());
    const auto strided = mlstm_chunkwise(transposed(q), spread(k), spread(transposed(v)),
                                         transposed(i), spread(f), {}, {}, {}, p.options());
    check_close("h", std::get<0>(strided), numbers(std::get<0>(plain)), 1e-6);
    check_close("c", std::get<1>(strided), numbers(std::get<1>(plain)), 1e-6);
  }
}
