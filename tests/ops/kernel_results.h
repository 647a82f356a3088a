#pragma once
// What the kernels make of a call, beside what the generic path does.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/tensor.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/support/catch.h"

namespace xlstm::test {

using at::Tensor;

template <class Results>
std::vector<Tensor> list(const Results& results) {
  return std::apply([](const auto&... x) { return std::vector<Tensor>{x...}; }, results);
}

inline double difference(const Tensor& a, const Tensor& b) {
  const Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
  const double size = at::linalg_vector_norm(y).item<double>();
  return at::linalg_vector_norm(x - y).item<double>() / (size == 0 ? 1 : size);
}

inline void check_close(const std::vector<std::string>& names, const std::vector<Tensor>& kernels,
                        const std::vector<Tensor>& generic, const std::vector<double>& tolerances) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (!generic[i].defined()) continue;
    REQUIRE(kernels[i].sizes() == generic[i].sizes());
    REQUIRE(kernels[i].scalar_type() == generic[i].scalar_type());
    INFO(names[i] << ": relative difference " << difference(kernels[i], generic[i]));
    CHECK(difference(kernels[i], generic[i]) <= tolerances[i]);
  }
}

/// cu_seqlens that nothing looks at, and what they are to be taken for: a padded tail, a late first token, ends beyond T, one
/// whose 32 bits look right, one that falls.
inline std::vector<std::pair<Tensor, Tensor>> doubtful_offsets() {
  const Tensor plain = at::tensor({0, 32, 64}, at::kInt);
  return {{at::tensor({0, 32, 40}, at::kLong), plain},
          {at::tensor({5, 32, 64}, at::kInt), plain},
          {at::tensor({-7, 32, 6400}, at::kInt), plain},
          {at::tensor({int64_t{0}, int64_t{32}, (int64_t{1} << 32) + 40}, at::kLong), plain},
          {at::tensor({0, 48, 7, 64}, at::kInt), at::tensor({0, 48, 48, 64}, at::kInt)}};
}

/// The same bits, and none of memory that nobody wrote.
inline void check_same(const std::vector<Tensor>& got, const std::vector<Tensor>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i].defined()) CHECK(at::equal(got[i], wanted[i]));
}

}  // namespace xlstm::test
