// headwise_norm and residual_norm against plain loops: every combination of optional arguments, both norms and gates,
// odd sizes.
#include "csrc/ops/norm.h"
#include "tests/ops/differences.h"

namespace {

using xlstm::test::Values;

struct Case {
  int64_t rows, heads, dim;
  bool weight, bias, skip, gate;
  const char *kind, *activation;
};

long double act(long double g, const Case& c) {
  const long double sigmoid = 1 / (1 + std::exp(-g));
  return std::string(c.activation) == "silu" ? g * sigmoid : sigmoid;
}

Values reference(const Case& c, const std::vector<Values>& in) {
  const int64_t channels = c.heads * c.dim;
  size_t next = 1;
  const Values* weight = c.weight ? &in[next++] : nullptr;
  const Values* bias = c.bias ? &in[next++] : nullptr;
  const Values* skip = c.skip ? &in[next++] : nullptr;
  const Values* skip_weight = c.skip ? &in[next++] : nullptr;
  const Values* gate = c.gate ? &in[next++] : nullptr;
  Values y;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t h = 0; h < c.heads; ++h) {
      const long double* x = in[0].data() + r * channels + h * c.dim;
      long double mean = 0, square = 0;
      if (std::string(c.kind) == "layer")
        for (int64_t i = 0; i < c.dim; ++i) mean += x[i] / c.dim;
      for (int64_t i = 0; i < c.dim; ++i) square += (x[i] - mean) * (x[i] - mean) / c.dim;
      for (int64_t i = 0; i < c.dim; ++i) {
        const int64_t channel = h * c.dim + i, at = r * channels + channel;
        long double v = (x[i] - mean) / std::sqrt(square + 0.01L);
        if (weight) v *= (*weight)[channel];
        if (bias) v += (*bias)[channel];
        if (skip) v += (*skip_weight)[channel] * (*skip)[at];
        y.push_back(gate ? v * act((*gate)[at], c) : v);
      }
    }
  return y;
}

void check_case(const Case& c) {
  const int64_t channels = c.heads * c.dim;
  const auto random = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
  std::vector<at::Tensor> inputs{random({c.rows, c.heads, c.dim})};
  if (c.weight) inputs.push_back(random({channels}));
  if (c.bias) inputs.push_back(random({channels}));
  if (c.skip) {
    inputs.push_back(random({c.rows, channels}));
    inputs.push_back(random({channels}));
  }
  if (c.gate) inputs.push_back(random({c.rows, channels}));
  const auto op = [&c](const std::vector<at::Tensor>& in) {
    size_t next = 1;
    const auto take = [&](bool present) {
      return present ? std::optional<at::Tensor>(in[next++]) : std::nullopt;
    };
    const auto weight = take(c.weight), bias = take(c.bias), skip = take(c.skip),
               skip_weight = take(c.skip), gate = take(c.gate);
    return xlstm::ops::headwise_norm(in[0], weight, bias, skip, skip_weight, gate, 0.01, c.kind,
                                     c.activation);
  };
  xlstm::test::check(
      op, [&](const auto& in) { return reference(c, in); }, inputs);
}

/// sum and norm of it, behind each other.
void check_sum_case(const Case& c) {
  const auto random = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
  std::vector<at::Tensor> inputs{random({c.rows, c.dim}), random({c.rows, c.dim})};
  if (c.weight) inputs.push_back(random({c.dim}));
  if (c.bias) inputs.push_back(random({c.dim}));
  const auto op = [&c](const std::vector<at::Tensor>& in) {
    using Optional = std::optional<at::Tensor>;
    const Optional weight = c.weight ? Optional(in[2]) : std::nullopt;
    const Optional bias = c.bias ? Optional(in.back()) : std::nullopt;
    const auto [sum, y] = xlstm::ops::residual_norm(in[0], in[1], weight, bias, 0.01, c.kind);
    return at::cat({sum.flatten(), y.flatten()});
  };
  const auto loops = [&c](const std::vector<Values>& in) {
    std::vector<Values> of_sum(in.begin() + 1, in.end());
    for (size_t i = 0; i < in[0].size(); ++i) of_sum[0][i] += in[0][i];
    Values result = of_sum[0];
    for (const long double y : reference(c, of_sum)) result.push_back(y);
    return result;
  };
  xlstm::test::check(op, loops, inputs);
}

}  // namespace

TEST_CASE("headwise_norm: values and gradients equal plain loops", "[norm]") {
  for (int present = 0; present < 16; ++present)
    for (const char* kind : {"layer", "rms"})
      check_case({3, 2, 5, bool(present & 1), bool(present & 2), bool(present & 4),
                  bool(present & 8), kind, present % 3 ? "silu" : "sigmoid"});
}

TEST_CASE("headwise_norm: sizes around the vector length and the row blocks", "[norm]") {
  for (const int64_t dim : {1, 7, 8, 33, 70})
    check_case({2, 2, dim, true, true, true, true, "layer", "silu"});
  check_case({35, 1, 3, true, true, true, true, "rms", "sigmoid"});
  check_case({0, 2, 3, true, true, true, true, "layer", "silu"});
}

TEST_CASE("residual_norm: values and gradients equal plain loops", "[norm]") {
  for (int present = 0; present < 4; ++present)
    for (const char* kind : {"layer", "rms"})
      for (const int64_t dim : {1, 7, 8, 33, 70})
        check_sum_case(
            {3, 1, dim, bool(present & 1), bool(present & 2), false, false, kind, "silu"});
  check_sum_case({35, 1, 3, true, true, false, false, "rms", "silu"});
  check_sum_case({0, 1, 3, true, true, false, false, "layer", "silu"});
}
