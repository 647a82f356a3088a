// The mLSTM in ATen calls (csrc/ops/mlstm_generic.h), which runs on any device, against the recurrence and against the
// CPU kernels.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "csrc/ops/mlstm_generic.h"
#include "tests/ops/mlstm_cases.h"
#include "tests/ops/mlstm_operators.h"

namespace {

using at::Tensor;
using xlstm::ops::MlstmArguments;
using xlstm::ops::MlstmBackwardArguments;
using xlstm::ops::OptionalTensor;
using xlstm::test::arguments;
using xlstm::test::Case;
using xlstm::test::check_close;
using xlstm::test::MlstmResult;
using xlstm::test::numbers;
using xlstm::test::Problem;
using xlstm::test::Threads;

MlstmResult run_generic(const Problem& p) {
  const Threads one(1);  // a second thread only waits in these sizes
  const MlstmArguments a = arguments(p);
  const auto [h, c, n, m, product] = xlstm::ops::mlstm_generic_forward(a);
  const auto [dq, dk, dv, digate, dfgate, dc0, dn0] =
      xlstm::ops::mlstm_generic_backward({p.dh, p.dc, p.dn, a, h, product});
  return {h, c, n, m, product, {dq, dk, dv, digate, dfgate, dc0, dn0}};
}

void check_case(const Case& which, double tolerance = 1e-10) {
  xlstm::test::check_case(which, run_generic, tolerance);
}

/// All results of either path: h, c, n, m, product, then the gradients.
using Results = std::vector<Tensor>;
const char* const kNames[] = {"h",  "c",  "n",      "m",      "product", "dq",
                              "dk", "dv", "digate", "dfgate", "dc0",     "dn0"};

Results generic(const MlstmArguments& a, const OptionalTensor& dh, const OptionalTensor& dc,
                const OptionalTensor& dn) {
  const Threads one(1);
  const auto [h, c, n, m, product] = xlstm::ops::mlstm_generic_forward(a);
  const auto [dq, dk, dv, digate, dfgate, dc0, dn0] =
      xlstm::ops::mlstm_generic_backward({dh, dc, dn, a, h, product});
  return {h, c, n, m, product, dq, dk, dv, digate, dfgate, dc0, dn0};
}

Results kernels(const MlstmArguments& a, const OptionalTensor& dh, const OptionalTensor& dc,
                const OptionalTensor& dn) {
  const Threads one(1);
  const auto [h, c, n, m, product] = xlstm::test::forward_operator(a);
  const auto [dq, dk, dv, digate, dfgate, dc0, dn0] =
      xlstm::test::backward_operator({dh, dc, dn, a, h, product});
  return {h, c, n, m, product, dq, dk, dv, digate, dfgate, dc0, dn0};
}

double size_of(const Tensor& x) { return x.to(at::kDouble).norm().item<double>(); }

/// Differences of all results in norm, relative to the expected one.
void check_same(const Results& got, const Results& expected, double tolerance) {
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO(kNames[i]);
    REQUIRE(got[i].sizes() == expected[i].sizes());
    REQUIRE(got[i].scalar_type() == expected[i].scalar_type());
    const Tensor wide = expected[i].to(at::kDouble);
    const double error = size_of(got[i].to(at::kDouble) - wide);
    CHECK(error <= tolerance * std::max(size_of(wide), 1e-6));
  }
}

MlstmArguments cast(MlstmArguments a, at::ScalarType type) {
  const at::ScalarType state = type == at::kDouble ? at::kDouble : at::kFloat;
  for (Tensor* x : {&a.q, &a.k, &a.v, &a.igate, &a.fgate}) *x = x->to(type);
  for (OptionalTensor* x : {&a.c0, &a.n0, &a.m0})
    if (*x) *x = (*x)->to(state);
  return a;
}

