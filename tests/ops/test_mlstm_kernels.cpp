// csrc/ops/mlstm_kernels.cpp, between the operators and the CUDA kernels: run on CPU tensors with mlstm_fake_kernels.cpp
// behind it, and compared with the generic path on the same tensors.
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <string>

#include "csrc/ops/mlstm_generic.h"
#include "csrc/ops/mlstm_kernels.h"
#include "tests/ops/kernel_results.h"
#include "tests/ops/mlstm_cases.h"
#include "tests/ops/mlstm_fake_kernels.h"

namespace {

using at::Tensor;
using xlstm::ops::check_mlstm_arguments;
using xlstm::ops::MlstmArguments;
using xlstm::ops::MlstmBackwardArguments;
using xlstm::ops::MlstmDevice;
using xlstm::ops::OptionalTensor;
using xlstm::test::arguments;
using xlstm::test::list;
using xlstm::test::Problem;

void check_equal(const Tensor& got, const Tensor& expected) {
  REQUIRE(got.scalar_type() == expected.scalar_type());
  REQUIRE(got.sizes() == expected.sizes());
  CHECK(at::equal(got, expected));
}

/// Inner stride 2 and NaN in between.
Tensor spread(const Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.push_back(2);
  const Tensor all = at::full(sizes, NAN, x.options());
  return all.select(-1, 0).copy_(x);
}

struct Types {
  at::ScalarType tensors = at::kFloat, igate = at::kFloat, fgate = at::kFloat;
};

MlstmArguments strided_arguments(const Problem& p, const Types& types) {
  MlstmArguments a = arguments(p);
  a.q = a.q.to(types.tensors).transpose(1, 2).contiguous().transpose(1, 2);
  a.k = spread(a.k.to(types.tensors));
  a.v = a.v.to(types.tensors);
  a.igate = spread(a.igate.to(types.igate));
  a.fgate = a.fgate.to(types.fgate).transpose(0, 2).contiguous().transpose(0, 2);
  for (OptionalTensor* x : {&a.c0, &a.n0, &a.m0})
    if (*x) *x = spread((*x)->to(at::kFloat));
  if (a.reset) a.reset = a.reset->t().contiguous().t();
  return a;
}

void check_both_directions(const MlstmArguments& a, const OptionalTensor& dh,
                           const OptionalTensor& dc, const OptionalTensor& dn) {
  const auto sizes = check_mlstm_arguments(a);
  const MlstmDevice device;
  const auto forward = xlstm::ops::mlstm_kernels_forward(a, sizes, device, true);
  const auto expected = xlstm::ops::mlstm_generic_forward(a);
  for (size_t i = 0; i < 5; ++i) check_equal(list(forward)[i], list(expected)[i]);
  CHECK_FALSE(std::get<4>(xlstm::ops::mlstm_kernels_forward(a, sizes, device, false)).defined());
  const MlstmBackwardArguments b{dh, dc, dn, a, std::get<0>(expected), std::get<4>(expected)};
  const auto gradients = xlstm::ops::mlstm_kernels_backward(b, sizes, device);
  const auto expected_gradients = xlstm::ops::mlstm_generic_backward(b);
  for (size_t i = 0; i < 7; ++i) check_equal(list(gradients)[i], list(expected_gradients)[i]);
}

}  // namespace

