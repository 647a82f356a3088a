// Sampling against plain loops over the definition; generation against a full forward pass per token.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "csrc/core/error.h"
#include "csrc/models/model_kinds.h"
#include "csrc/nn/random_state.h"
#include "tests/support/catch.h"
#include "train/decoder.h"
#include "train/generation.h"
#include "train/generation_speed.h"
#include "train/text_stream.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

std::vector<double> random_logits(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, 2);
  std::vector<double> logits(count);
  for (double& logit : logits) logit = normal(random);
  return logits;
}

/// Probabilities by the definition: softmax at the temperature, the k largest, then the shortest head with mass p.
std::map<int64_t, double> expected_probabilities(const std::vector<double>& logits,
                                                 const SamplingOptions& options) {
  std::vector<std::pair<double, int64_t>> ranked;
  for (size_t i = 0; i < logits.size(); ++i)
    ranked.emplace_back(-std::exp(logits[i] / options.temperature), static_cast<int64_t>(i));
  std::sort(ranked.begin(), ranked.end());
  if (options.top_k > 0 && ranked.size() > static_cast<size_t>(options.top_k))
    ranked.resize(static_cast<size_t>(options.top_k));
  double total = 0;
  for (const auto& entry : ranked) total -= entry.first;
  std::map<int64_t, double> kept;
  double mass = 0;
  for (const auto& [weight, id] : ranked) {
    if (mass / total >= options.top_p) break;
    kept[id] = -weight;
    mass -= weight;
  }
  for (auto& entry : kept) entry.second /= mass;
  return kept;
}

std::shared_ptr<models::LanguageModel> tiny_model(const std::string& kind = "xlstm") {
  models::ModelOptions options;
  options.kind = kind;
  options.vocab_size = 37;
  options.embedding_dim = 16;
  options.num_blocks = 2;
  options.num_heads = 2;
  if (kind == "xlstm") options.slstm_at = {1};
  // Torch begins with another seed in every process; not every model draws texts of different lengths.
  nn::seed_random_state(at::kCPU, 1);
  auto model = models::make_language_model(options);
  const at::NoGradGuard no_grad;
  for (auto& parameter : model->parameters())
    parameter.mul_(3);  // sharper, so that argmax has no near ties
  model->to(at::kDouble);
  return model;
}

/// Counts the tokens that a model is given.
class Counting : public models::LanguageModel {
 public:
  explicit Counting(std::shared_ptr<models::LanguageModel> model) : model_(std::move(model)) {}
  at::Tensor embed(const at::Tensor& ids) const override {
    tokens += ids.numel();
    return model_->embed(ids);
  }
  at::Tensor head_weight() const override { return model_->head_weight(); }
  const models::ModelOptions& options() const override { return model_->options(); }
  mutable int64_t tokens = 0;

 private:
  std::pair<at::Tensor, models::ModelState> run(at::Tensor embedded,
                                                const models::ModelState& state,
                                                const std::optional<at::Tensor>& reset,
                                                models::BlockOutputs* outputs) override {
    return model_->hidden(embedded, state, reset, {}, /*embedded=*/true, outputs);
  }
  std::shared_ptr<models::LanguageModel> model_;
};

}  // namespace

TEST_CASE("draws follow the distribution that temperature, top_k and top_p define") {
  const std::vector<double> logits = random_logits(12, 1);
  struct Case {
    double temperature;
    int64_t top_k;
    double top_p;
  };
  for (const Case& c : {Case{1, 0, 1}, Case{0.5, 0, 1}, Case{2, 5, 1}, Case{1, 0, 0.7},
                        Case{1.5, 6, 0.8}, Case{1, 100, 1e-9}, Case{1, 1, 1}}) {
    SamplingOptions options;
    options.temperature = c.temperature;
    options.top_k = c.top_k;
    options.top_p = c.top_p;
    options.seed = 7;
    const auto expected = expected_probabilities(logits, options);
    Sampler sampler(options);
    std::map<int64_t, int> counts;
    const int draws = 20000;
    for (int i = 0; i < draws; ++i) ++counts[sampler.draw(logits)];
    for (const auto& [id, count] : counts) CHECK(expected.count(id) == 1);
    for (const auto& [id, p] : expected)
      CHECK(std::abs(counts[id] - draws * p) <= 5 * std::sqrt(draws * p * (1 - p)) + 1);
  }
}

