// H3 and Hyena, which compute a sequence by FFT: gradients against finite differences, causality. Their equations:
// tests/python/test_linear_models.py; pieces, single tokens and documents: test_models.cpp.
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "csrc/models/language_model.h"
#include "tests/support/catch.h"

namespace xlstm::models {
namespace {

constexpr int64_t kVocabulary = 11;

std::vector<std::shared_ptr<LanguageModel>> all_models() {
  std::vector<std::shared_ptr<LanguageModel>> models;
  for (const char* kind : {"h3", "hyena"}) {
    ModelOptions options;
    options.kind = kind;
    options.vocab_size = kVocabulary;
    options.embedding_dim = 8, options.num_blocks = 2, options.num_heads = 4;
    options.feed_forward.round_up_to_multiple_of = 4;
    options.state_size = 6, options.filter_length = 16;
    auto model = make_language_model(options);
    const at::NoGradGuard no_grad;
    for (at::Tensor& parameter : model->parameters())
      parameter.add_(at::randn_like(parameter), 0.2);
    model->to(at::kDouble);
    models.push_back(std::move(model));
  }
  return models;
}

at::Tensor random_ids(int64_t batch, int64_t length) {
  return at::randint(kVocabulary, {batch, length}, at::kLong);
}

TEST_CASE("gradients of every parameter are those of finite differences") {
  torch::manual_seed(31);
  constexpr double kStep = 1e-5;
  for (const auto& model : all_models()) {
    const at::Tensor ids = random_ids(2, 21), first = ids.narrow(1, 0, 9),
                     second = ids.narrow(1, 9, 12);
    at::Tensor reset = at::zeros({2, 12}, at::kBool);
    reset[0][5].fill_(true), reset[1][0].fill_(true);
    const at::Tensor weight = at::randn({2, 21, kVocabulary}, at::kDouble);
    // One half after the other: gradients flow through the state, too.
    const auto loss = [&] {
      const auto [early, state] = model->forward(first);
      const at::Tensor late = model->forward(second, state, reset).first;
      return (at::cat({early, late}, 1) * weight).sum();
    };
    const auto parameters = model->parameters();
    const auto gradients = torch::autograd::grad({loss()}, parameters);
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < parameters.size(); ++i) {
      INFO(model->options().kind << " " << model->named_parameters().keys()[i]);
      const at::Tensor direction = at::randn_like(parameters[i]);
      at::Tensor parameter = parameters[i];
      parameter.add_(direction, kStep);
      const double above = loss().item<double>();
      parameter.sub_(direction, 2 * kStep);
      const double below = loss().item<double>();
      parameter.add_(direction, kStep);
      const double slope = (above - below) / (2 * kStep);
      const double got = (gradients[i] * direction).sum().item<double>();
      CHECK(std::abs(got) > 0);
      CHECK(got == Approx(slope).epsilon(1e-5).margin(1e-6));
    }
  }
}

TEST_CASE("no token changes what stands before it, and each changes what follows") {
  torch::manual_seed(32);
  const at::NoGradGuard no_grad;
  constexpr int64_t kLength = 19;
  for (const auto& model : all_models()) {
    const at::Tensor ids = random_ids(2, kLength), before = model->forward(ids).first;
    for (int64_t t = 0; t < kLength; ++t) {
      INFO(model->options().kind << ", token " << t);
      at::Tensor changed = ids.clone();
      changed.select(1, t).add_(4).remainder_(kVocabulary);
      const at::Tensor change = (model->forward(changed).first - before).abs().amax({0, 2});
      if (t > 0) CHECK(change.narrow(0, 0, t).max().item<double>() < 1e-11);
      CHECK(change.narrow(0, t, kLength - t).min().item<double>() > 1e-11);
    }
  }
}

TEST_CASE("Hyena goes on beyond the filter's unit of time, H3 beyond its taps") {
  torch::manual_seed(33);
  const at::NoGradGuard no_grad;
  for (const auto& model : all_models()) {
    INFO(model->options().kind);
    const at::Tensor ids = random_ids(1, 50), whole = model->forward(ids).first;
    ModelState state = model->forward(ids.narrow(1, 0, 45)).second;
    for (int64_t t = 45; t < 50; ++t) {
      auto [logits, next] = model->forward(ids.narrow(1, t, 1), state);
      CHECK((logits - whole.narrow(1, t, 1)).abs().max().item<double>() < 1e-9);
      state = std::move(next);
    }
  }
}

}  // namespace
}  // namespace xlstm::models
