// Gradients that are summed over processes during the backward pass: the bits of sums behind it, begun before it ends.
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <chrono>
#include <future>
#include <stdexcept>
#include <string>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/nn/layers.h"
#include "csrc/nn/random_state.h"
#include "tests/support/catch.h"
#include "tests/train/processes_here.h"
#include "tests/train/small_options.h"
#include "train/gradient_sums.h"
#include "train/train_step.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

constexpr std::chrono::seconds kPatience{60};
constexpr int64_t kSize = 128;  // elements of a parameter by itself: a bucket of 512 bytes
constexpr int64_t kBucketBytes = 4 * kSize;

void seed(uint64_t value) { nn::seed_random_state(at::kCPU, value); }

/// By name.
std::vector<std::pair<std::string, models::ModelOptions>> cases() {
  models::ModelOptions recomputed = small_options(), bounds = small_options("hgrn2"),
                       adapters = small_options();
  recomputed.activation_checkpointing = recomputed.tie_weights = true;
  bounds.activation_checkpointing = true;
  adapters.embedding_dim = 64;
  adapters.lora.rank = 2;
  models::ModelOptions recomputed_adapters = adapters;
  recomputed_adapters.activation_checkpointing = true;
  return {{"plain", small_options()},
          {"recomputed, tied weights", recomputed},
          {"a parameter of all blocks", bounds},
          {"adapters", adapters},
          {"adapters, recomputed", recomputed_adapters}};
}

/// The same weights in all processes, of which nothing uses those that are registered last.
std::shared_ptr<models::LanguageModel> make(const models::ModelOptions& options) {
  seed(1);
  auto model = models::make_language_model(options);
  model->register_module("unused", std::make_shared<nn::Norm>(kSize, 1e-5, "rms", at::kCPU));
  const at::NoGradGuard no_grad;
  for (const auto& [name, parameter] : trained_parameters(*model))
    parameter.add_(at::randn(parameter.sizes()), 0.1);  // of adapters half are zero
  return model;
}

std::vector<at::Tensor> parameters_of(const models::LanguageModel& model) {
  std::vector<at::Tensor> parameters;
  for (const auto& [name, parameter] : trained_parameters(model)) parameters.push_back(parameter);
  return parameters;
}

void backward(models::LanguageModel& model, const at::Tensor& tokens) {
  const int64_t length = tokens.size(1) - 1;
  model.loss(tokens.narrow(1, 0, length), tokens.narrow(1, 1, length), {}, "sum").backward();
}

at::Tensor leaf(double value) { return at::full({kSize}, value).set_requires_grad(true); }

bool is_hooked(const at::Tensor& parameter) {
  return torch::autograd::impl::post_acc_grad_hooks(parameter) != nullptr;
}

}  // namespace

TEST_CASE("sums during the backward pass have the bits of sums behind it") {
  const ProcessesHere here;
  seed(2);
  const at::Tensor tokens =
      at::randint(kSmallVocabulary, {2, 2, 3, 9}, at::kLong);  // process, micro batch
  for (const auto& [name, options] : cases()) {
    std::vector<at::Tensor> expected;  // one process after the other, then added
    for (int64_t rank = 0; rank < 2; ++rank) {
      const auto model = make(options);
      for (int64_t micro = 0; micro < 2; ++micro) backward(*model, tokens[rank][micro]);
      const auto parameters = parameters_of(*model);
      for (size_t i = 0; i < parameters.size(); ++i) {
        const at::Tensor& gradient = parameters[i].grad();
        if (rank == 0) {
          expected.push_back(gradient);
        } else if (gradient.defined()) {
          expected[i] = expected[i] + gradient;
        }
      }
    }
    for (const int64_t bytes : {int64_t{1}, int64_t{5000}, int64_t{1} << 20}) {
      INFO(name << ", buckets of " << bytes << " bytes");
      const std::array models{make(options), make(options)};
      const std::array also{at::full({}, 1.5), at::full({}, 2.0)};
      here.run(2, [&](ProcessGroup& group) {
        const int64_t rank = group.place().rank;
        models::LanguageModel& model = *models[rank];
        GradientSums sums(parameters_of(model), group, bytes);
        backward(model, tokens[rank][0]);
        {
          const GradientSums::Scope summed(&sums);
          backward(model, tokens[rank][1]);
        }
        sums.finish(also[rank]);
      });
      for (int64_t rank = 0; rank < 2; ++rank) {
        CHECK(also[rank].item<double>() == 3.5);
        const auto parameters = parameters_of(*models[rank]);
        REQUIRE(parameters.size() == expected.size());
        size_t reached = 0;
        for (size_t i = 0; i < expected.size(); ++i) {
          INFO(i);
          CHECK(!is_hooked(parameters[i]));
          const at::Tensor& gradient = parameters[i].grad();
          REQUIRE(gradient.defined() == expected[i].defined());
          if (!gradient.defined()) continue;
          CHECK(gradient.equal(expected[i]));
          ++reached;
        }
        CHECK(reached + 1 == expected.size());  // all but what is not used
      }
    }
  }
}

