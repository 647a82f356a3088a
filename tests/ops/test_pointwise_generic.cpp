// The ATen paths of causal_conv1d, headwise_norm, residual_norm and gated_scan, which CUDA tensors take without kernels, on
// the CPU: equal to the CPU operators, which test_causal_conv1d.cpp, test_norm.cpp and test_gated_ops.py compare with plain loops.
#include <ATen/ops/allclose.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "csrc/ops/causal_conv1d.h"
#include "csrc/ops/causal_conv1d_generic.h"
#include "csrc/ops/gated_scan.h"
#include "csrc/ops/norm.h"
#include "csrc/ops/norm_generic.h"
#include "tests/ops/differences.h"

namespace {

using xlstm::ops::OptionalTensor;

at::Tensor random(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::kDouble).to(dtype);
}

void check_equal(const at::Tensor& got, const at::Tensor& wanted, double tolerance) {
  REQUIRE(got.sizes() == wanted.sizes());
  CHECK(got.scalar_type() == wanted.scalar_type());
  CHECK(at::allclose(got, wanted, tolerance, tolerance));
}

/// Gradients of the CPU operator's outputs weighted by `weights`, of the defined leaves.
std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& outputs,
                                  const std::vector<at::Tensor>& leaves,
                                  const std::vector<at::Tensor>& weights) {
  return torch::autograd::grad(outputs, leaves, weights, false, false, /*allow_unused=*/true);
}

struct ConvCase {
  int64_t batch = 2, time = 9, width = 4;
  bool silu = true, bias = true, states = true;
  std::vector<int64_t> resets = {}, packed = {};
  at::ScalarType dtype = at::kDouble;
};

void check_conv(const ConvCase& c) {
  CAPTURE(c.batch, c.time, c.width, c.silu, c.bias, c.states, c.resets.size(), c.packed.size());
  const int64_t count = c.packed.empty() ? c.batch : static_cast<int64_t>(c.packed.size()) - 1;
  const at::Tensor x = random({c.batch, c.time, 5}, c.dtype),
                   weight = random({5, c.width}, c.dtype);
  const at::Tensor bias = random({5}, c.dtype), state0 = random({count, c.width - 1, 5}, c.dtype);
  xlstm::ops::CausalConv1dArguments a{x, weight, {}, {}, {}, {}, c.silu};
  std::vector<at::Tensor> leaves{x, weight};
  if (c.bias) a.bias = bias, leaves.push_back(bias);
  if (c.states) a.state0 = state0, leaves.push_back(state0);
  if (!c.resets.empty()) {
    a.reset = at::zeros({c.batch, c.time}, at::kBool);
    for (const int64_t t : c.resets) a.reset->view({-1})[t].fill_(true);
  }
  if (!c.packed.empty()) a.cu_seqlens = at::tensor(c.packed, at::kInt);
  const auto sizes = check_causal_conv1d(a);
  const double tolerance = c.dtype == at::kDouble ? 1e-12 : c.dtype == at::kFloat ? 1e-5 : 2e-2;
  const auto [y, state] = causal_conv1d_generic(a, sizes);
  const at::Tensor dy = random(x.sizes(), c.dtype), dstate = random(state.sizes(), c.dtype);
  const auto [dx, dweight, dbias, dstate0] = causal_conv1d_generic_backward(a, sizes, dy, dstate);
  for (at::Tensor& leaf : leaves) leaf.requires_grad_();
  const auto [wanted_y, wanted_state] =
      xlstm::ops::causal_conv1d(x, weight, a.bias, a.state0, a.reset, a.cu_seqlens, c.silu);
  check_equal(y, wanted_y.detach(), tolerance);
  check_equal(state, wanted_state.detach(), 0);
  const auto wanted = gradients({wanted_y, wanted_state}, leaves, {dy, dstate});
  std::vector<at::Tensor> got{dx, dweight};
  if (c.bias) got.push_back(dbias);
  if (c.states) got.push_back(dstate0);
  for (size_t i = 0; i < got.size(); ++i) {
    CAPTURE(i);
    check_equal(got[i], wanted[i], 10 * tolerance);
  }
}

}  // namespace

