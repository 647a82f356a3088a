// Whole models of every kind in float64 with random parameters: time, documents, checkpointing, heads, the loss.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "csrc/models/block_stack.h"
#include "csrc/models/language_model.h"
#include "tests/support/catch.h"

namespace xlstm::models {
namespace {

constexpr int64_t kVocabulary = 19;
constexpr double kTolerance = 1e-9;

ModelOptions small_options() {
  ModelOptions options;
  options.vocab_size = kVocabulary;
  options.embedding_dim = 16;
  options.num_blocks = 3;
  options.num_heads = 2;
  options.mlstm.round_proj_up_to_multiple_of = 8;
  options.feed_forward.round_up_to_multiple_of = 8;
  options.slstm_at = {1};
  return options;
}

ModelOptions large_options() {
  ModelOptions options = small_options();
  options.kind = "xlstm_large";
  options.slstm_at.clear();
  options.output_logit_soft_cap = 2.5;
  return options;
}

/// Post-up-projection, gates that do not read the input, dense gates of the sLSTM, a feed-forward without gate.
ModelOptions ablated_options() {
  ModelOptions options = small_options();
  options.mlstm.up_projection = "post";
  options.mlstm.igate = "bias", options.mlstm.fgate = "fixed";
  options.slstm.gate_proj = "dense";
  options.feed_forward.gated = false, options.feed_forward.act_fn = "relu2";
  return options;
}

std::shared_ptr<LanguageModel> make(const ModelOptions& options) {
  auto model = make_language_model(options);
  at::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    at::Tensor& parameter = item.value();
    if (item.key().find("igate_preact.bias") != std::string::npos)
      parameter.zero_();  // -10 would shut the gate
    parameter.add_(at::randn_like(parameter), 0.3);
  }
  model->to(at::kDouble);
  return model;
}

struct Case {
  const char* name;
  std::shared_ptr<LanguageModel> model;
};

std::vector<Case> all_models() {
  ModelOptions tied = small_options();
  tied.tie_weights = true;
  tied.add_out_norm = false;
  tied.output_logit_soft_cap = 3;
  tied.slstm_at = {0, 2};
  ModelOptions checkpointed = small_options();
  checkpointed.activation_checkpointing = true;
  std::vector<Case> models = {{"xlstm", make(small_options())},
                              {"xlstm, tied head, soft cap, no out norm", make(tied)},
                              {"xlstm_large", make(large_options())},
                              {"xlstm, activation checkpointing", make(checkpointed)},
                              {"xlstm, ablations", make(ablated_options())}};
  for (const char* kind :
       {"lstm", "lstm_residual", "lstm_block", "llama", "gpt", "mamba", "rwkv4", "rwkv5", "rwkv6",
        "linear_attention", "retnet", "gla", "hgrn", "hgrn2", "h3", "hyena"}) {
    ModelOptions options = small_options();
    options.kind = kind;
    options.state_size = 6, options.filter_length = 16;  // both less than the longest sequence
    options.slstm_at.clear();
    options.max_positions = 64;
    models.push_back({kind, make(options)});
  }
  ModelOptions hgrn2 = small_options();
  hgrn2.kind = "hgrn2", hgrn2.slstm_at.clear();
  hgrn2.activation_checkpointing = true;  // its blocks share a parameter of the model
  models.push_back({"hgrn2, activation checkpointing", make(hgrn2)});
  return models;
}

at::Tensor random_ids(int64_t batch, int64_t length) {
  return at::randint(kVocabulary, {batch, length}, at::kLong);
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return INFINITY;
  return a.numel() == 0
             ? 0
             : (a - b).abs().max().item<double>() / std::max(1.0, b.abs().max().item<double>());
}

double difference(const ModelState& a, const ModelState& b) {
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    REQUIRE(a[i].size() == b[i].size());
    for (size_t j = 0; j < a[i].size(); ++j) worst = std::max(worst, difference(a[i][j], b[i][j]));
  }
  return worst;
}

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

TEST_CASE("settings of the blocks reach them") {
  const at::Tensor ids = random_ids(2, 9);
  const auto logits = [&](ModelOptions options, double mlstm_eps) {
    torch::manual_seed(14);
    options.mlstm_eps = mlstm_eps;
    return make(options)->forward(ids).first.detach();
  };
  ModelOptions post = small_options();
  post.mlstm.up_projection = "post";
  for (const ModelOptions& options : {small_options(), large_options(), post}) {
    INFO(options.kind << " " << options.mlstm.up_projection);
    CHECK(difference(logits(options, 0.5), logits(options, 1e-6)) > 1e-4);
  }
  ModelOptions biased = small_options();
  biased.bias = true;
  const auto names = make_language_model(biased, at::kMeta)->named_parameters();
  for (const char* name :
       {"blocks.0.mlstm.proj_up", "blocks.0.mlstm.q_proj", "blocks.0.mlstm.proj_down",
        "blocks.1.ffn.proj_up", "blocks.1.ffn.proj_down"})
    CHECK(names.contains(std::string(name) + ".bias"));
}