TEST_CASE("mlstm_kernels hands every view, state and option to the kernels") {
  const Types choices[] = {{at::kFloat, at::kFloat, at::kFloat},
                           {at::kBFloat16, at::kFloat, at::kBFloat16},
                           {at::kHalf, at::kHalf, at::kFloat}};
  // scale and eps are exact in float32, as the kernels get them: results are equal to the bit
  for (const Types& types : choices) {
    for (const bool states : {false, true}) {
      for (const bool sigmoid : {false, true}) {
        const Problem p({.batch = 3,
                         .time = 37,
                         .heads = 2,
                         .dqk = 4,
                         .dv = 7,
                         .states = states,
                         .resets = states,
                         .sigmoid = sigmoid,
                         .normalize = !sigmoid || states,
                         .chunk = 16,
                         .eps = 0x1p-10});
        const MlstmArguments a = strided_arguments(p, types);
        const Tensor dh = p.dh.to(types.tensors), dc = spread(p.dc.to(at::kFloat)),
                     dn = p.dn.to(at::kFloat);
        check_both_directions(a, dh, dc, dn);
        check_both_directions(a, at::ones({1}, dh.options()).expand(dh.sizes()), {}, dn);
        check_both_directions(a, {}, dc, {});
      }
    }
  }
}

TEST_CASE("mlstm_kernels with packed sequences, another scale, and float64 gates") {
  const Problem p({.batch = 1, .time = 50, .heads = 2, .dqk = 5, .dv = 7, .states = false});
  MlstmArguments a = strided_arguments(p, {});
  a.cu_seqlens = at::tensor({0, 9, 0, 9, 7, 9, 40, 9, 50, 9}, at::kLong).slice(0, 0, 10, 2);
  a.scale = 0.7;
  check_both_directions(a, p.dh.to(at::kFloat), {}, {});
  a.igate = a.igate.to(at::kDouble);  // exact in float32: the kernels read float32
  a.fgate = a.fgate.to(at::kDouble);
  const auto sizes = check_mlstm_arguments(a);
  const auto [h, c, n, m, product] = xlstm::ops::mlstm_kernels_forward(a, sizes, {}, true);
  const auto expected = xlstm::ops::mlstm_generic_forward(a);
  check_equal(h, std::get<0>(expected));
  const auto gradients = xlstm::ops::mlstm_kernels_backward({h, {}, {}, a, h, product}, sizes, {});
  CHECK(std::get<3>(gradients).scalar_type() == at::kDouble);
  CHECK(std::get<4>(gradients).scalar_type() == at::kDouble);
}

TEST_CASE("mlstm_kernels: the step is in place, also on states that are not contiguous") {
  for (const Types& types : {Types{}, Types{at::kBFloat16, at::kDouble, at::kBFloat16}}) {
    const Problem p({.batch = 3, .time = 4, .heads = 2, .dqk = 5, .dv = 7});
    const MlstmArguments a = strided_arguments(p, types);
    const auto token = [](const Tensor& x) { return x.select(1, 2); };
    const Tensor q = token(a.q), k = token(a.k), v = token(a.v), i = token(a.igate),
                 f = token(a.fgate);
    Tensor c = *a.c0, n = *a.n0, m = *a.m0;  // spread
    Tensor c1 = c.clone(), n1 = n.clone(), m1 = m.clone();
    const void* address = c.data_ptr();
    const xlstm::ops::MlstmStepArguments step{q, k, v, i, f, c, n, m, "exp", true, 0.7, 1e-6};
    const auto sizes = check_mlstm_step_arguments(step);
    const Tensor h = xlstm::ops::mlstm_kernels_step(step, sizes, {});
    const Tensor h1 =
        xlstm::ops::mlstm_generic_step({q, k, v, i, f, c1, n1, m1, "exp", true, 0.7, 1e-6});
    CHECK(c.data_ptr() == address);
    CHECK(at::allclose(h.to(at::kFloat), h1.to(at::kFloat), 1e-6, 1e-6));
    CHECK(at::allclose(c, c1, 1e-6, 1e-6));
    CHECK(at::allclose(n, n1, 1e-6, 1e-6));
    CHECK(at::allclose(m, m1, 1e-6, 1e-6));
  }
}