TEST_CASE("causal_conv1d in ATen calls equals the CPU operator", "[pointwise_generic]") {
  for (int64_t width = 2; width <= 8; ++width)
    for (const int64_t time : {0, 1, 3, 9})
      check_conv({2, time, width, width % 2 == 0, time != 3, time != 1 || width != 4});
  for (const bool states : {false, true}) {
    check_conv({2, 9, 4, true, true, states, {0, 4, 5, 9 + 2, 9 + 8}});
    check_conv({1, 2, 4, true, true, states, {1}});
    check_conv({1, 9, 4, true, true, states, {}, {0, 0, 2, 3, 9, 9}});
    check_conv({1, 9, 3, false, true, states, {0, 4, 8}, {0, 0, 3, 3, 9}});
    check_conv({1, 0, 3, false, true, states, {}, {0, 0}});
  }
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf})
    check_conv({2, 9, 4, true, true, true, {3}, {}, dtype});
}

TEST_CASE("causal_conv1d in ATen calls: absent gradients, NaN that is not seen",
          "[pointwise_generic]") {
  const at::Tensor x = random({1, 9, 5}), weight = random({5, 4}), dstate = random({2, 3, 5});
  const at::Tensor state0 = random({2, 3, 5});
  const xlstm::ops::CausalConv1dArguments a{
      x, weight, {}, state0, {}, at::tensor({0, 4, 9}, at::kInt), true};
  const auto sizes = check_causal_conv1d(a);
  const auto [dx, dweight, dbias, dstate0] =
      causal_conv1d_generic_backward(a, sizes, std::nullopt, dstate);
  CHECK(at::allclose(dx.slice(1, 1, 4).squeeze(0), dstate[0]));
  CHECK(at::allclose(dx.slice(1, 6, 9).squeeze(0), dstate[1]));
  CHECK(dx.slice(1, 0, 1).eq(0).all().item<bool>());
  CHECK(dweight.eq(0).all().item<bool>());
  CHECK(dstate0.eq(0).all().item<bool>());
  const at::Tensor before = std::get<0>(causal_conv1d_generic(a, sizes)).slice(1, 4).clone();
  x.slice(1, 0, 4).fill_(NAN);
  CHECK(at::allclose(std::get<0>(causal_conv1d_generic(a, sizes)).slice(1, 4), before, 0, 0));
}

TEST_CASE("causal_conv1d_step in ATen calls equals the CPU operator", "[pointwise_generic]") {
  const at::Tensor x = random({3, 6, 5}), weight = random({5, 4}), bias = random({5});
  at::Tensor state = random({3, 3, 5}), other = state.clone();
  for (int64_t t = 0; t < 6; ++t) {
    const at::Tensor now = x.select(1, t);
    check_equal(xlstm::ops::causal_conv1d_generic_step(now, weight, bias, state, t % 2 == 0),
                xlstm::ops::causal_conv1d_step(now, weight, bias, other, t % 2 == 0), 1e-12);
    check_equal(state, other, 0);
  }
}

TEST_CASE("gated_scan in elementwise passes equals the CPU operator", "[pointwise_generic]") {
  for (const int64_t time : {0, 1, 2, 7, 64, 65}) {
    for (const bool documents : {false, true}) {
      const at::Tensor x = random({2, time, 5});
      at::Tensor a = random({2, time, 5}).sigmoid(), reset;
      if (documents) {
        reset = at::rand({2, time}) < 0.2;
        a.masked_fill_(reset.unsqueeze(-1), std::numeric_limits<double>::quiet_NaN());
      }
      CAPTURE(time, documents);
      const OptionalTensor given = documents ? OptionalTensor(reset) : std::nullopt;
      check_equal(xlstm::ops::scan_in_passes(x, a, reset, false),
                  std::get<0>(xlstm::ops::gated_scan(x, a, {}, given)), 1e-12);
      at::Tensor wanted = x.clone();  // the other way round
      if (documents) a = a.nan_to_num(0.0);
      for (int64_t t = time - 2; t >= 0; --t)
        wanted.select(1, t).add_(a.select(1, t + 1) * wanted.select(1, t + 1));
      check_equal(xlstm::ops::scan_in_passes(x, a, reset, true), wanted, 1e-12);
    }
  }
}

