// block_linear against plain loops: each way to compute it (rotated, padded, GEMM), odd sizes,
// strided rows.
#include "csrc/ops/block_linear.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "tests/ops/differences.h"

namespace {

using xlstm::test::Values;

struct Case {
  int64_t rows, blocks, out, in;
  bool bias;
};

Values reference(const Case& c, const std::vector<Values>& in) {
  Values y;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t b = 0; b < c.blocks; ++b)
      for (int64_t o = 0; o < c.out; ++o) {
        long double sum = c.bias ? in[2][b * c.out + o] : 0;
        for (int64_t i = 0; i < c.in; ++i)
          sum += in[1][(b * c.out + o) * c.in + i] * in[0][(r * c.blocks + b) * c.in + i];
        y.push_back(sum);
      }
  return y;
}

void check_case(const Case& c) {
  std::vector<at::Tensor> inputs{at::randn({c.rows, c.blocks * c.in}, at::kDouble),
                                 at::randn({c.blocks, c.out, c.in}, at::kDouble)};
  if (c.bias) inputs.push_back(at::randn({c.blocks * c.out}, at::kDouble));
  CAPTURE(c.rows, c.blocks, c.out, c.in);
  const auto plain = [&](const std::vector<Values>& in) { return reference(c, in); };
  const auto bias = [&](const auto& in) {
    return c.bias ? std::optional<at::Tensor>(in[2]) : std::nullopt;
  };
  xlstm::test::check(
      [&](const auto& in) { return xlstm::ops::block_linear(in[0], in[1], bias(in)); }, plain,
      inputs);
  xlstm::test::check(  // rows of a wider tensor
      [&](const auto& in) {
        const at::Tensor wide = at::cat({in[0] * 7, in[0]}, 1);
        return xlstm::ops::block_linear(wide.narrow(1, c.blocks * c.in, c.blocks * c.in), in[1],
                                        bias(in));
      },
      plain, inputs);
}

}  // namespace

TEST_CASE("block_linear: square blocks of 2, 4, 8, 16", "[block_linear]") {
  for (const int64_t size : {2, 4, 8, 16}) {
    check_case({5, 3, size, size, true});
    check_case({1, 1, size, size, false});
  }
  check_case({9, 9, 4, 4, true});
  check_case({70, 1, 2, 2, true});
}

TEST_CASE("block_linear: other small blocks", "[block_linear]") {
  check_case({3, 2, 3, 5, true});
  check_case({4, 5, 1, 1, true});
  check_case({2, 2, 13, 1, false});
  check_case({2, 1, 9, 16, true});
}

TEST_CASE("block_linear: large blocks", "[block_linear]") {
  check_case({3, 2, 17, 3, true});
  check_case({5, 1, 18, 20, false});
  check_case({0, 2, 17, 3, true});
}

TEST_CASE("block_linear: a gradient of another shape than the output is refused",
          "[block_linear]") {
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  const auto backward =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("xlstm::block_linear_backward", "")
          .typed<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>();
  const at::Tensor x = at::randn({5, 8}), weight = at::randn({2, 4, 4});
  CHECK_NOTHROW(backward.call(at::randn({5, 8}), x, weight, true));
  std::string message;
  try {
    backward.call(at::randn({4, 8}), x, weight, true);
  } catch (const c10::Error& error) {
    message = error.what();
  }
  CHECK(message.find("dy: expected (...,NB*O) = [5, 8], got [4, 8]") != std::string::npos);
}
