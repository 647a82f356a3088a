// Linear maps with adapters beside a weight that is kept in fewer bits and too large to be converted as a whole.
#include "csrc/nn/linear.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/utils.h>

#include "tests/support/catch.h"
#include "tests/support/peak_memory.h"

namespace xlstm::nn {
namespace {

constexpr int64_t kIn = 1024, kOut = 4100;  // four blocks of rows and a part of one
#if defined(__aarch64__)
constexpr int64_t kPacked = 4 << 20;  // torch's product packs its block of the weight there
#else
constexpr int64_t kPacked = 0;
#endif

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

Linear adapted_linear(bool with_bias, at::ScalarType kept) {
  Linear linear(kIn, kOut, with_bias, at::kCPU);
  const at::NoGradGuard no_grad;
  for (at::Tensor& parameter : linear.parameters()) {
    parameter.normal_(0, 0.1);
    parameter.set_requires_grad(false);
  }
  linear.adapt(2, 4);
  linear.lora_b.normal_(0, 0.1);
  linear.keep_in(kept);
  return linear;
}

}  // namespace

TEST_CASE("a kept weight is converted block by block: values, gradients, memory") {
  at::manual_seed(1);
  for (const at::ScalarType kept : {at::kBFloat16, at::kHalf, at::kChar})
    for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16})
      for (const bool with_bias : {false, true}) {
        CAPTURE(kept, type, with_bias);
        const Linear linear = adapted_linear(with_bias, kept);
        const at::Tensor x = at::randn({3, 7, kIn}).to(type).requires_grad_(),
                         dy = at::randn({3, 7, kOut}).to(type);
        const double allowed = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-5 : 5e-2;
        const at::Tensor whole =
            linear.weight_as(at::kDouble) +
            at::matmul(linear.lora_b.to(at::kDouble), linear.lora_a.to(at::kDouble)) * 2;
        at::Tensor expected = at::matmul(x.detach().to(at::kDouble), whole.t());
        if (with_bias) expected = expected + linear.bias;

        at::Tensor y;
        const int64_t bytes = testing::peak_bytes([&] { (y = linear.forward(x)).backward(dy); });
        CHECK(y.sizes() == expected.sizes());
        CHECK(largest_difference(y, expected) <= allowed * expected.abs().max().item<double>());
        const at::Tensor dx = at::matmul(dy.to(at::kDouble), whole);
        CHECK(largest_difference(x.grad(), dx) <= allowed * dx.abs().max().item<double>());
        if (type == at::kFloat) CHECK(bytes < 4 * kIn * kOut / 2 + kPacked);
        {
          const at::NoGradGuard no_grad;
          CHECK(at::equal(linear.forward(x), y));
        }
      }
}

}  // namespace xlstm::nn