/// One row of documents of these lengths.
struct Packed {
  explicit Packed(const std::vector<int32_t>& starts, bool states = true)
      : p({.batch = 1,
           .time = starts.back(),
           .heads = 2,
           .dqk = 12,
           .dv = 20,
           .states = false,
           .resets = true}),
        a(arguments(p)) {
    const auto options = p.q.options();
    const int64_t count = static_cast<int64_t>(starts.size()) - 1;
    a.cu_seqlens = at::tensor(starts, at::kInt);
    dc = at::randn({count, 2, 12, 20}, options);
    dn = at::randn({count, 2, 12}, options);
    if (!states) return;
    a.c0 = at::randn({count, 2, 12, 20}, options);
    a.n0 = at::randn({count, 2, 12}, options);
    a.m0 = at::randn({count, 2}, options);
  }
  Problem p;
  MlstmArguments a;
  Tensor dc, dn;
};

}  // namespace

TEST_CASE("generic mLSTM equals the recurrence, gradients included") {
  for (const int64_t time : {0, 1, 17, 63, 64, 65, 127, 200}) {
    for (const bool states : {false, true}) {
      for (const bool resets : {false, true}) {
        check_case({.time = time, .dqk = 16, .dv = 16, .states = states, .resets = resets});
        check_case({.batch = 1,
                    .time = time,
                    .heads = 2,
                    .dqk = 24,
                    .dv = 40,
                    .states = states,
                    .resets = resets,
                    .chunk = 32});
      }
    }
  }
}

TEST_CASE("generic mLSTM with larger heads") {
  for (const int64_t time : {1, 17, 63, 64, 65, 127, 200})
    check_case({.batch = 1,
                .time = time,
                .heads = 1,
                .dqk = 64,
                .dv = 128,
                .resets = time % 2 == 0,
                .sigmoid = time % 3 == 0});
  for (const int64_t time : {1, 17, 65})
    check_case({.batch = 1, .time = time, .heads = 1, .dqk = 384, .dv = 384, .resets = false});
}

TEST_CASE("generic mLSTM with the sigmoid input gate, with and without the normaliser") {
  for (const bool sigmoid : {false, true})
    for (const bool normalize : {false, true})
      for (const int64_t chunk : {0, 5, 64})
        check_case({.time = 70, .sigmoid = sigmoid, .normalize = normalize, .chunk = chunk});
}

TEST_CASE("generic mLSTM with odd sizes") {
  check_case({.batch = 0});
  check_case({.heads = 0});
  check_case({.dv = 0});
  check_case({.dqk = 1, .dv = 1});
  check_case({.dqk = 9, .dv = 1, .chunk = 1});
}

TEST_CASE("generic mLSTM with extreme gates") {
  for (const double size : {30.0, 1e3, 1e4})
    for (const bool resets : {false, true})
      check_case({.time = 64, .resets = resets, .chunk = 16, .gate_size = size, .eps = 0}, 1e-9);
  Problem p({.time = 80, .resets = false, .chunk = 16, .gate_size = 1e4});
  p.fgate.select(1, 20).fill_(-std::numeric_limits<double>::infinity());
  p.igate.select(1, 21).fill_(-std::numeric_limits<double>::infinity());
  const MlstmArguments low = cast(arguments(p), at::kFloat);
  const auto h = [](const MlstmArguments& a) {
    return std::get<0>(xlstm::ops::mlstm_generic_forward(a));
  };
  check_close("h", h(low), numbers(h(cast(low, at::kDouble))), 1e-5);
}

