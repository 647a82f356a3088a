// The convolution by FFT against its sum, and how the state space models start.
#include "csrc/nn/long_convolution.h"

#include "csrc/nn/ssm.h"
#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

/// y_t = sum_s [s and t in one document, s <= t, t - s < K] kernel_{t-s} u_s.
at::Tensor direct(const at::Tensor& u, const at::Tensor& kernel, const at::Tensor& reset) {
  const at::Tensor document = reset.cumsum(1);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < u.size(2); ++t) {
    at::Tensor y = at::zeros_like(u.select(2, 0));
    for (int64_t s = std::max<int64_t>(0, t - kernel.size(1) + 1); s <= t; ++s) {
      const at::Tensor same = (document.select(1, s) == document.select(1, t)).unsqueeze(-1);
      y = y + same * kernel.select(1, t - s) * u.select(2, s);
    }
    rows.push_back(y);
  }
  return at::stack(rows, 2);
}

TEST_CASE("a long convolution is its sum, with documents and without, gradients included") {
  torch::manual_seed(21);
  for (const int64_t length : {1, 2, 7, 33}) {
    for (const int64_t taps : {1, 5, 33, 50}) {
      for (const double density : {0.0, 0.1, 0.5, 1.0}) {
        INFO("length " << length << ", taps " << taps << ", documents " << density);
        const auto options = at::TensorOptions().dtype(at::kDouble);
        const at::Tensor u = at::randn({3, 4, length}, options).set_requires_grad(true);
        const at::Tensor kernel = at::randn({4, taps}, options).set_requires_grad(true);
        const at::Tensor reset = at::rand({3, length}) < density;
        const at::Tensor expected = direct(u, kernel, reset);
        const at::Tensor weight = at::randn_like(expected);
        const auto gradients = [&](const at::Tensor& y) {
          return torch::autograd::grad({(y * weight).sum()}, {u, kernel});
        };
        const auto wanted = gradients(expected);
        const auto check = [&](const std::optional<at::Tensor>& way) {
          const at::Tensor y = long_convolution(u, kernel, way);
          CHECK(difference(y, expected) < 1e-12);
          const auto got = gradients(y);
          for (size_t i = 0; i < 2; ++i) CHECK(difference(got[i], wanted[i]) < 1e-12);
        };
        check(reset);
        if (density == 0) check(std::nullopt);
      }
    }
  }
}

TEST_CASE("documents: where the last one starts, and what lies before it") {
  const at::Tensor reset =
      at::tensor({0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0}, at::kByte).view({3, 4}) > 0;
  const at::Tensor first = last_start(reset);
  CHECK(at::equal(first, at::tensor({0, 2, 0}, at::kLong)));
  const at::Tensor x = at::ones({3, 4, 2});
  CHECK(at::equal(without_past(x, first).sum({0, 2}), at::tensor({4.f, 4.f, 6.f, 6.f})));
  CHECK(long_convolution(at::ones({2, 3, 0}), at::ones({3, 1}), at::ones({2, 0}, at::kBool))
            .sizes() == at::IntArrayRef({2, 3, 0}));
}

TEST_CASE("the diagonal SSM starts as S4D-Lin") {
  torch::manual_seed(22);
  const DiagonalSsm ssm(200, 8, at::kCPU);
  const auto parameter = [&](const char* name) { return ssm.named_parameters()[name]; };
  const at::Tensor step = parameter("log_step").exp();
  CHECK(step.min().item<double>() >= 0.999e-3);
  CHECK(step.max().item<double>() <= 0.1001);
  CHECK(step.log().mean().item<double>() == Approx(std::log(1e-2)).margin(0.5));
  CHECK(at::allclose(parameter("log_decay").exp(), at::full({200, 4}, 0.5)));
  CHECK(at::allclose(parameter("frequency")[7], at::arange(4) * 3.14159265f));
  CHECK(contains(message_of([] { DiagonalSsm(2, 7, at::kCPU); }), "state_size: expected an even"));
}

}  // namespace
}  // namespace xlstm::nn::test
