// Settings that reach the blocks, first weights, places of dropout, learned positions.
#include <ATen/CPUGeneratorImpl.h>

#include "csrc/nn/layers.h"
#include "tests/models/models.h"

namespace xlstm::models {
namespace {

using namespace tests;

TEST_CASE("what is made to be loaded draws nothing") {
  std::vector<ModelOptions> all;
  for (const auto& [name, model] : all_models()) all.push_back(model->options());
  ModelOptions adapted = small_options();
  adapted.embedding_dim = 64, adapted.lora.rank = 2;
  all.push_back(adapted);
  const auto stream = [] { return at::detail::getDefaultCPUGenerator().get_state(); };
  for (const ModelOptions& options : all) {
    INFO(options.kind << " with adapters of rank " << options.lora.rank);
    const at::Tensor before = stream();
    {
      const nn::SkipDrawing skip_drawing;
      make_language_model(options);
    }
    CHECK(at::equal(stream(), before));
    make_language_model(options);
    CHECK_FALSE(at::equal(stream(), before));
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