TEST_CASE("generic mLSTM equals the CPU kernels in every dtype") {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const double tolerance = type == at::kDouble ? 1e-11 : type == at::kFloat ? 2e-5 : 8e-3;
    for (const int64_t time : {1, 64, 200}) {
      for (const bool states : {false, true}) {
        INFO("type " << c10::toString(type) << " T " << time << " states " << states);
        const Problem p({.batch = 2,
                         .time = time,
                         .heads = 2,
                         .dqk = 24,
                         .dv = 40,
                         .states = states,
                         .resets = states});
        const MlstmArguments a = cast(arguments(p), type);
        const at::ScalarType state = type == at::kDouble ? at::kDouble : at::kFloat;
        const Tensor dh = p.dh.to(type), dc = p.dc.to(state), dn = p.dn.to(state);
        check_same(generic(a, dh, dc, dn), kernels(a, dh, dc, dn), tolerance);
        check_same(generic(a, dh, {}, dn), kernels(a, dh, {}, dn), tolerance);
        check_same(generic(a, {}, dc, {}), kernels(a, {}, dc, {}), tolerance);
      }
    }
  }
  const Problem large({.batch = 1, .time = 200, .heads = 1, .dqk = 384, .dv = 384});
  const MlstmArguments a = arguments(large);
  check_same(generic(a, large.dh, large.dc, large.dn), kernels(a, large.dh, large.dc, large.dn),
             1e-11);
}

TEST_CASE("generic mLSTM with packed documents equals the CPU kernels") {
  for (const std::vector<int32_t>& starts :
       {std::vector<int32_t>{0, 0, 7, 8, 100, 100, 150}, {0, 150}, {0, 75, 76, 77, 150}, {0, 0}}) {
    for (const bool states : {false, true}) {
      for (const int64_t chunk : {0, 16}) {
        Packed packed(starts, states);
        packed.a.chunk_size = chunk;
        if (starts.size() == 2) packed.a.reset = {};
        check_same(generic(packed.a, packed.p.dh, packed.dc, packed.dn),
                   kernels(packed.a, packed.p.dh, packed.dc, packed.dn), 1e-11);
      }
    }
  }
  Packed wrong({0, 7, 20});
  wrong.a.cu_seqlens = at::tensor({0, 21, 20}, at::kInt);
  CHECK_THROWS_AS(xlstm::ops::mlstm_generic_forward(wrong.a), c10::Error);
}

TEST_CASE("generic mLSTM: a document changes no bit of another") {
  Packed packed({0, 30, 61, 90}, false);
  packed.a.reset = {};
  const auto bits = [](const Tensor& x, const Tensor& y) {
    return ((x == y) | (x.isnan() & y.isnan())).all().item<bool>();
  };
  const Results before = generic(packed.a, packed.p.dh, {}, {});
  for (Tensor* x : {&packed.a.q, &packed.a.k, &packed.a.v, &packed.a.igate, &packed.a.fgate})
    x->select(1, 40).fill_(std::numeric_limits<double>::quiet_NaN());
  const Results after = generic(packed.a, packed.p.dh, {}, {});
  for (const size_t i : {0, 4, 5, 6, 7, 8, 9}) {
    INFO(kNames[i]);
    CHECK(bits(before[i].slice(1, 0, 30), after[i].slice(1, 0, 30)));
    CHECK(bits(before[i].slice(1, 61, 90), after[i].slice(1, 61, 90)));
    CHECK_FALSE(bits(before[i].slice(1, 30, 61), after[i].slice(1, 30, 61)));
  }
}

TEST_CASE("generic mLSTM takes any strides, also stride 0 in dh") {
  const Problem p({.time = 70, .dqk = 8, .dv = 8});
  const MlstmArguments plain = arguments(p);
  MlstmArguments strided = plain;
  const auto spread = [](const Tensor& x) {
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() *= 2;
    return at::empty(sizes, x.options()).fill_(NAN).slice(-1, 0, sizes.back(), 2).copy_(x);
  };
  for (Tensor* x : {&strided.q, &strided.igate})
    *x = x->transpose(1, 2).contiguous().transpose(1, 2);
  for (Tensor* x : {&strided.k, &strided.v, &strided.fgate}) *x = spread(*x);
  strided.c0 = spread(*strided.c0);
  const Tensor dh = at::ones({1}, p.dh.options()).expand(p.dh.sizes());
  check_same(generic(strided, dh, spread(p.dc), p.dn), kernels(plain, dh, p.dc, p.dn), 1e-11);
}

