// linear_cross_entropy against plain loops: reductions, soft cap, ignored targets, many row blocks,
// bad targets.
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>

#include "csrc/ops/linear_cross_entropy.h"
#include "tests/ops/differences.h"

namespace {

using xlstm::test::Values;

struct Case {
  int64_t rows, width, vocab;
  double soft_cap;
  const char* reduction;
  bool ignoring;
};

Values reference(const Case& c, const at::Tensor& target, const std::vector<Values>& in) {
  Values losses;
  long double sum = 0;
  int64_t counted = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t wanted = target[r].item<int64_t>();
    losses.push_back(0);
    if (wanted == -7) continue;
    Values logits;
    long double total = 0;
    for (int64_t v = 0; v < c.vocab; ++v) {
      long double logit = 0;
      for (int64_t i = 0; i < c.width; ++i)
        logit += in[0][r * c.width + i] * in[1][v * c.width + i];
      if (c.soft_cap > 0) logit = c.soft_cap * std::tanh(logit / c.soft_cap);
      logits.push_back(logit);
      total += std::exp(logit);
    }
    losses.back() = std::log(total) - logits[wanted];
    sum += losses.back();
    ++counted;
  }
  if (std::string(c.reduction) == "none") return losses;
  return {std::string(c.reduction) == "mean" && counted > 0 ? sum / counted : sum};
}

void check_case(const Case& c) {
  at::Tensor target = at::randint(c.vocab, {c.rows}, at::kLong);
  if (c.ignoring)
    for (int64_t r = 0; r < c.rows; r += 3) target[r].fill_(-7);
  CAPTURE(c.rows, c.width, c.vocab, c.soft_cap, c.reduction, c.ignoring);
  xlstm::test::check(
      [&](const auto& in) {
        return xlstm::ops::linear_cross_entropy(in[0], in[1], target, -7, c.soft_cap, c.reduction);
      },
      [&](const auto& in) { return reference(c, target, in); },
      {at::randn({c.rows, c.width}, at::kDouble), at::randn({c.vocab, c.width}, at::kDouble)});
}

}  // namespace

TEST_CASE("linear_cross_entropy: values and gradients equal plain loops",
          "[linear_cross_entropy]") {
  for (const char* reduction : {"mean", "sum", "none"})
    for (const double soft_cap : {0.0, 2.0})
      for (const bool ignoring : {false, true}) {
        check_case({7, 3, 19, soft_cap, reduction, ignoring});
        check_case({1, 2, 1, soft_cap, reduction, ignoring});
      }
}

TEST_CASE("linear_cross_entropy: blocks of rows add up", "[linear_cross_entropy]") {
  const at::Tensor x = at::randn({1100, 2}, at::kDouble), weight = at::randn({3, 2}, at::kDouble);
  const at::Tensor target = at::randint(3, {1100}, at::kLong);
  const Case c{1100, 2, 3, 0, "mean", false};
  const at::Tensor loss = xlstm::ops::linear_cross_entropy(x, weight, target);
  CHECK(xlstm::test::error(
            loss, reference(c, target, {xlstm::test::values(x), xlstm::test::values(weight)})) <
        1e-13);
  const auto grads = [&](const at::Tensor& rows, const at::Tensor& wanted) {
    const at::Tensor leaf = weight.clone().requires_grad_();
    const at::Tensor sum = xlstm::ops::linear_cross_entropy(rows, leaf, wanted, -100, 0, "sum");
    return torch::autograd::grad({sum}, {leaf})[0];
  };
  at::Tensor parts = grads(x.slice(0, 0, 100), target.slice(0, 0, 100));
  for (int64_t r = 100; r < 1100; r += 100)
    parts = parts + grads(x.slice(0, r, r + 100), target.slice(0, r, r + 100));
  CHECK(xlstm::test::error(grads(x, target), xlstm::test::values(parts)) < 1e-13);
}

TEST_CASE("linear_cross_entropy: names a target outside the vocabulary", "[linear_cross_entropy]") {
  const at::Tensor x = at::randn({2, 3, 4}), weight = at::randn({5, 4});
  at::Tensor target = at::full({2, 3}, 4, at::kLong);
  target[1][1].fill_(5);
  std::string message;
  try {
    xlstm::ops::linear_cross_entropy(x, weight, target);
  } catch (const c10::Error& error) {
    message = error.what();
  }
  CAPTURE(message);
  CHECK(message.find("expected 0 to 4") != std::string::npos);
  CHECK(message.find("got 5 at position 4") != std::string::npos);
}