TEST_CASE("a sum is made before the backward pass ends") {
  const ProcessesHere here;
  const at::Tensor early = leaf(2), late = leaf(3);
  std::promise<void> summed;
  auto made = summed.get_future();
  std::future_status status{};
  here.run(2, [&](ProcessGroup& group) {
    if (group.place().leads()) {
      GradientSums sums({early, late}, group, kBucketBytes);
      const GradientSums::Scope scope(&sums);
      const at::Tensor y = early * 5;
      // In the midst of the backward pass: it goes on when the other process has the sum of the gradients that are there.
      y.register_hook([&](const at::Tensor&) { status = made.wait_for(kPatience); });
      (y * late).sum().backward();
      sums.finish(at::zeros({1}));
    } else {
      const at::Tensor own = at::ones({kSize});
      group.sum(own);
      CHECK(own.equal(at::full({kSize}, 11.0)));
      summed.set_value();
      group.sum(at::ones({kSize}));
      group.sum(at::ones({1}));
    }
  });
  CHECK(status == std::future_status::ready);
  CHECK(late.grad().equal(at::full({kSize}, 11.0)));   // 5 * 2 + 1
  CHECK(early.grad().equal(at::full({kSize}, 16.0)));  // 5 * 3 + 1
}

TEST_CASE("sums have one order, whatever comes first") {
  const ProcessesHere here;
  std::array<std::array<at::Tensor, 3>, 2> leaves;
  for (auto& of_rank : leaves) of_rank = {leaf(1), leaf(2), leaf(3)};
  here.run(2, [&](ProcessGroup& group) {
    const auto& [a, b, c] = leaves[group.place().rank];
    GradientSums sums({a, b, c}, group, kBucketBytes);
    for (const double scale : {1.0, 10.0}) {  // steps
      const GradientSums::Scope scope(&sums);
      const at::Tensor loss =
          group.place().leads() ? (a * 1 * scale * b) * c : (c * 1 * scale * b) * a;
      loss.sum().backward();
      sums.finish(at::zeros({1}));
    }
  });
  // Each step adds what it has summed to what the one before has left.
  for (const auto& [a, b, c] : leaves) {
    CHECK(a.grad().equal(at::full({kSize}, 144.0)));  // 2 * (2 * 6 + 60)
    CHECK(b.grad().equal(at::full({kSize}, 72.0)));
    CHECK(c.grad().equal(at::full({kSize}, 48.0)));
  }
}

TEST_CASE("gradients that are not dense are summed, and are dense then") {
  const ProcessesHere here;
  const std::array parameters{at::ones({4, 6}).set_requires_grad(true),
                              at::ones({4, 6}).set_requires_grad(true)};
  here.run(2, [&](ProcessGroup& group) {
    at::Tensor parameter = parameters[group.place().rank];
    parameter.mutable_grad() = at::ones({6, 4}).t();
    GradientSums sums({parameter}, group);
    {
      const GradientSums::Scope scope(&sums);
      (parameter * parameter).sum().backward();
    }
    sums.finish(at::zeros({1}));
  });
  for (const at::Tensor& parameter : parameters) {
    CHECK(parameter.grad().is_contiguous());
    CHECK(parameter.grad().equal(at::full({4, 6}, 6.0)));
  }
}

TEST_CASE("where a backward pass fails the other process says so, and no hook is left") {
  const ProcessesHere here;
  const std::array early{leaf(2), leaf(2)}, late{leaf(3), leaf(3)};
  std::array<std::string, 2> said;
  std::array<bool, 2> hooked{};
  const auto work = [&](ProcessGroup& group) {
    const int64_t rank = group.place().rank;
    GradientSums sums({early[rank], late[rank]}, group, kBucketBytes);
    try {
      {
        const GradientSums::Scope scope(&sums);
        const at::Tensor y = early[rank] * 5;
        y.register_hook([&](const at::Tensor&) {
          hooked[rank] = is_hooked(early[rank]);
          if (rank == 1) throw std::runtime_error("no memory left");
        });
        (y * late[rank]).sum().backward();
      }
      sums.finish(at::zeros({1}));
    } catch (const Error& error) {
      said[rank] = error.code == ExitCode::kPeer ? error.what() : "another error";
      throw;
    } catch (const std::runtime_error& error) {
      said[rank] = error.what();
      throw;
    }
  };
  CHECK_THROWS(here.run(2, work));
  CHECK(said[0].find("another process failed") != std::string::npos);
  CHECK(said[1] == "no memory left");
  for (int64_t rank = 0; rank < 2; ++rank) {
    CHECK(hooked[rank]);
    CHECK(!is_hooked(early[rank]));
    CHECK(!is_hooked(late[rank]));
  }
}