TEST_CASE("generic mLSTM computes many chunks in slabs") {
  // Temporaries of 240 chunks of one head of (384, 384) take more than one slab.
  const Problem p({.batch = 1, .time = 240, .heads = 1, .dqk = 384, .dv = 384, .chunk = 1});
  const MlstmArguments a = arguments(p);
  check_same(generic(a, p.dh, p.dc, p.dn), kernels(a, p.dh, p.dc, p.dn), 1e-10);
}

TEST_CASE("generic mLSTM step equals the CPU kernel") {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const bool sigmoid : {false, true}) {
      const Problem p({.batch = 3,
                       .time = 1,
                       .heads = 2,
                       .dqk = 24,
                       .dv = 40,
                       .sigmoid = sigmoid,
                       .normalize = !sigmoid,
                       .gate_size = 3});
      const MlstmArguments a = cast(arguments(p), type);
      const auto token = [](const Tensor& x) { return x.select(1, 0); };
      const Tensor q = token(a.q), k = token(a.k), v = token(a.v), i = token(a.igate),
                   f = token(a.fgate);
      Tensor c = a.c0->transpose(2, 3).contiguous().transpose(2, 3), n = a.n0->clone(),
             m = a.m0->clone();
      Tensor c1 = a.c0->clone(), n1 = a.n0->clone(), m1 = a.m0->clone();
      const Tensor h = xlstm::ops::mlstm_generic_step(
          {q, k, v, i, f, c, n, m, a.input_gate, a.normalize, a.scale, a.eps});
      xlstm::ops::MlstmOptions options = p.options();
      const Tensor h1 = xlstm::ops::mlstm_step(q, k, v, i, f, c1, n1, m1, options);
      const double tolerance = type == at::kDouble ? 1e-13 : 1e-5;
      check_close("c", c, numbers(c1), tolerance);
      check_close("n", n, numbers(n1), tolerance);
      check_close("m", m, numbers(m1), tolerance);
      CHECK(h.scalar_type() == type);
      check_close("h", h, numbers(h1), type == at::kBFloat16 ? 8e-3 : tolerance);
    }
  }
}

TEST_CASE("h without a query is zero and not 0 / 0, in chunks and in steps") {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const Problem p({.batch = 1, .time = 70, .heads = 2, .dqk = 4, .dv = 3, .states = false});
    MlstmArguments a = cast(arguments(p), type);
    a.q = at::zeros_like(a.q);
    a.igate = a.igate + 800;  // exp(-m) is zero even in float64
    a.eps = 0;
    const auto is_zero = [](const Tensor& h) { return size_of(h) == 0; };
    CHECK(is_zero(std::get<0>(xlstm::ops::mlstm_generic_forward(a))));
    CHECK(is_zero(std::get<0>(xlstm::test::forward_operator(a))));
    const auto token = [](const Tensor& x) { return x.select(1, 0); };
    const auto state = [&](at::IntArrayRef sizes) {
      return at::zeros(sizes, type == at::kDouble ? at::kDouble : at::kFloat);
    };
    for (const bool generic_step : {false, true}) {
      const Tensor q = token(a.q), k = token(a.k), v = token(a.v), i = token(a.igate),
                   f = token(a.fgate);
      Tensor c = state({1, 2, 4, 3}), n = state({1, 2, 4}), m = state({1, 2});
      xlstm::ops::MlstmOptions options;
      options.eps = 0;
      CHECK(is_zero(generic_step ? xlstm::ops::mlstm_generic_step(
                                       {q, k, v, i, f, c, n, m, "exp", true, a.scale, 0})
                                 : xlstm::ops::mlstm_step(q, k, v, i, f, c, n, m, options)));
    }
  }
}
