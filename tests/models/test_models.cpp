// Whole models of every kind in float64 with random parameters: time, documents, checkpointing, heads, the loss.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "csrc/models/block_stack.h"
#include "tests/models/models.h"

namespace xlstm::models {
namespace {

using namespace tests;

TEST_CASE("two halves and single tokens give the logits of one pass") {
  torch::manual_seed(1);
  for (auto& [name, model] : all_models()) {
    INFO(name);
    const at::Tensor ids = random_ids(3, 12);
    const auto [whole, last] = model->forward(ids);
    REQUIRE(whole.sizes() == at::IntArrayRef({3, 12, kVocabulary}));
    const auto [first, middle] = model->forward(ids.narrow(1, 0, 7));
    const auto [second, end] = model->forward(ids.narrow(1, 7, 5), middle);
    CHECK(difference(at::cat({first, second}, 1), whole) < kTolerance);
    CHECK(difference(end, last) < kTolerance);

    at::NoGradGuard no_grad;
    ModelState state;
    for (int64_t t = 0; t < 12; ++t) {
      auto [logits, next] = model->forward(ids.narrow(1, t, 1), state);
      CHECK(difference(logits, whole.narrow(1, t, 1)) < kTolerance);
      state = next;
    }
    CHECK(difference(state, last) < kTolerance);
    const auto [nothing, same] = model->forward(ids.narrow(1, 0, 0), state);
    CHECK(nothing.sizes() == at::IntArrayRef({3, 0, kVocabulary}));
    CHECK(difference(same, state) == 0);
    const auto [none, empty] = model->forward(ids.narrow(1, 0, 0));
    CHECK(none.sizes() == nothing.sizes());
    CHECK(difference(model->forward(ids, empty).first, whole) < kTolerance);
  }
}

/// Logits of document B, the state behind it and, with gradients on, those of B's loss.
std::vector<at::Tensor> document_b(LanguageModel& model, const at::Tensor& ids,
                                   const at::Tensor& reset, int64_t border) {
  auto [logits, state] = model.forward(ids, {}, reset);
  const at::Tensor b = logits.narrow(1, border, logits.size(1) - border);
  std::vector<at::Tensor> result = {b.detach()};
  for (const auto& block : state) {
    for (const auto& tensor : block) result.push_back(tensor.detach());
  }
  if (!at::GradMode::is_enabled()) return result;
  at::Tensor targets = ids.roll(-1, 1);
  targets.narrow(1, 0, border).fill_(-100);
  targets.select(1, -1).fill_(-100);  // rolled in from document A
  for (auto& grad :
       torch::autograd::grad({model.loss(ids, targets, reset, "sum")}, model.parameters())) {
    result.push_back(grad);
  }
  return result;
}

TEST_CASE("changing a token of document A changes no bit of document B") {
  torch::manual_seed(2);
  constexpr int64_t kBorder = 5;
  for (auto& [name, model] : all_models()) {
    const at::Tensor ids = random_ids(3, 12);
    at::Tensor reset = at::zeros({3, 12}, at::kBool);
    reset.select(1, 0).fill_(true);
    reset.select(1, kBorder).fill_(true);
    for (const bool training : {true, false}) {
      at::AutoGradMode grad_mode(training);
      const auto before = document_b(*model, ids, reset, kBorder);
      for (int64_t t = 0; t < kBorder; ++t) {
        at::Tensor changed = ids.clone();
        changed.select(1, t).add_(3).remainder_(kVocabulary);
        const auto after = document_b(*model, changed, reset, kBorder);
        REQUIRE(before.size() == after.size());
        for (size_t i = 0; i < before.size(); ++i) {
          INFO(name << ", training " << training << ", token " << t << ", tensor " << i);
          CHECK(at::equal(before[i], after[i]));
        }
      }
      const at::Tensor alone = model->forward(ids.narrow(1, kBorder, 12 - kBorder)).first;
      CHECK(difference(before[0], alone) < kTolerance);
    }
  }
}

TEST_CASE("a reset while decoding starts a document") {
  torch::manual_seed(3);
  at::NoGradGuard no_grad;
  for (auto& [name, model] : all_models()) {
    INFO(name);
    const at::Tensor ids = random_ids(2, 6);
    const ModelState used = model->forward(ids.narrow(1, 0, 5)).second;
    const at::Tensor token = ids.narrow(1, 5, 1);
    const auto [fresh, fresh_state] = model->forward(token);
    const auto [again, again_state] = model->forward(token, used, at::ones({2, 1}, at::kBool));
    // A transformer keeps the old tokens and masks them: other kernels, other rounding, a longer cache.
    const bool attention = std::string(name) == "llama" || std::string(name) == "gpt";
    // Hyena computed its filter for all distances at once then.
    const bool grows = attention || std::string(name) == "hyena";
    CHECK((grows ? difference(fresh, again) < kTolerance : at::equal(fresh, again)));
    const at::Tensor seen = attention ? again_state[0][0].narrow(2, 5, 1) : again_state[0][0];
    CHECK(difference(fresh_state[0][0], seen) == 0);
  }
}

TEST_CASE(
    "a document that begins behind a given state reads nothing of it, nor does what follows") {
  torch::manual_seed(12);
  const at::NoGradGuard no_grad;
  for (auto& [name, model] : all_models()) {
    INFO(name);
    const at::Tensor ids = random_ids(2, 13);
    at::Tensor reset = at::zeros({2, 6}, at::kBool);
    reset.select(1, 2).fill_(true);
    const ModelState used = model->forward(ids.narrow(1, 0, 6)).second;
    const auto [logits, state] = model->forward(ids.narrow(1, 6, 6), used, reset);
    const auto [fresh, fresh_state] = model->forward(ids.narrow(1, 8, 4));
    CHECK(difference(logits.narrow(1, 2, 4), fresh) < kTolerance);
    const at::Tensor next = ids.narrow(1, 12, 1);
    CHECK(difference(model->forward(next, state).first, model->forward(next, fresh_state).first) <
          kTolerance);
  }
}

TEST_CASE("the loss is the cross entropy of the logits, with the same gradients") {
  torch::manual_seed(4);
  for (auto& [name, model] : all_models()) {
    INFO(name);
    const at::Tensor ids = random_ids(2, 9);
    at::Tensor targets = random_ids(2, 9);
    targets[0][3].fill_(-100);
    const auto parameters = model->parameters();
    for (const char* reduction : {"mean", "sum"}) {
      const at::Tensor logits = model->forward(ids).first;
      const at::Tensor flat = targets.flatten();
      at::Tensor expected = at::zeros({}, logits.options());
      int64_t counted = 0;
      const at::Tensor logp = at::log_softmax(logits.flatten(0, 1), -1);
      for (int64_t i = 0; i < flat.numel(); ++i) {
        const auto target = flat[i].item<int64_t>();
        if (target == -100) continue;
        expected = expected - logp[i][target];
        ++counted;
      }
      if (std::string(reduction) == "mean") expected = expected / counted;
      const at::Tensor loss = model->loss(ids, targets, {}, reduction);
      CHECK(difference(loss, expected) < kTolerance);
      const auto grads = torch::autograd::grad({loss}, parameters);
      const auto expected_grads = torch::autograd::grad({expected}, parameters);
      for (size_t i = 0; i < grads.size(); ++i)
        CHECK(difference(grads[i], expected_grads[i]) < kTolerance);
    }
  }
}

TEST_CASE(
    "real inputs: the loss is the squared error of what counts, a sequence equals its steps") {
  torch::manual_seed(3);
  ModelOptions options = small_options();
  options.vocab_size = 1;
  options.input_features = 3;
  options.tie_weights = false;
  const auto model = make(options);
  const at::Tensor inputs = at::randn({2, 9, 3}, at::kDouble);
  at::Tensor targets = at::rand({2, 9}, at::kDouble);
  targets[0][0].fill_(NAN), targets[1][8].fill_(NAN);
  const at::NoGradGuard no_grad;
  const auto [predictions, state] = model->forward(inputs);
  REQUIRE(predictions.sizes() == at::IntArrayRef{2, 9, 1});
  double sum = 0;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 9; ++t)
      if (!((b == 0 && t == 0) || (b == 1 && t == 8)))
        sum += std::pow((predictions[b][t][0] - targets[b][t]).item<double>(), 2);
  CHECK(model->loss(inputs, targets, {}, "sum").item<double>() == Approx(sum).epsilon(1e-5));
  CHECK(model->loss(inputs, targets).item<double>() == Approx(sum / 16).epsilon(1e-5));
  ModelState steps;
  for (int64_t t = 0; t < 9; ++t) {
    auto [step, next] = model->forward(inputs.narrow(1, t, 1), steps);
    CHECK(difference(step, predictions.narrow(1, t, 1)) < kTolerance);
    steps = std::move(next);
  }
  CHECK_THROWS_AS(model->forward(random_ids(2, 5)), c10::Error);
}

TEST_CASE("real inputs with tokens as answers: the loss is their cross entropy") {
  torch::manual_seed(3);
  ModelOptions options = small_options();
  options.vocab_size = 5;
  options.input_features = 3;
  options.tie_weights = false;
  for (const bool fused : {true, false}) {
    options.fused = fused;
    const auto model = make(options);
    const at::Tensor inputs = at::randn({2, 9, 3}, at::kDouble);
    at::Tensor targets = at::full({2, 9}, -100, at::kLong);
    targets[0][8].fill_(4), targets[1][8].fill_(2);
    const at::NoGradGuard no_grad;
    const at::Tensor likely = model->forward(inputs).first.log_softmax(2);
    REQUIRE(likely.sizes() == at::IntArrayRef{2, 9, 5});
    const double sum = -(likely[0][8][4] + likely[1][8][2]).item<double>();
    CHECK(model->loss(inputs, targets, {}, "sum").item<double>() == Approx(sum).epsilon(1e-5));
    CHECK(model->loss(inputs, targets).item<double>() == Approx(sum / 2).epsilon(1e-5));
  }
  options.tie_weights = true;
  CHECK_THROWS_AS(make(options), c10::Error);
}

TEST_CASE("without fused operators: the same loss, gradients, logits and states") {
  torch::manual_seed(7);
  std::vector<ModelOptions> models = {small_options(), large_options(), ablated_options()};
  models.push_back(small_options());
  models.back().activation_checkpointing = true;
  for (const char* kind :
       {"mamba", "lstm", "lstm_block", "llama", "gpt", "rwkv4", "rwkv6", "retnet"}) {
    models.push_back(small_options());
    models.back().kind = kind;
    models.back().slstm_at.clear();
  }
  for (ModelOptions options : models) {
    CAPTURE(options.kind);
    options.fused = true;
    const auto fused = make(options);
    options.fused = false;
    const auto steps = make(options);
    const auto parameters = fused->parameters(), same = steps->parameters();
    {
      const at::NoGradGuard no_grad;
      for (size_t i = 0; i < same.size(); ++i) same[i].copy_(parameters[i]);
    }
    const at::Tensor ids = random_ids(2, 40);
    at::Tensor targets = random_ids(2, 40), reset = at::zeros({2, 40}, at::kBool);
    targets[0][3].fill_(-100), reset[1][7].fill_(true);
    for (const char* reduction : {"mean", "sum"}) {
      const at::Tensor wanted = fused->loss(ids, targets, reset, reduction);
      const at::Tensor loss = steps->loss(ids, targets, reset, reduction);
      CHECK(difference(loss, wanted) < kTolerance);
      const auto wanted_grads = torch::autograd::grad({wanted}, parameters);
      const auto grads = torch::autograd::grad({loss}, same);
      for (size_t i = 0; i < grads.size(); ++i)
        CHECK(difference(grads[i], wanted_grads[i]) < kTolerance);
    }
    const auto each = [&](LanguageModel& model) {
      return model.loss(ids, targets, reset, "none").detach();
    };
    CHECK(difference(each(*steps), each(*fused)) < kTolerance);
    const at::NoGradGuard no_grad;
    const auto [wanted, wanted_state] = fused->forward(ids, {}, reset);
    const auto [logits, state] = steps->forward(ids, {}, reset);
    CHECK(difference(logits, wanted) < kTolerance);
    CHECK(difference(state, wanted_state) < kTolerance);
    const at::Tensor next = random_ids(2, 1);  // one token: the step operators
    CHECK(difference(steps->forward(next, state).first, fused->forward(next, state).first) <
          kTolerance);
  }
}

TEST_CASE("activation checkpointing changes no bit of loss and gradients") {
  torch::manual_seed(5);
  for (ModelOptions options : {small_options(), large_options()}) {
    options.dropout = 0.2;
    options.add_embedding_dropout = true;
    const auto plain = make(options);
    options.activation_checkpointing = true;
    const auto checkpointed = make(options);
    {
      at::NoGradGuard no_grad;
      for (auto& item : checkpointed->named_parameters())
        item.value().copy_(plain->named_parameters()[item.key()]);
    }
    const at::Tensor ids = random_ids(2, 9), targets = random_ids(2, 9);
    const auto run = [&](LanguageModel& model) {
      torch::manual_seed(6);
      const at::Tensor loss = model.loss(ids, targets);
      auto result = torch::autograd::grad({loss}, model.parameters());
      result.push_back(loss.detach());
      return result;
    };
    const auto a = run(*plain), b = run(*checkpointed);
    for (size_t i = 0; i < a.size(); ++i) CHECK(at::equal(a[i], b[i]));
  }
}

TEST_CASE("the sLSTM's settings of the backward pass reach the operator") {
  const at::Tensor ids = random_ids(2, 40), targets = random_ids(2, 40);
  const auto run = [&](const auto& set) {
    torch::manual_seed(11);
    ModelOptions options = small_options();
    set(options.slstm);
    const auto model = make(options);
    const at::Tensor loss = model->loss(ids, targets);
    auto result = torch::autograd::grad({loss}, {model->named_parameters()["blocks.1.slstm.bias"]});
    result.push_back(loss.detach());
    return result;
  };
  const auto plain = run([](auto&) {});
  const auto again = run([](auto& slstm) { slstm.recompute = true; });
  const auto clipped = run([](auto& slstm) { slstm.recurrent_clip = 1e-4; });
  const auto cut = run([](auto& slstm) { slstm.recurrent_cut = true; });
  CHECK(at::equal(again[0], plain[0]));
  for (const auto* other : {&again, &clipped, &cut}) CHECK(at::equal((*other)[1], plain[1]));
  for (const auto* other : {&clipped, &cut}) CHECK(difference((*other)[0], plain[0]) > 1e-6);
  CHECK(difference(clipped[0], cut[0]) > 1e-6);
}

TEST_CASE("soft cap, tied head") {
  torch::manual_seed(7);
  ModelOptions options = small_options();
  const auto model = make(options);
  options.output_logit_soft_cap = 1.5;
  options.tie_weights = true;
  const auto capped = make(options);
  CHECK(capped->head_weight().is_same(capped->named_parameters()["embedding.weight"]));
  CHECK_FALSE(model->head_weight().is_same(model->named_parameters()["embedding.weight"]));
  const at::Tensor ids = random_ids(2, 6);
  const at::Tensor logits = capped->forward(ids).first;
  CHECK(logits.abs().max().item<double>() < 1.5);
  const at::Tensor raw = at::linear(capped->hidden(ids, {}, {}).first, capped->head_weight());
  CHECK(raw.abs().max().item<double>() > 1.5);  // the cap had something to do
  CHECK(difference(logits, 1.5 * at::tanh(raw / 1.5)) < kTolerance);
}

TEST_CASE("a loss of no targets is 0, and so are its gradients") {
  torch::manual_seed(13);
  for (const bool fused : {true, false}) {
    for (const bool numbers : {false, true}) {
      INFO("fused " << fused << ", numbers " << numbers);
      ModelOptions options = small_options();
      options.fused = fused;
      if (numbers) options.vocab_size = 1, options.input_features = 3;
      const auto model = make(options);
      const at::Tensor inputs = numbers ? at::randn({2, 5, 3}, at::kDouble) : random_ids(2, 5);
      const at::Tensor targets =
          numbers ? at::full({2, 5}, NAN, at::kDouble) : at::full({2, 5}, -100, at::kLong);
      const at::Tensor loss = model->loss(inputs, targets);
      CHECK(loss.item<double>() == 0);
      for (const auto& gradient : torch::autograd::grad({loss}, model->parameters()))
        CHECK(gradient.abs().max().item<double>() == 0);
    }
  }
}

TEST_CASE("bfloat16 autocast gives float32 logits as near as bfloat16 weights allow") {
  torch::manual_seed(9);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  std::vector<ModelOptions> all = {small_options(), large_options()};
  for (const char* kind :
       {"linear_attention", "retnet", "gla", "hgrn", "hgrn2", "rwkv5", "rwkv6", "h3", "hyena"}) {
    all.push_back(small_options());
    all.back().kind = kind;
    all.back().slstm_at.clear();
  }
  for (const auto& options : all) {
    INFO(options.kind);
    const auto model = make(options);
    model->to(at::kFloat);
    const at::Tensor ids = random_ids(2, 20);
    const at::Tensor exact = model->forward(ids).first;
    at::autocast::set_autocast_enabled(at::kCPU, true);
    const auto [low, state] = model->forward(ids);
    model->loss(ids, ids).backward();
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    CHECK(low.scalar_type() == at::kFloat);
    for (const at::Tensor& tensor : state[0])  // matrices and HGRN's vector; not the last tokens
      if (tensor.dim() == 4 || (tensor.dim() == 2 && tensor.is_floating_point()))
        CHECK(tensor.scalar_type() == at::kFloat);
    for (const auto& parameter : model->parameters())
      CHECK(parameter.grad().scalar_type() == at::kFloat);

    // The yardstick: the same model in float32 with its weights alone rounded to bfloat16.
    at::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) parameter.copy_(parameter.to(at::kBFloat16));
    const double yardstick = (model->forward(ids).first - exact).abs().mean().item<double>();
    const double error = (low - exact).abs().mean().item<double>();
    CHECK(error > 0);
    CHECK(error < 4 * yardstick);
  }
}

TEST_CASE("inputs that do not fit are refused by name") {
  const auto model = make(small_options());
  const auto message = [&](const at::Tensor& ids, const ModelState& state,
                           const std::optional<at::Tensor>& reset) {
    try {
      model->forward(ids, state, reset);
    } catch (const c10::Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const at::Tensor ids = random_ids(2, 4);
  CHECK(message(ids.to(at::kInt), {}, {}).find("ids: expected (B,T) int64") == 0);
  CHECK(message(ids[0], {}, {}).find("ids: expected (B,T) int64") == 0);
  CHECK(message(ids, ModelState(2), {}).find("state: expected one entry for each of 3 blocks") ==
        0);
  CHECK(message(ids, {}, at::ones({2, 3}, at::kBool)).find("reset: expected (2,4) bool") == 0);
  CHECK(message(ids + kVocabulary, {}, {}).find("out of range") != std::string::npos);
}

}  // namespace
}  // namespace xlstm::models
