// Weights that several processes hold in parts: the passes, gradients and updates of whole ones.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "csrc/nn/random_state.h"
#include "tests/support/catch.h"
#include "tests/train/processes_here.h"
#include "tests/train/small_options.h"
#include "train/optimizer.h"
#include "train/sharded_weights.h"
#include "train/train_step.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

constexpr int64_t kProcesses = 3;
using Model = std::shared_ptr<models::LanguageModel>;

models::ModelOptions recomputed_options(const std::string& kind) {
  models::ModelOptions options = small_options(kind);
  options.activation_checkpointing = true;
  return options;
}

Model make(const models::ModelOptions& options) {
  nn::seed_random_state(at::kCPU, 1);
  Model model = models::make_language_model(options);
  model->to(at::kDouble);
  return model;
}

/// One model for each process, with the same weights.
std::array<Model, kProcesses> make_all(const models::ModelOptions& options) {
  return {make(options), make(options), make(options)};
}

at::Tensor ids_of(int64_t sequences) {
  nn::seed_random_state(at::kCPU, 2);
  return at::randint(kSmallVocabulary, {sequences, 9}, at::kLong);
}

at::Tensor loss_of(models::LanguageModel& model, const at::Tensor& ids) {
  return model.loss(ids.narrow(1, 0, 8), ids.narrow(1, 1, 8), {}, "sum");
}

bool in_block(const std::string& name) { return name.find("blocks.") == 0; }

/// Whether the parameters of blocks have no memory.
bool all_away(const models::LanguageModel& model) {
  for (const auto& [name, parameter] : named_parameters(model))
    if (in_block(name) != (parameter.storage().nbytes() == 0)) return false;
  return true;
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.reshape({-1}) - b.reshape({-1})).abs().max().item<double>();
}

}  // namespace

TEST_CASE("divided weights have the gradients and the updates of whole ones") {
  const ProcessesHere here;
  for (const char* const kind : {"xlstm", "xlstm_large", "hgrn2", "llama", "mamba"}) {
    INFO(kind);
    config::OptimConfig options;
    options.weight_decay = 0.3;
    const at::Tensor ids = ids_of(2 * kProcesses);
    const at::Tensor rate = at::full({}, 0.1, at::kDouble);
    const Model whole = make(recomputed_options(kind));
    AdamW optimizer(named_parameters(*whole), options);
    loss_of(*whole, ids).backward();
    std::vector<at::Tensor> gradients;
    for (const auto& [name, parameter] : named_parameters(*whole))
      gradients.push_back(parameter.grad().clone());
    optimizer.step(rate);
    const NamedTensors moments = optimizer.state();

    const auto all = make_all(recomputed_options(kind));
    std::array<double, kProcesses> difference{}, after{};
    std::array<bool, kProcesses> away{};
    std::array<int64_t, kProcesses> bytes{};
    std::array<NamedTensors, kProcesses> states;
    here.run(kProcesses, [&](ProcessGroup& group) {
      const int64_t rank = group.place().rank;
      models::LanguageModel& model = *all[rank];
      const NamedTensors parameters = named_parameters(model);
      ShardedWeights weights(model, group);
      AdamW divided(parameters, options, &group, &weights);
      bytes[rank] = divided.bytes();
      away[rank] = all_away(model);
      for (int64_t micro = 0; micro < 2; ++micro)  // gradients add up
        loss_of(model, ids.narrow(0, 2 * rank + micro, 1)).backward();
      weights.finish_gradients();
      away[rank] = away[rank] && all_away(model);
      for (size_t i = 0; i < parameters.size(); ++i) {
        const at::Tensor& parameter = parameters[i].second;
        const auto* const parts = weights.parts(parameter);
        if (parts == nullptr) {
          group.sum(parameter.grad());
          difference[rank] =
              std::max(difference[rank], largest_difference(parameter.grad(), gradients[i]));
          continue;
        }
        for (const HeldPart& part : *parts) {
          if (!part.weights.defined()) continue;
          const at::Tensor expected = gradients[i].reshape({-1}).slice(0, part.begin, part.end);
          difference[rank] =
              std::max(difference[rank], largest_difference(part.weights.grad(), expected));
        }
      }
      divided.step(rate);
      divided.zero_grad();
      states[rank] = divided.state();
      const ShardedWeights::Whole everything(&weights);
      for (size_t i = 0; i < parameters.size(); ++i)
        after[rank] =
            std::max(after[rank], largest_difference(parameters[i].second.detach(),
                                                     named_parameters(*whole)[i].second.detach()));
    });
    for (int64_t rank = 0; rank < kProcesses; ++rank) {
      CHECK(away[rank]);
      CHECK(difference[rank] < 1e-11);
      CHECK(after[rank] < 1e-9);
      CHECK(bytes[rank] < optimizer.bytes() / 2);
    }
    CHECK(bytes[0] + bytes[1] + bytes[2] == optimizer.bytes());
    REQUIRE(states[0].size() == moments.size());
    for (size_t i = 0; i < moments.size(); ++i) {
      INFO(moments[i].first);
      CHECK(states[0][i].first == moments[i].first);
      CHECK(states[0][i].second.sizes() == moments[i].second.sizes());
      CHECK(largest_difference(states[0][i].second, moments[i].second) < 1e-11);
    }
  }
}