TEST_CASE("mlstm_kernels: the lazy step and the fold write states and rings of any strides") {
  for (const Types& types : {Types{}, Types{at::kBFloat16, at::kDouble, at::kBFloat16}}) {
    const Problem p({.batch = 3, .time = 4, .heads = 2, .dqk = 5, .dv = 7});
    const MlstmArguments a = strided_arguments(p, types);
    Tensor c = *a.c0, n = *a.n0, m = *a.m0;  // spread
    Tensor c1 = c.clone(), n1 = n.clone(), m1 = m.clone();
    auto ring1 = xlstm::ops::empty_mlstm_ring(a.k.select(1, 0), a.v.select(1, 0), 3);
    auto ring = ring1;
    for (Tensor* x : {&ring.keys, &ring.values, &ring.gates}) *x = spread(*x);
    ring.count = ring.count.t().contiguous().t();
    for (int64_t t = 0; t < 4; ++t) {
      const auto token = [t](const Tensor& x) { return x.select(1, t); };
      const Tensor q = token(a.q), k = token(a.k), v = token(a.v), i = token(a.igate),
                   f = token(a.fgate);
      const xlstm::ops::MlstmLazyArguments step{{q, k, v, i, f, c, n, m, "exp", true, 0.7, 1e-6},
                                                ring};
      const auto sizes = check_mlstm_lazy_arguments(step);
      const Tensor h = xlstm::ops::mlstm_kernels_step_lazy(step, sizes, {});
      const Tensor h1 = xlstm::ops::mlstm_generic_step_lazy(
          {{q, k, v, i, f, c1, n1, m1, "exp", true, 0.7, 1e-6}, ring1});
      CHECK(at::allclose(h.to(at::kFloat), h1.to(at::kFloat), 1e-6, 1e-6));
      CHECK(at::equal(ring.count, at::full({3, 2}, (t + 1) % 3, at::kInt)));
      CHECK(at::equal(ring.keys, ring1.keys));
      CHECK(at::equal(ring.values, ring1.values));
      CHECK(at::allclose(ring.gates, ring1.gates, 1e-6, 1e-6));
    }
    const xlstm::ops::MlstmFoldArguments fold{c, n, m, ring, "exp"};
    xlstm::ops::mlstm_kernels_fold(fold, check_mlstm_fold_arguments(fold), {});
    xlstm::ops::mlstm_generic_fold({c1, n1, m1, ring1, "exp"});
    CHECK(ring.count.sum().item<int64_t>() == 0);
    CHECK(at::allclose(c, c1, 1e-6, 1e-6));
    CHECK(at::allclose(n, n1, 1e-6, 1e-6));
    CHECK(at::allclose(m, m1, 1e-6, 1e-6));
  }
}

TEST_CASE("mlstm_kernels: what no kernel takes, and errors of launches") {
  const xlstm::cuda::DeviceLimits ampere{80, 108, 163 * 1024}, turing{75, 40, 64 * 1024};
  const xlstm::ops::MlstmSizes sizes{1, 8, 2, 4, 4, 1};
  CHECK(xlstm::ops::mlstm_kernels_lack(sizes, at::kBFloat16, ampere).empty());
  CHECK(xlstm::ops::mlstm_kernels_lack(sizes, at::kDouble, ampere) == "no kernels for float64");
  CHECK(xlstm::ops::mlstm_kernels_lack(sizes, at::kFloat, ampere, 16).empty());
  CHECK(xlstm::ops::mlstm_kernels_lack(sizes, at::kFloat, ampere, 17) ==
        "no kernels for rings of more than 16 tokens");
  CHECK(xlstm::ops::mlstm_kernels_lack(sizes, at::kFloat, turing).find("7.5") != std::string::npos);
  const Problem p({.batch = 1, .time = 8, .heads = 2, .dqk = 4, .dv = 4});
  const MlstmArguments a = strided_arguments(p, {});
  xlstm::test::fail_launch = true;
  std::string message;
  try {
    xlstm::ops::mlstm_kernels_forward(a, check_mlstm_arguments(a), {}, false);
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  }
  CHECK(message == "mlstm_chunkwise: planted failure");
  xlstm::test::fail_launch = false;
}