TEST_CASE("what is added to the residual stream starts smaller in deeper models") {
  for (const char* kind : {"xlstm", "xlstm_large", "lstm_block", "llama", "gpt", "rwkv4",
                           "linear_attention", "retnet", "gla", "hgrn", "hgrn2", "h3", "hyena"}) {
    INFO(kind);
    const auto of_depth = [&](int64_t num_blocks) {
      torch::manual_seed(15);
      ModelOptions options = small_options();
      options.kind = kind, options.num_blocks = num_blocks;
      options.slstm_at.clear();
      options.state_size = 6;
      return make_language_model(options);
    };
    const auto two = of_depth(2), four = of_depth(4);
    int64_t found = 0;  // of the first block, whose numbers are drawn alike in both
    for (const auto& item : two->named_parameters()) {
      if (item.key().rfind("blocks.0.", 0) != 0 || item.value().dim() != 2) continue;
      const at::Tensor deep = four->named_parameters()[item.key()];
      if (!at::equal(item.value(), deep) && at::allclose(item.value(), 2 * deep)) ++found;
    }
    CHECK(found > 0);
  }
  ModelOptions options = small_options();
  options.slstm_at = {2};
  const at::Tensor forget =
      make_language_model(options)->named_parameters()["blocks.2.slstm.bias"][1][0];
  for (int64_t k = 0; k < 8; ++k)  // of the last block: relative depth 1
    CHECK(forget[k].item<double>() == Approx(5 - 12 * std::pow(k / 7.0, 1.6)).margin(1e-5));
}

TEST_CASE("dropout of everything leaves the residual stream alone") {
  torch::manual_seed(16);
  for (const char* kind :
       {"xlstm", "xlstm_large", "lstm_residual", "lstm_block", "llama", "gpt", "mamba", "rwkv4",
        "rwkv5", "rwkv6", "linear_attention", "retnet", "gla", "hgrn", "hgrn2", "h3", "hyena"}) {
    INFO(kind);
    ModelOptions options = small_options();
    options.kind = kind;
    options.slstm_at.clear();
    options.add_out_norm = false;
    options.state_size = 6;
    options.dropout = 1 - 1e-12;
    const auto stack = make_block_stack(options);
    const at::NoGradGuard no_grad;
    for (at::Tensor& parameter : stack->parameters()) parameter.add_(at::randn_like(parameter));
    const at::Tensor x = at::randn({2, 6, 16});
    CHECK(at::equal(stack->forward(x).first, x));
    stack->eval();
    CHECK_FALSE(at::equal(stack->forward(x).first, x));
  }
}

TEST_CASE("the sLSTM drops units before its norm; the embedding where it is asked to") {
  torch::manual_seed(17);
  ModelOptions options = small_options();
  options.num_blocks = 1, options.slstm_at = {0};
  options.dropout = 1 - 1e-12;
  const auto cell = make(options);
  const at::Tensor ids = random_ids(2, 6);
  const at::Tensor before = cell->forward(ids).first;
  {
    const at::NoGradGuard no_grad;
    cell->named_parameters()["blocks.0.slstm.zgate.weight"].neg_();
  }
  CHECK(at::equal(cell->forward(ids).first, before));
  cell->eval();
  CHECK_FALSE(at::equal(cell->forward(ids).first, before));

  options.slstm_at.clear();
  CHECK(make(options)->forward(ids).first.abs().max().item<double>() > 0);
  options.add_embedding_dropout = true;
  CHECK(make(options)->forward(ids).first.abs().max().item<double>() == 0);
}

TEST_CASE("learned positions hold as many tokens as there are, and no more") {
  torch::manual_seed(18);
  ModelOptions options = small_options();
  options.kind = "gpt";
  options.slstm_at.clear();
  options.max_positions = 6;
  const auto model = make(options);
  const at::Tensor ids = random_ids(1, 7);
  const auto [logits, state] = model->forward(ids.narrow(1, 0, 6));
  CHECK(logits.size(1) == 6);
  const auto message = [&](const at::Tensor& more, const ModelState& from) {
    try {
      model->forward(more, from);
    } catch (const c10::ValueError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string();
  };
  for (const std::string& refused : {message(ids, {}), message(ids.narrow(1, 6, 1), state)})
    CHECK(refused.rfind("model.max_positions: 7 tokens", 0) == 0);
}

TEST_CASE("dropout acts in training alone") {
  torch::manual_seed(8);
  ModelOptions options = small_options();
  options.dropout = 0.5;
  const auto model = make(options);
  const at::Tensor ids = random_ids(2, 6);
  CHECK_FALSE(at::equal(model->forward(ids).first, model->forward(ids).first));
  model->eval();
  CHECK(at::equal(model->forward(ids).first, model->forward(ids).first));
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

TEST_CASE("the embedding starts as wide as asked, nothing else does") {
  ModelOptions options = small_options();
  options.vocab_size = 4000, options.embedding_dim = 64;
  const auto std_of = [&](double asked, const char* name) {
    options.embedding_init_std = asked;
    return make_language_model(options)->named_parameters()[name].std().item<double>();
  };
  const double small = std::sqrt(2.0 / (5.0 * 64));
  CHECK(std_of(0, "embedding.weight") == Approx(small).epsilon(0.01));
  CHECK(std_of(1.5, "embedding.weight") == Approx(1.5).epsilon(0.01));
  CHECK(std_of(1.5, "lm_head.weight") == Approx(small).epsilon(0.01));
}

TEST_CASE("one seed, one model") {
  const auto build = [](uint64_t seed) {
    torch::manual_seed(seed);
    return make_language_model(small_options());
  };
  const auto a = build(1)->parameters(), b = build(1)->parameters(), c = build(2)->parameters();
  for (size_t i = 0; i < a.size(); ++i) CHECK(at::equal(a[i], b[i]));
  CHECK_FALSE(at::equal(a[0], c[0]));
}

}  // namespace
}  // namespace xlstm::models
