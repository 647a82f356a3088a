#pragma once
// Checks an operator and its gradients against a plain function on long double values: outputs
// directly, gradients by central differences of that function.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "tests/support/catch.h"

namespace xlstm::test {

using Values = std::vector<long double>;

inline Values values(const at::Tensor& tensor) {
  const at::Tensor t = tensor.detach().to(at::kDouble).contiguous();
  return {t.const_data_ptr<double>(), t.const_data_ptr<double>() + t.numel()};
}

/// The largest difference, relative to the largest expected value (at least 1).
inline double error(const at::Tensor& got, const Values& expected) {
  const Values actual = values(got);
  REQUIRE(actual.size() == expected.size());
  long double scale = 1, difference = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!std::isfinite(actual[i])) return INFINITY;
    scale = std::max(scale, std::abs(expected[i]));
    difference = std::max(difference, std::abs(actual[i] - expected[i]));
  }
  return static_cast<double>(difference / scale);
}

/// The operator on float64 tensors; several outputs flattened and joined.
using Operator = std::function<at::Tensor(const std::vector<at::Tensor>&)>;
/// The same by plain loops.
using Reference = std::function<Values(const std::vector<Values>&)>;

inline void check(const Operator& op, const Reference& reference, std::vector<at::Tensor> inputs) {
  std::vector<Values> plain;
  for (at::Tensor& input : inputs) {
    input.requires_grad_();
    plain.push_back(values(input));
  }
  const at::Tensor out = op(inputs);
  CHECK(error(out, reference(plain)) < 1e-13);
  const at::Tensor weights = at::randn(out.sizes(), out.options());
  const Values weight = values(weights);
  const std::vector<at::Tensor> grads = torch::autograd::grad({(out * weights).sum()}, inputs, {},
                                                              false, false, /*allow_unused=*/true);
  const auto loss = [&] {
    const Values result = reference(plain);
    long double sum = 0;
    for (size_t i = 0; i < result.size(); ++i) sum += weight[i] * result[i];
    return sum;
  };
  constexpr long double kStep = 1e-6L;
  for (size_t k = 0; k < plain.size(); ++k) {
    Values expected;
    for (long double& value : plain[k]) {
      const long double kept = value;
      value = kept + kStep;
      const long double above = loss();
      value = kept - kStep;
      expected.push_back((above - loss()) / (2 * kStep));
      value = kept;
    }
    CAPTURE(k);
    CHECK(error(grads[k], expected) < 1e-9);
  }
}

}  // namespace xlstm::test