TEST_CASE("the random stream is that of mt19937_64 with 53 bits") {
  SamplingOptions options;
  options.seed = 123;
  Sampler sampler(options);
  std::mt19937_64 random(123);
  const std::vector<double> uniform(10, 0.25);
  for (int i = 0; i < 1000; ++i) {
    const double u = static_cast<double>(random() / 2048) / 9007199254740992.0;
    CHECK(sampler.draw(uniform) == static_cast<int64_t>(u * 10));
  }
  std::mt19937_64 standard;  // the value the C++ standard prescribes
  standard.discard(9999);
  CHECK(standard() == 9981545732273789042ULL);
}

TEST_CASE("greedy takes the first of the largest; a small vocabulary hides the rest") {
  SamplingOptions options;
  options.temperature = 0;
  CHECK(Sampler(options).draw({1, 5, 5, 2}) == 1);
  CHECK(Sampler(options).draw({-INFINITY, -3, -INFINITY}) == 1);
  options.vocab_size = 2;
  CHECK(Sampler(options).draw({1, 2, 9}) == 1);
  options.temperature = 1;
  Sampler sampler(options);
  for (int i = 0; i < 100; ++i) CHECK(sampler.draw({1, 2, 9}) < 2);
}

TEST_CASE("extreme logits and temperatures stay defined; bad ones are refused") {
  SamplingOptions options;
  options.temperature = 1e-6;
  CHECK(Sampler(options).draw({1e4, -1e4, 0}) == 0);
  options.temperature = 1;
  CHECK(Sampler(options).draw({-INFINITY, 1e300, -1e300}) == 1);
  CHECK_THROWS_AS(Sampler(options).draw({0, NAN}), Error);
  CHECK_THROWS_AS(Sampler(options).draw({0, INFINITY}), Error);
  CHECK_THROWS_AS(Sampler(options).draw({-INFINITY, -INFINITY}), Error);
  for (const double bad : {-1.0, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    options.temperature = bad;
    CHECK_THROWS_AS(Sampler(options), Error);
  }
  options = {};
  options.top_p = 0;
  CHECK_THROWS_AS(Sampler(options), Error);
  options = {};
  options.top_k = -1;
  CHECK_THROWS_AS(Sampler(options), Error);
}

TEST_CASE("generation with state equals a full forward pass per token") {
  const auto model = tiny_model();
  model->train();
  SamplingOptions options;
  options.temperature = 0;
  options.max_new_tokens = 24;
  for (const size_t length : {1u, 2u, 9u}) {
    std::vector<int64_t> ids;
    for (size_t i = 0; i < length; ++i) ids.push_back(static_cast<int64_t>(i * 7 % 37));
    std::vector<int64_t> seen;
    const auto got = generate(*model, ids, options, [&](int64_t id) { seen.push_back(id); });
    CHECK(seen == got);
    CHECK(model->is_training());
    const at::NoGradGuard no_grad;
    model->eval();
    std::vector<int64_t> want;
    for (int64_t i = 0; i < options.max_new_tokens; ++i) {
      const auto logits = model->forward(at::tensor(ids, at::kLong).unsqueeze(0)).first;
      want.push_back(logits[0][-1].argmax().item<int64_t>());
      ids.push_back(want.back());
    }
    model->train();
    CHECK(got == want);
  }
}

TEST_CASE("a decoder gives the logits of one parallel pass, where mLSTM states lag, too") {
  for (const char* kind : {"xlstm", "xlstm_large", "retnet", "linear_attention", "h3", "hyena"}) {
    const auto model = tiny_model(kind);
    model->eval();
    const at::NoGradGuard no_grad;
    const at::Tensor ids = at::randint(0, 37, {1, 45}, at::kLong);
    const at::Tensor logits = model->forward(ids).first;
    for (const bool lazy : {false, true}) {
      for (const int64_t prompt : {0, 5}) {
        INFO(kind << ", lazy " << lazy << ", prompt of " << prompt);
        models::ModelState state;
        if (prompt > 0) state = model->forward(ids.narrow(1, 0, prompt)).second;
        Decoder decoder(*model, state, lazy);
        for (int64_t t = prompt; t < 45; ++t) {
          const at::Tensor next = decoder.next(ids.narrow(1, t, 1));
          REQUIRE((next - logits.select(1, t)).abs().max().item<double>() < 1e-9);
        }
      }
    }
  }
}

TEST_CASE("a decoder of several sequences gives each the logits it has alone") {
  for (const char* kind : {"xlstm", "llama", "mamba", "rwkv4"}) {
    const auto model = tiny_model(kind);
    model->eval();
    const at::NoGradGuard no_grad;
    const at::Tensor ids = at::randint(0, 37, {3, 20}, at::kLong);
    const auto [logits, state] = model->forward(ids.narrow(1, 0, 5));
    const at::Tensor whole = model->forward(ids).first;
    Decoder decoder(*model, state, {}, 3);
    for (int64_t t = 5; t < 20; ++t) {
      INFO(kind << " at " << t);
      const at::Tensor next = decoder.next(ids.narrow(1, t, 1));
      REQUIRE(next.sizes() == at::IntArrayRef({3, 37}));
      REQUIRE((next - whole.select(1, t)).abs().max().item<double>() < 1e-9);
    }
  }
}

TEST_CASE("a decoder goes on without a sequence, the last one in its row") {
  for (const models::ModelKind& kind : models::kModelKinds) {
    const auto model = tiny_model(std::string(kind.name));
    model->eval();
    const at::NoGradGuard no_grad;
    const at::Tensor ids = at::randint(0, 37, {4, 40}, at::kLong);
    const auto [logits, state] = model->forward(ids.narrow(1, 0, 4));  // as many tokens as rows
    const at::Tensor whole = model->forward(ids).first;
    for (const bool lazy : {false, true}) {
      models::ModelState copy = state;
      for (auto& block : copy)
        for (at::Tensor& tensor : block) tensor = tensor.clone();
      Decoder decoder(*model, copy, lazy, 4);
      std::vector<int64_t> rows{0, 1, 2, 3};
      for (int64_t t = 4; t < 40; ++t) {
        INFO(kind.name << " at " << t << ", lazy " << lazy);
        if (t == 10) decoder.drop(1), rows = {0, 3, 2};
        if (t == 20) decoder.drop(2), rows = {0, 3};
        if (t == 30) decoder.drop(0), rows = {3};
        const at::Tensor here = at::tensor(rows, at::kLong);
        const at::Tensor next = decoder.next(ids.select(1, t).index_select(0, here).unsqueeze(1));
        const at::Tensor expected = whole.select(1, t).index_select(0, here);
        REQUIRE(next.sizes() == expected.sizes());
        REQUIRE((next - expected).abs().max().item<double>() < 1e-9);
      }
    }
  }
}

TEST_CASE("nothing is computed behind a prompt's end") {
  Counting model(tiny_model());
  const std::vector<std::vector<int64_t>> prompts{{1, 2, 3}, {4}, {5, 6}, {7}, {8, 9}};
  SamplingOptions options;
  options.max_new_tokens = 60;
  options.stop_token = 4;
  int64_t expected = 5 * 3;  // prompts, padded
  std::set<size_t> lengths;
  for (const auto& each : generate_batch(model, prompts, options)) {
    expected += static_cast<int64_t>(each.size()) - 1;  // the last one is not read
    lengths.insert(each.size());
  }
  CHECK(lengths.size() > 2);
  CHECK(model.tokens == expected);
}

TEST_CASE("prompts of any lengths are continued side by side as each is alone") {
  const std::vector<std::vector<int64_t>> prompts{
      {1, 2, 3, 4, 5, 6, 7}, {8}, {9, 10, 11}, {12, 13, 14, 15, 16, 17, 18}};
  for (const char* kind : {"xlstm", "xlstm_large", "llama", "gpt", "mamba", "hyena"}) {
    const auto model = tiny_model(kind);
    SamplingOptions options;
    options.max_new_tokens = 24;
    options.seed = 3;
    for (const auto& prompt : prompts) {
      const std::vector<std::vector<int64_t>> of_one(3, prompt);
      const auto samples = generate_batch(*model, of_one, options);
      for (size_t i = 0; i < of_one.size(); ++i) {
        SamplingOptions own = options;
        own.seed += i;
        CHECK(samples[i] == generate(*model, of_one[i], own));
      }
    }
    for (const int64_t stop : {int64_t{-1}, generate(*model, prompts[0], options)[5]}) {
      INFO(kind << ", stop token " << stop);
      options.stop_token = stop;
      std::vector<std::vector<int64_t>> told(prompts.size()), alone;
      const auto together = generate_batch(*model, prompts, options,
                                           [&](size_t i, int64_t id) { told[i].push_back(id); });
      for (size_t i = 0; i < prompts.size(); ++i) {
        SamplingOptions own = options;
        own.seed += i;
        alone.push_back(generate(*model, prompts[i], own));
      }
      CHECK(together == alone);
      CHECK(told == together);
    }
  }
  CHECK(generate_batch(*tiny_model(), {}, {}).empty());
}

TEST_CASE("the time of a decoding step contains what every 16th does, and no disturbance") {
  std::vector<double> seconds(64, 1);
  for (size_t i = 5; i < seconds.size(); i += 16) seconds[i] = 17;
  CHECK(seconds_per_step(seconds) == 2);
  seconds[40] = 1000;
  CHECK(seconds_per_step(seconds) == 2);
  seconds.insert(seconds.begin(), 7, 1000.0);  // no whole group
  CHECK(seconds_per_step(seconds) == 2);
  CHECK(seconds_per_step({1, 2, 6}) == 3);
}

TEST_CASE("generation is timed at the positions asked for") {
  const auto model = tiny_model("llama");
  model->eval();
  const at::NoGradGuard no_grad;
  const GenerationTimes times = time_generation(*model, 4, {1, 3, 80});
  REQUIRE(times.token_s.size() == 3);
  REQUIRE(times.until_s.size() == 3);
  CHECK(times.token_s[0] > 0);
  CHECK(times.until_s[0] >= times.token_s[0]);
  CHECK(times.until_s[1] > times.until_s[0]);
  CHECK(times.until_s[2] > times.until_s[1]);
  CHECK(times.until_s[2] >
        31 * times.token_s[2]);  // two of the last four groups of 16 took the median or more
  CHECK(time_generation(*model, 1, {2}).token_s.size() == 1);
  CHECK(generation_throughput(*model, 4, 3, 5).value() > 0);
}

TEST_CASE("the seed decides, the stop token stops, bad prompts are refused") {
  const auto model = tiny_model();
  SamplingOptions options;
  options.max_new_tokens = 40;
  options.seed = 5;
  const auto first = generate(*model, {1, 2, 3}, options);
  CHECK(generate(*model, {1, 2, 3}, options) == first);
  options.seed = 6;
  CHECK(generate(*model, {1, 2, 3}, options) != first);
  options.seed = 5;
  options.stop_token = first[4];
  const auto stopped = generate(*model, {1, 2, 3}, options);
  const auto end = std::find(first.begin(), first.end(), first[4]) - first.begin() + 1;
  CHECK(stopped == std::vector<int64_t>(first.begin(), first.begin() + end));
  options.max_new_tokens = 0;
  CHECK(generate(*model, {1}, options).empty());
  CHECK_THROWS_AS(generate(*model, {}, options), Error);
  CHECK_THROWS_AS(generate(*model, {37}, options), Error);
  CHECK_THROWS_AS(generate(*model, {0, -1}, options), Error);
}

TEST_CASE("UTF-8 comes out whole, however it is cut") {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";
  for (size_t piece = 1; piece <= text.size(); ++piece) {
    Utf8Stream stream;
    std::string got;
    for (size_t i = 0; i < text.size(); i += piece) got += stream.push(text.substr(i, piece));
    CHECK(got + stream.finish() == text);
  }
  Utf8Stream stream;
  CHECK(stream.push("\xE2\x82").empty());
  CHECK(stream.push("x") == "\xEF\xBF\xBDx");
  CHECK(stream.push("\xFF\xC0\x80") == "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");
  CHECK(stream.push("\xED\xA0\x80") == "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");  // a surrogate
  CHECK(stream.push("\xF0\x9F").empty());
  CHECK(stream.finish() == "\xEF\xBF\xBD");
  CHECK(stream.finish().empty());
}

TEST_CASE("streamed text equals the text decoded at once") {
  const auto tokenizer = data::make_tokenizer("bytes");
  const std::string text = "d\xC3\xA9j\xC3\xA0 vu \xE2\x82\xAC";
  const auto ids = tokenizer->encode(text);
  for (const size_t split : {1u, 4u, 9u}) {
    const std::vector<int64_t> prompt(ids.begin(),
                                      ids.begin() + static_cast<std::ptrdiff_t>(split));
    TextStream stream(*tokenizer, prompt);
    std::string got;
    for (size_t i = split; i < ids.size(); ++i) got += stream.push(ids[i]);
    got += stream.finish();
    CHECK(got == text.substr(split));
  }
}
