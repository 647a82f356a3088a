// Matrices of 8 bits: what is kept of a matrix, the CPU's kernels against plain sums in long double, the ATen calls of other
// devices against them.
#include "csrc/ops/linear_int8.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <limits>

#include "tests/support/catch.h"

namespace {

using at::Tensor;
using xlstm::ops::dequantize_int8;
using xlstm::ops::linear_int8;
using xlstm::ops::quantize_int8;

double largest_difference(const Tensor& a, const Tensor& b) {
  return a.numel() == 0 ? 0 : (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

/// The operator's kernel for devices that have none of their own, on CPU tensors.
template <class F, class... Arguments>
auto elsewhere(const char* name, const Arguments&... arguments) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>().redispatch(
      c10::DispatchKeySet(c10::DispatchKey::CUDA), arguments...);
}

}  // namespace

TEST_CASE("int8: each row to half a step, and its scale and columns behind it", "[int8]") {
  at::manual_seed(1);
  for (const auto& [out, in] : {std::pair(1, 1), {3, 15}, {5, 16}, {2, 17}, {70, 300}}) {
    const Tensor weight = at::randn({out, in}) * at::logspace(-30, 30, out).unsqueeze(1);
    const Tensor kept = quantize_int8(weight);
    CAPTURE(out, in);
    REQUIRE(kept.sizes() == at::IntArrayRef({out, xlstm::ops::int8_row_bytes(in)}));
    const Tensor step = weight.abs().amax(1, true) / 127;
    CHECK(at::equal(kept.view(at::kFloat).select(1, kept.size(1) / 4 - 4), step.squeeze(1)));
    CHECK((kept.view(at::kInt).select(1, kept.size(1) / 4 - 3) == in).all().item<bool>());
    CHECK(at::equal(kept.narrow(1, 0, in).abs().amax(1).to(at::kFloat), at::full({out}, 127.0f)));
    CHECK((kept.narrow(1, in, kept.size(1) - 16 - in) == 0).all().item<bool>());
    const Tensor back = dequantize_int8(kept, in, at::kDouble);
    CHECK(((back - weight).abs() <= step.to(at::kDouble) * (0.5 + 1e-6)).all().item<bool>());
    for (const at::ScalarType type : {at::kDouble, at::kBFloat16, at::kHalf}) {
      const Tensor rounded = (at::randn({out, in})).to(type);
      CHECK(at::equal(quantize_int8(rounded), quantize_int8(rounded.to(at::kFloat))));
      CHECK(at::equal(dequantize_int8(quantize_int8(rounded), in, type),
                      dequantize_int8(quantize_int8(rounded), in, at::kDouble).to(type)));
    }
  }
}

TEST_CASE("int8: rows of zeros, of the smallest numbers, and of none that can be kept", "[int8]") {
  Tensor weight = at::zeros({3, 20});
  weight[1] = std::numeric_limits<float>::denorm_min();
  weight[2][3] = 3e38;
  const Tensor back = dequantize_int8(quantize_int8(weight), 20);
  CHECK(back.isfinite().all().item<bool>());
  CHECK(back.narrow(0, 0, 2).abs().sum().item<float>() == 0);
  CHECK(back[2][3].item<float>() > 2.9e38f);
  for (const double bad : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    weight[1][19] = bad;
    CHECK_THROWS_AS(quantize_int8(weight), c10::Error);
  }
  CHECK(quantize_int8(at::zeros({0, 5})).sizes() == at::IntArrayRef({0, 32}));
  CHECK(dequantize_int8(quantize_int8(at::zeros({4, 0})), 0).sizes() == at::IntArrayRef({4, 0}));
}

TEST_CASE("int8: products equal sums in float64", "[int8]") {
  at::manual_seed(2);
  for (const auto& [out, in] : {std::pair(1, 1), {7, 5}, {8, 16}, {9, 33}, {37, 1000}}) {
    const Tensor kept = quantize_int8(at::randn({out, in})), bias = at::randn({out});
    const Tensor exact = dequantize_int8(kept, in, at::kDouble);
    for (const int64_t rows : {0, 1, 2, 3, 4, 7, 16, 17, 40})  // beyond 16 a product of matrices
      for (const auto& [type, allowed] : {std::pair(at::kDouble, 1e-13),
                                          {at::kFloat, 2e-6},
                                          {at::kHalf, 1e-3},
                                          {at::kBFloat16, 8e-3}}) {
        CAPTURE(out, in, rows, type);
        const Tensor x = at::randn({rows, in}).to(type);
        for (const bool with_bias : {true, false}) {
          const auto added = with_bias ? std::optional(bias) : std::nullopt;
          const Tensor y = linear_int8(x, kept, added);
          REQUIRE(y.scalar_type() == type);
          REQUIRE(y.sizes() == at::IntArrayRef({rows, out}));
          Tensor expected = at::matmul(x.to(at::kDouble), exact.t());
          if (with_bias) expected = expected + bias;
          const double size =
              at::matmul(x.to(at::kDouble).abs(), exact.t().abs()).sum().item<double>() /
              std::max<int64_t>(1, rows * out);
          CHECK(largest_difference(y, expected) <= allowed * (size + 1));
        }
      }
  }
}

TEST_CASE("int8: few rows are computed as each by itself, strided ones as packed ones", "[int8]") {
  at::manual_seed(3);
  const Tensor kept = quantize_int8(at::randn({21, 50})), wide = at::randn({5, 3, 110});
  const Tensor x = wide.slice(2, 1, 101, 2), y = linear_int8(x, kept);
  CHECK(y.sizes() == at::IntArrayRef({5, 3, 21}));
  CHECK(at::equal(y, linear_int8(x.contiguous(), kept)));
  CHECK(at::equal(y[2][1], linear_int8(x[2][1], kept)));
  const Tensor columns = at::cat({kept, kept}, 1).narrow(1, kept.size(1), kept.size(1));
  CHECK(at::equal(y, linear_int8(x, columns)));
  Tensor bad = x.contiguous();
  bad[1][1][7] = std::nan("");
  const Tensor found = linear_int8(bad, kept);
  CHECK(found[1][1].isnan().all().item<bool>());
  CHECK(at::equal(found[1][0], y[1][0]));
}

TEST_CASE("int8: ATen's calls keep the same bits as the kernels", "[int8]") {
  at::manual_seed(4);
  const Tensor weight = at::randn({19, 77}), kept = quantize_int8(weight);
  CHECK(at::equal(elsewhere<Tensor(const Tensor&)>("xlstm::quantize_int8", weight), kept));
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    CHECK(at::equal(elsewhere<Tensor(const Tensor&, c10::SymInt, at::ScalarType)>(
                        "xlstm::dequantize_int8", kept, c10::SymInt(77), type),
                    dequantize_int8(kept, 77, type)));
}

TEST_CASE("int8: what does not fit is named", "[int8]") {
  const Tensor kept = quantize_int8(at::randn({4, 20})), x = at::randn({2, 20});
  CHECK_THROWS_AS(linear_int8(at::randn({2, 40}), kept), c10::Error);  // another number of bytes
  CHECK_THROWS_AS(linear_int8(at::randn({2, 21}), kept), c10::Error);  // the same
  CHECK_THROWS_AS(dequantize_int8(kept, 21), c10::Error);
  CHECK_THROWS_AS(linear_int8(x, at::randn({4, 48})), c10::Error);
  CHECK_THROWS_AS(linear_int8(x, kept, at::randn({5})), c10::Error);
  CHECK_THROWS_AS(linear_int8(at::ones({2, 20}, at::kLong), kept), c10::Error);
  CHECK_THROWS_AS(quantize_int8(at::randn({4})), c10::Error);
}