TEST_CASE("weights are whole where they are asked for, and changes stay") {
  const ProcessesHere here;
  const models::ModelOptions options = recomputed_options("xlstm");
  const Model whole = make(options);
  const auto all = make_all(options);
  const at::Tensor ids = ids_of(2);
  const auto logits = [&](models::LanguageModel& model) { return model.forward(ids).first; };
  at::Tensor before, after;
  {
    const at::NoGradGuard no_grad;
    before = logits(*whole);
    for (const auto& [name, parameter] : named_parameters(*whole)) parameter.mul_(1.25);
    after = logits(*whole);
  }
  std::array<bool, kProcesses> same{};
  here.run(kProcesses, [&](ProcessGroup& group) {
    const at::NoGradGuard no_grad;
    const int64_t rank = group.place().rank;
    models::LanguageModel& model = *all[rank];
    ShardedWeights weights(model, group);
    bool good = logits(model).equal(before) && all_away(model);  // block by block, by all together
    {
      ShardedWeights::Whole everything(&weights);
      // Some look at it, others do not: nothing is exchanged.
      for (int64_t i = 0; i < rank; ++i) good = good && logits(model).equal(before);
      for (const auto& [name, parameter] : named_parameters(model)) parameter.mul_(1.25);
      everything.keep_changes();
    }
    good = good && all_away(model) && logits(model).equal(after);
    same[rank] = good;
  });
  for (const bool good : same) CHECK(good);
}

TEST_CASE("a pass that fails leaves no weights behind") {
  const ProcessesHere here;
  const auto all = make_all(recomputed_options("xlstm"));
  std::array<int, kProcesses> failed{};
  std::array<bool, kProcesses> away{};
  here.run(kProcesses, [&](ProcessGroup& group) {
    const int64_t rank = group.place().rank;
    models::LanguageModel& model = *all[rank];
    ShardedWeights weights(model, group);
    const models::ModelState bad{{at::ones({1})}, {}, {}};
    for (const bool grad : {true, false}) {
      const at::AutoGradMode mode(grad);
      try {
        model.hidden(at::zeros({1, 4}, at::kLong), bad);
      } catch (const c10::Error&) {
        ++failed[rank];
      }
    }
    weights.finish_gradients();  // with what was fetched ahead
    away[rank] = all_away(model);
  });
  for (int64_t rank = 0; rank < kProcesses; ++rank) {
    CHECK(failed[rank] == 2);
    CHECK(away[rank]);
  }
}
