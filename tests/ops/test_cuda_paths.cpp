// What the operators on CUDA do in ATen calls, run on CPU tensors and held against the operators for the CPU.
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <cmath>

#include "csrc/ops/block_linear.h"
#include "csrc/ops/block_linear_products.h"
#include "csrc/ops/linear_cross_entropy.h"
#include "csrc/ops/linear_cross_entropy_blocks.h"
#include "tests/support/catch.h"

namespace {

using namespace xlstm::ops;

void check_close(const at::Tensor& got, const at::Tensor& wanted) {
  REQUIRE(got.sizes() == wanted.sizes());
  if (got.numel() == 0) return;
  const double size = std::max(1.0, wanted.abs().max().item<double>());
  CHECK((got - wanted).abs().max().item<double>() <= 1e-11 * size);
}

}  // namespace

TEST_CASE("linear_cross_entropy in blocks is the operator") {
  torch::manual_seed(1);
  for (const char* reduction : {"mean", "sum", "none"})
    for (const double cap : {0.0, 2.5})
      for (const int64_t vocab :
           {int64_t{7}, int64_t{1} << 20}) {  // one block, and blocks of 64 rows
        const int64_t rows = vocab == 7 ? 30 : 70, width = vocab == 7 ? 5 : 2;
        CAPTURE(reduction, cap, vocab);
        const at::Tensor x = at::randn({2, rows / 2, width}, at::kDouble).requires_grad_();
        const at::Tensor weight = at::randn({vocab, width}, at::kDouble).requires_grad_();
        at::Tensor target = at::randint(vocab, {2, rows / 2}, at::kLong);
        target[0][3].fill_(-100), target[1].slice(0, 5, 9).fill_(-100);
        const at::Tensor loss = linear_cross_entropy(x, weight, target, -100, cap, reduction);
        const bool none = std::string(reduction) == "none";
        const at::Tensor upstream = none ? at::rand(target.sizes(), at::kDouble) : at::Tensor();
        const auto gradients = torch::autograd::grad(
            {loss}, {x, weight},
            none ? std::vector<at::Tensor>{upstream} : std::vector<at::Tensor>{});
        const auto [got, dx, dweight] = linear_cross_entropy_blocks(
            {x.detach(), weight.detach(), target, -100, cap, reduction, upstream, true, true},
            cross_entropy_block);
        check_close(got, loss.detach());
        check_close(dx, gradients[0]);
        check_close(dweight, gradients[1]);
      }
}

TEST_CASE("linear_cross_entropy in blocks: ignored rows, nothing to count, unknown targets") {
  const at::Tensor x = at::randn({4, 3}, at::kDouble), weight = at::randn({6, 3}, at::kDouble);
  at::Tensor target = at::full({4}, -100, at::kLong);
  const auto run = [&] {
    return linear_cross_entropy_blocks({x, weight, target, -100, 0, "mean", {}, true, true},
                                       cross_entropy_block);
  };
  CHECK(std::get<0>(run()).item<double>() == 0);
  CHECK(std::get<2>(run()).abs().max().item<double>() == 0);
  target[0].fill_(2);
  x[1].fill_(NAN);
  CHECK(std::isfinite(std::get<0>(run()).item<double>()));
  CHECK(std::get<1>(run())[1].abs().max().item<double>() == 0);
  CHECK(std::isfinite(std::get<2>(run()).abs().max().item<double>()));
  target[2].fill_(6);  // the host does not look
  CHECK(std::isnan(std::get<0>(run()).item<double>()));
  const at::Tensor none = at::randn({0, 3}, at::kDouble);
  const at::Tensor no_target = at::full({0}, 0, at::kLong);
  const auto [loss, dx, dweight] = linear_cross_entropy_blocks(
      {none, weight, no_target, -100, 0, "mean", {}, true, true}, cross_entropy_block);
  CHECK(loss.item<double>() == 0);
  CHECK(dx.sizes() == none.sizes());
  CHECK(dweight.abs().max().item<double>() == 0);
}

TEST_CASE("linear_cross_entropy in blocks: gradients of a mean over many rows in float16") {
  torch::manual_seed(3);
  const at::Tensor x = at::randn({8192, 4}, at::kHalf), weight = at::randn({500, 4}, at::kHalf);
  const at::Tensor target = at::randint(3, {8192}, at::kLong);  // all other tokens are unlikely
  const auto gradients = [&](at::ScalarType type) {
    const auto [loss, dx, dweight] = linear_cross_entropy_blocks(
        {x.to(type), weight.to(type), target, -100, 0, "mean", {}, true, true},
        cross_entropy_block);
    return std::pair(dx.to(at::kDouble), dweight.slice(0, 3).to(at::kDouble));
  };
  const auto [dx, dweight] = gradients(at::kHalf);
  const auto [wanted_dx, wanted_dweight] = gradients(at::kDouble);
  const auto error = [](const at::Tensor& got, const at::Tensor& wanted) {
    return ((got - wanted).norm() / wanted.norm()).item<double>();
  };
  CHECK(error(dx, wanted_dx) < 1e-3);
  CHECK(error(dweight, wanted_dweight) < 1e-3);
}

TEST_CASE("linear_cross_entropy in blocks: without a vocabulary no target is known") {
  const at::Tensor x = at::randn({2, 3}, at::kDouble), weight = at::randn({0, 3}, at::kDouble);
  at::Tensor target = at::full({2}, 0, at::kLong);
  target[1].fill_(-100);
  const auto [loss, dx, dweight] = linear_cross_entropy_blocks(
      {x, weight, target, -100, 0, "none", {}, true, true}, cross_entropy_block);
  CHECK(std::isnan(loss[0].item<double>()));
  CHECK(loss[1].item<double>() == 0);
  CHECK(dx.abs().max().item<double>() == 0);
  CHECK(dweight.sizes() == weight.sizes());
}

TEST_CASE("block_linear by batched products is the operator") {
  torch::manual_seed(2);
  for (const bool with_bias : {false, true})
    for (const int64_t out : {3, 4})
      for (const int64_t rows : {0, 6}) {
        CAPTURE(with_bias, out, rows);
        const at::Tensor x = at::randn({rows, 2, 20}, at::kDouble).requires_grad_();
        const at::Tensor weight = at::randn({5, out, 4}, at::kDouble).requires_grad_();
        const at::Tensor bias = at::randn({5 * out}, at::kDouble).requires_grad_();
        const auto given = with_bias ? std::optional<at::Tensor>(bias) : std::nullopt;
        const at::Tensor y = block_linear(x, weight, given);
        const at::Tensor dy = at::randn(y.sizes(), at::kDouble);
        std::vector<at::Tensor> inputs{x, weight};
        if (with_bias) inputs.push_back(bias);
        const auto wanted = torch::autograd::grad({y}, inputs, {dy});
        const at::NoGradGuard no_grad;
        check_close(block_linear_products(x, weight, given), y);
        const auto [dx, dweight, dbias] = block_linear_products_backward(dy, x, weight, with_bias);
        check_close(dx, wanted[0]);
        check_close(dweight, wanted[1]);
        if (with_bias) check_close(dbias, wanted[2]);
      }
}
