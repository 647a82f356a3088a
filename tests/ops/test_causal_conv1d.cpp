// causal_conv1d against plain loops: all widths, resets, packed sequences, states; the step;
// isolation of documents.
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "csrc/ops/causal_conv1d.h"
#include "tests/ops/differences.h"

namespace {

using xlstm::test::Values;

struct Case {
  int64_t batch, time, channels, width;
  bool silu = false, bias = true, states = true;
  std::vector<int64_t> resets = {};      // positions in the flattened (B,T)
  std::vector<int64_t> cu_seqlens = {};  // with batch 1
};

struct Span {
  int64_t first, length;  // in flattened tokens
};

std::vector<Span> spans(const Case& c) {
  std::vector<Span> list;
  if (c.cu_seqlens.empty())
    for (int64_t b = 0; b < c.batch; ++b) list.push_back({b * c.time, c.time});
  for (size_t i = 1; i < c.cu_seqlens.size(); ++i)
    list.push_back({c.cu_seqlens[i - 1], c.cu_seqlens[i] - c.cu_seqlens[i - 1]});
  return list;
}

// y, then the final states. The window of each sequence is carried along token by token.
Values reference(const Case& c, const std::vector<Values>& in) {
  const int64_t memory = c.width - 1;
  const Values &x = in[0], &weight = in[1];
  const std::vector<Span> list = spans(c);
  Values y(x.size()), states;
  for (size_t n = 0; n < list.size(); ++n)
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      Values window(memory, 0);
      if (c.states)
        for (int64_t k = 0; k < memory; ++k)
          window[k] = in[c.bias ? 3 : 2][(n * memory + k) * c.channels + channel];
      for (int64_t t = list[n].first; t < list[n].first + list[n].length; ++t) {
        if (std::count(c.resets.begin(), c.resets.end(), t)) window.assign(memory, 0);
        window.push_back(x[t * c.channels + channel]);
        long double sum = c.bias ? in[2][channel] : 0;
        for (int64_t j = 0; j < c.width; ++j) sum += weight[channel * c.width + j] * window[j];
        y[t * c.channels + channel] = c.silu ? sum / (1 + std::exp(-sum)) : sum;
        window.erase(window.begin());
      }
      states.insert(states.end(), window.begin(), window.end());
    }
  for (size_t n = 0; n < list.size(); ++n)  // (N,C,W-1) -> (N,W-1,C)
    for (int64_t k = 0; k < memory; ++k)
      for (int64_t channel = 0; channel < c.channels; ++channel)
        y.push_back(states[(n * c.channels + channel) * memory + k]);
  return y;
}

void check_case(const Case& c) {
  const auto random = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
  std::vector<at::Tensor> inputs{random({c.batch, c.time, c.channels}),
                                 random({c.channels, c.width})};
  if (c.bias) inputs.push_back(random({c.channels}));
  const auto count = static_cast<int64_t>(spans(c).size());
  if (c.states) inputs.push_back(random({count, c.width - 1, c.channels}));
  std::optional<at::Tensor> reset, cu_seqlens;
  if (!c.resets.empty()) {
    reset = at::zeros({c.batch, c.time}, at::kBool);
    for (const int64_t t : c.resets) reset->view({-1})[t].fill_(true);
  }
  if (!c.cu_seqlens.empty()) cu_seqlens = at::tensor(c.cu_seqlens, at::kInt);
  const auto op = [&](const std::vector<at::Tensor>& in) {
    const auto bias = c.bias ? std::optional<at::Tensor>(in[2]) : std::nullopt;
    const auto state0 = c.states ? std::optional<at::Tensor>(in.back()) : std::nullopt;
    const auto [y, state] =
        xlstm::ops::causal_conv1d(in[0], in[1], bias, state0, reset, cu_seqlens, c.silu);
    return at::cat({y.flatten(), state.flatten()});
  };
  CAPTURE(c.batch, c.time, c.channels, c.width, c.silu);
  xlstm::test::check(
      op, [&](const auto& in) { return reference(c, in); }, inputs);
}

}  // namespace

TEST_CASE("causal_conv1d: all widths and short sequences", "[causal_conv1d]") {
  for (int64_t width = 2; width <= 8; ++width)
    for (const int64_t time : {0, 1, 3, 9}) check_case({2, time, 3, width, width % 2 == 0});
  check_case({1, 6, 21, 4, true, false, false});
  check_case({1, 70, 2, 4, true});  // more than one item of work
}

TEST_CASE("causal_conv1d: resets", "[causal_conv1d]") {
  check_case({2, 9, 3, 4, true, true, true, {0, 4, 5, 9 + 2, 9 + 8}});
  check_case({1, 70, 2, 3, true, true, false, {63, 64, 66}});
  check_case({1, 2, 2, 4, false, true, true, {1}});
}

TEST_CASE("causal_conv1d: packed sequences", "[causal_conv1d]") {
  check_case({1, 9, 3, 4, true, true, true, {}, {0, 0, 2, 3, 9, 9}});
  check_case({1, 9, 2, 3, true, true, false, {4}, {0, 3, 9}});
  check_case({1, 0, 2, 3, true, true, true, {}, {0, 0}});
}

TEST_CASE("causal_conv1d: a token changes no bit of another document", "[causal_conv1d]") {
  at::Tensor x = at::randn({1, 12, 19}), weight = at::randn({19, 4});
  const at::Tensor cu_seqlens = at::tensor({0, 5, 12}, at::kInt);
  const auto run = [&] {
    const at::Tensor leaf = x.detach().clone().requires_grad_();
    const auto [y, state] = xlstm::ops::causal_conv1d(leaf, weight, {}, {}, {}, cu_seqlens, true);
    const at::Tensor dx = torch::autograd::grad({y.sum()}, {leaf})[0];
    return std::vector<at::Tensor>{y.slice(1, 5), state.slice(0, 1), dx.slice(1, 5)};
  };
  const std::vector<at::Tensor> before = run();
  x.slice(1, 0, 5).fill_(NAN);
  const std::vector<at::Tensor> after = run();
  for (size_t i = 0; i < before.size(); ++i) CHECK(at::equal(before[i], after[i]));
}

TEST_CASE("causal_conv1d_step: equals the sequence and shifts the state in place",
          "[causal_conv1d]") {
  const at::Tensor x = at::randn({3, 6, 19}, at::kDouble), weight = at::randn({19, 4}, at::kDouble);
  at::Tensor state = at::randn({3, 3, 19}, at::kDouble);
  const auto [y, last] = xlstm::ops::causal_conv1d(x, weight, {}, state.clone(), {}, {}, true);
  for (int64_t t = 0; t < 6; ++t) {
    const at::Tensor step = xlstm::ops::causal_conv1d_step(x.select(1, t), weight, {}, state, true);
    CHECK(xlstm::test::error(step, xlstm::test::values(y.select(1, t))) < 1e-14);
  }
  CHECK(at::equal(state, last));
}