TEST_CASE("headwise_norm in ATen calls equals the CPU operator", "[pointwise_generic]") {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const double tolerance = dtype == at::kDouble ? 1e-11 : dtype == at::kFloat ? 1e-4 : 5e-2;
    for (int present = 0; present < 16; ++present) {
      for (const char* kind : {"layer", "rms"}) {
        const char* activation = present % 3 == 0 ? "sigmoid" : "silu";
        CAPTURE(present, kind, activation);
        const at::Tensor x = random({2, 3, 2, 7}, dtype), dy = random({2, 3, 14}, dtype);
        OptionalTensor weight, bias, skip, skip_weight, gate;
        std::vector<at::Tensor> leaves{x};
        const auto make = [&](OptionalTensor& to, at::IntArrayRef sizes) {
          to = random(sizes, dtype);
          leaves.push_back(*to);
        };
        if (present & 1) make(weight, {14});
        if (present & 2) make(bias, {14});
        if (present & 4) make(skip, {2, 3, 14}), make(skip_weight, {14});
        if (present & 8) make(gate, {2, 3, 14});
        const xlstm::ops::HeadwiseNormArguments a{x,    weight, bias, skip,      skip_weight,
                                                  gate, 1e-3,   kind, activation};
        const at::Tensor y = headwise_norm_generic(a);
        const auto [dx, dweight, dbias, dskip, dskip_weight, dgate] =
            headwise_norm_generic_backward(dy, a);
        for (at::Tensor& leaf : leaves) leaf.requires_grad_();
        const at::Tensor wanted = xlstm::ops::headwise_norm(x, weight, bias, skip, skip_weight,
                                                            gate, 1e-3, kind, activation);
        check_equal(y, wanted.detach(), tolerance);
        std::vector<at::Tensor> got;
        got.reserve(6);  // GCC 12 takes growing for an access out of bounds
        got.push_back(dx);
        if (weight) got.push_back(dweight);
        if (bias) got.push_back(dbias);
        if (skip) got.push_back(dskip), got.push_back(dskip_weight);
        if (gate) got.push_back(dgate);
        const auto exact = gradients({wanted}, leaves, {dy});
        for (size_t i = 0; i < got.size(); ++i) {
          CAPTURE(i);
          check_equal(got[i], exact[i], tolerance);
        }
      }
    }
  }
}

TEST_CASE("residual_norm in ATen calls equals the CPU operator", "[pointwise_generic]") {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const double tolerance = dtype == at::kDouble ? 1e-11 : dtype == at::kFloat ? 1e-4 : 5e-2;
    for (const bool parameters : {false, true}) {
      for (const char* kind : {"layer", "rms"}) {
        CAPTURE(parameters, kind);
        std::vector<at::Tensor> leaves{random({2, 3, 14}, dtype), random({2, 3, 14}, dtype)};
        OptionalTensor weight, bias;
        if (parameters) {
          weight = random({14}, dtype), bias = random({14}, dtype);
          leaves.push_back(*weight), leaves.push_back(*bias);
        }
        const at::Tensor dsum = random({2, 3, 14}, dtype), dy = random({2, 3, 14}, dtype);
        const auto [sum, y] =
            xlstm::ops::residual_norm_generic(leaves[0], leaves[1], weight, bias, 1e-3, kind);
        const xlstm::ops::SumNorm norm(sum, weight, bias, 1e-3, kind);
        const auto [dx, dweight, dbias] =
            xlstm::ops::residual_norm_generic_backward(dsum, dy, sum, norm.arguments());
        for (at::Tensor& leaf : leaves) leaf.requires_grad_();
        const auto [wanted_sum, wanted] =
            xlstm::ops::residual_norm(leaves[0], leaves[1], weight, bias, 1e-3, kind);
        check_equal(sum, wanted_sum.detach(), tolerance);
        check_equal(y, wanted.detach(), tolerance);
        const auto exact = gradients({wanted_sum, wanted}, leaves, {dsum, dy});
        check_equal(dx, exact[0], tolerance);
        check_equal(dx, exact[1], tolerance);
        if (!parameters) continue;
        check_equal(dweight, exact[2], tolerance);
        check_equal(dbias, exact[3], tolerance);
      }
    }
  }
}
