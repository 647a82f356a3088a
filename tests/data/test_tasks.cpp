// The synthetic tasks: every answer against a solver that knows the definition alone, the numbers themselves against
// recorded ones, and the query distances of MQAR against draws by the definition.
#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <string>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/batch.h"
#include "csrc/data/task.h"
#include "csrc/data/task_source.h"
#include "tests/data/data_files.h"
#include "tests/support/catch.h"

namespace {

using namespace xlstm::data;
using namespace xlstm::testing;
using Tokens = std::vector<int64_t>;

/// What the model reads of a sample before the first answer, and the answers.
struct Asked {
  Tokens content, answer;
};
Asked asked(const TaskSample& sample) {
  REQUIRE(sample.input.size() == sample.target.size());
  const auto first = std::find_if(sample.target.begin(), sample.target.end(),
                                  [](int64_t t) { return t != kIgnored; });
  REQUIRE(first != sample.target.end());
  const auto length = first - sample.target.begin() + 1;
  Asked result{{sample.input.begin(), sample.input.begin() + length}, {first, sample.target.end()}};
  // Answers are never shown: padding stands in their places, and each is asked for.
  for (auto i = length; i < std::ssize(sample.input); ++i)
    CHECK(sample.input[static_cast<size_t>(i)] == 0);
  for (const int64_t token : result.answer) CHECK(token > 0);
  for (const int64_t token : result.content) CHECK(token > 0);
  return result;
}

// ---- Solvers, each by another way than its generator ----------------------------------------------------------------

/// Value of an expression as text, by rewriting the innermost bracket until a number is left; modulus p.
class Calculator {
 public:
  explicit Calculator(int64_t modulus) : p_(modulus) {}

  int64_t value(std::string text) const {
    for (auto close = text.find(')'); close != std::string::npos; close = text.find(')')) {
      const auto open = text.rfind('(', close);
      const int64_t inner = flat(text.substr(open + 1, close - open - 1));
      text = text.substr(0, open) + std::to_string(inner) + text.substr(close + 1);
    }
    return flat(text);
  }

 private:
  /// Without brackets: terms between + and -, a leading - belongs to the first one.
  int64_t flat(const std::string& text) const {
    int64_t sum = 0, product = 1, sign = 1;
    bool operand = true;  // a digit is expected
    for (const char c : text) {
      if (c >= '0' && c <= '9') {
        product = product * (c - '0') % p_;
        operand = false;
      } else if (c == '*') {
        operand = true;
      } else if (operand) {  // a sign
        REQUIRE(c == '-');
        sign = -sign;
      } else {
        sum += sign * product;
        product = 1, sign = c == '-' ? -1 : 1;
        operand = true;
      }
    }
    REQUIRE_FALSE(operand);
    return ((sum + sign * product) % p_ + p_) % p_;
  }

  int64_t p_;
};

std::string text_of(const Tokens& tokens, int64_t modulus, const std::string& others) {
  std::string text;
  for (const int64_t token : tokens)
    text += token <= modulus ? static_cast<char>('0' + token - 1)
                             : others[static_cast<size_t>(token - modulus - 1)];
  return text;
}

Tokens solve_arithmetic(const Tokens& content, int64_t modulus, const std::string& others) {
  std::string text = text_of(content, modulus, others);
  REQUIRE(text.back() == '=');
  text.pop_back();
  return {1 + Calculator(modulus).value(text)};
}

Tokens solve_equation(const Tokens& content) {
  const std::string text = text_of(content, 5, "+-*()x=A");
  REQUIRE(text.back() == 'A');
  const auto equals = text.find('='), unknown = text.find('x');
  REQUIRE(equals == text.size() - 3);
  REQUIRE(unknown < equals);
  Tokens solutions;
  for (char digit = '0'; digit < '5'; ++digit) {
    std::string left = text.substr(0, equals);
    left[unknown] = digit;
    if (Calculator(5).value(left) == text[equals + 1] - '0') solutions.push_back(1 + digit - '0');
  }
  return solutions;  // one alone is the answer
}

/// What stands before the last token, which must be `marker`.
Tokens before(const Tokens& content, int64_t marker) {
  REQUIRE(content.back() == marker);
  REQUIRE(std::count(content.begin(), content.end(), marker) == 1);
  return {content.begin(), content.end() - 1};
}

Tokens solve_stack(const Tokens& content) {
  std::string stack;
  bool began = false;
  for (const int64_t token : before(content, 10)) {
    if (token <= 4) {
      REQUIRE_FALSE(began);  // the initial stack comes first
      stack += static_cast<char>(token);
      continue;
    }
    began = true;
    if (token == 9) {
      REQUIRE_FALSE(stack.empty());
      stack.erase(stack.size() - 1);
    } else {
      stack += static_cast<char>(token - 4);
    }
  }
  return {stack.begin(), stack.end()};
}

Tokens solve_missing(const Tokens& content) {
  const size_t half = content.size() / 2;
  REQUIRE(content.size() == 2 * half);
  Tokens answer;
  for (size_t i = 0; i < half; ++i) {
    if (content[half + i] == 10) {
      answer.push_back(content[i]);
    } else {
      REQUIRE(content[i] == content[half + i]);
    }
  }
  return answer;
}

Tokens solve_odds_first(const Tokens& content) {
  const Tokens w = before(content, 11);
  Tokens answer(w.size());
  for (size_t i = 0; i < w.size(); ++i)
    answer[i % 2 == 0 ? i / 2 : (w.size() + 1) / 2 + i / 2] = w[i];
  return answer;
}

/// Smallest token with the largest count, and that count.
std::pair<int64_t, int64_t> most_frequent(Tokens w) {
  std::sort(w.begin(), w.end());
  std::pair<int64_t, int64_t> best{0, 0};
  for (size_t i = 0; i < w.size();) {
    size_t end = i;
    while (end < w.size() && w[end] == w[i]) ++end;
    if (static_cast<int64_t>(end - i) > best.second) best = {w[i], static_cast<int64_t>(end - i)};
    i = end;
  }
  return best;
}

Tokens solve(const std::string& name, const Tokens& content) {
  if (name == "parity") {
    int64_t answer = 1;
    for (const int64_t token : content) answer = token == 2 ? 3 - answer : answer;
    return {answer};
  }
  if (name == "even_pairs") {
    int changes = 0;
    for (size_t i = 1; i < content.size(); ++i) changes += content[i] != content[i - 1];
    return {changes % 2 == 0 ? 1 : 2};
  }
  if (name == "cycle_nav") {
    int64_t forward = std::count(content.begin(), content.end(), 1),
            back = std::count(content.begin(), content.end(), 2);
    return {4 + ((forward - back) % 5 + 5) % 5};
  }
  if (name == "mod_arithmetic") return solve_arithmetic(content, 5, "+-*=");
  if (name == "mod_arithmetic_brackets") return solve_arithmetic(content, 5, "+-*()=");
  if (name == "solve_equation") return solve_equation(content);
  if (name == "reverse_string") {
    Tokens w = before(content, 11);
    std::reverse(w.begin(), w.end());
    return w;
  }
  if (name == "stack_manipulation") return solve_stack(content);
  if (name == "bucket_sort") {
    const std::multiset<int64_t> sorted(content.begin(), content.end());
    return {sorted.begin(), sorted.end()};
  }
  if (name == "missing_duplicate") return solve_missing(content);
  if (name == "odds_first") return solve_odds_first(content);
  if (name == "repetition") return before(content, 11);
  if (name == "set") {
    Tokens answer;
    std::set<int64_t> seen;
    for (const int64_t token : before(content, 127))
      if (seen.insert(token).second) answer.push_back(token);
    return answer;
  }
  if (name == "majority") return {most_frequent(content).first};
  REQUIRE(name == "majority_count");
  return {std::min<int64_t>(most_frequent(content).second, 63)};
}

TaskOptions named(const std::string& name) {
  TaskOptions options;
  options.name = name;
  return options;
}

std::string hash(const Batch& batch) {
  std::string text;
  for (const auto* numbers : {&batch.input, &batch.target})
    for (const int64_t x : *numbers) text += std::to_string(x) + " ";
  for (const auto* numbers : {&batch.features, &batch.values})
    for (const float x : *numbers) text += std::to_string(std::bit_cast<uint32_t>(x)) + " ";
  return xlstm::sha256_hex(text).substr(0, 16);
}

}  // namespace

TEST_CASE("formal languages: every answer is the solver's, every length is used", "[tasks]") {
  for (const std::string& name : task_names()) {
    const auto task = make_formal_language(named(name));
    if (task == nullptr) continue;
    CAPTURE(name);
    std::map<size_t, int64_t> lengths;
    std::map<int64_t, int64_t> answers;
    for (uint64_t i = 0; i < 10000; ++i) {
      Random random(5, 0, i);
      const int64_t length = random.between(task->shortest(), 40);
      const TaskSample sample = task->sample(random, length);
      const Asked question = asked(sample);
      REQUIRE(question.answer == solve(name, question.content));
      const size_t tokens = question.content.size() + question.answer.size();
      REQUIRE(tokens <= static_cast<size_t>(length));
      for (const int64_t token : question.content) REQUIRE(token < task->vocab_size());
      for (const int64_t token : question.answer) ++answers[token];
      ++lengths[tokens];
    }
    CHECK(lengths.rbegin()->first >= 39);
    CHECK(lengths.begin()->first <= static_cast<size_t>(task->shortest()) + 1);
    CHECK(answers.size() >= 2);
  }
}

TEST_CASE("formal languages: chances are the paper's", "[tasks]") {
  const std::map<std::string, double> chances = {{"parity", 0.5},
                                                 {"even_pairs", 0.5},
                                                 {"cycle_nav", 1.0 / 5},
                                                 {"mod_arithmetic", 1.0 / 5},
                                                 {"mod_arithmetic_brackets", 1.0 / 5},
                                                 {"solve_equation", 1.0 / 5},
                                                 {"reverse_string", 1.0 / 10},
                                                 {"stack_manipulation", 1.0 / 4},
                                                 {"bucket_sort", 1.0 / 10},
                                                 {"missing_duplicate", 1.0 / 9},
                                                 {"odds_first", 1.0 / 10},
                                                 {"repetition", 1.0 / 10},
                                                 {"set", 1.0 / 126},
                                                 {"majority", 1.0 / 63},
                                                 {"majority_count", 1.0 / 63}};
  for (const auto& [name, chance] : chances) CHECK(make_task(named(name))->chance() == chance);
}

TEST_CASE("mqar: pairs, then every key once, answered by its value", "[tasks]") {
  TaskOptions options = named("mqar");
  options.key_values = 8, options.vocab_size = 512;
  const auto task = make_task(options);
  for (uint64_t i = 0; i < 2000; ++i) {
    Random random(1, 0, i);
    const TaskSample sample = task->sample(random, 64);
    REQUIRE(sample.input.size() == 64);
    std::map<int64_t, int64_t> value;
    std::set<int64_t> values;
    for (size_t pair = 0; pair < 8; ++pair) {
      const int64_t key = sample.input[2 * pair];
      REQUIRE((key >= 1 && key < 256));
      value[key] = sample.input[2 * pair + 1];
      REQUIRE((value[key] >= 256 && value[key] < 512));
      values.insert(value[key]);
    }
    REQUIRE((value.size() == 8 && values.size() == 8));
    for (size_t t = 0; t < 64; ++t) {
      const bool query = t >= 16 && sample.input[t] != 0;
      REQUIRE(sample.target[t] == (query ? value.at(sample.input[t]) : kIgnored));
      REQUIRE((!query || t % 2 == 0));
      if (query) value.erase(sample.input[t]);
    }
    REQUIRE(value.empty());
  }
}

TEST_CASE("mqar: random tokens stand where nothing is asked", "[tasks]") {
  TaskOptions options = named("mqar");
  options.vocab_size = 64;
  const auto zeros = make_task(options);
  options.random_non_queries = true;
  const auto filled = make_task(options);
  std::vector<int> counts(64);
  int places = 0;
  for (uint64_t i = 0; i < 2000; ++i) {
    Random random(1, 0, i), same(1, 0, i);
    const TaskSample plain = zeros->sample(random, 64), sample = filled->sample(same, 64);
    REQUIRE(sample.target == plain.target);
    for (size_t t = 0; t < 64; ++t) {
      if (plain.input[t] != 0) {
        REQUIRE(sample.input[t] == plain.input[t]);
      } else {
        ++counts[static_cast<size_t>(sample.input[t])];
        ++places;
      }
    }
  }
  // Chi-square with 63 degrees of freedom; 103 is passed once in 1000.
  double chi = 0;
  for (const int count : counts) chi += std::pow(count - places / 64.0, 2) / (places / 64.0);
  CAPTURE(chi);
  CHECK(chi < 103);
}

TEST_CASE("mqar: distances of the queries follow the power law, without replacement", "[tasks]") {
  constexpr int kSpace = 12, kPairs = 4, kSamples = 20000;
  TaskOptions options = named("mqar");
  options.key_values = kPairs, options.vocab_size = 64;
  const auto task = make_task(options);
  // By the definition: draws with p(i) ~ i^(0.01 - 1), a place that is taken is drawn again. Of every key by its rank,
  // since the first ones take the near places.
  std::mt19937 engine(7);
  std::vector<double> weights;
  for (int i = 1; i <= kSpace; ++i) weights.push_back(0.01 * std::pow(i, 0.01 - 1));
  std::discrete_distribution<int> draw(weights.begin(), weights.end());
  double wanted[kPairs][kSpace] = {}, got[kPairs][kSpace] = {};
  for (uint64_t i = 0; i < kSamples; ++i) {
    std::vector<int> taken;
    while (taken.size() < kPairs) {
      const int place = draw(engine);
      if (std::find(taken.begin(), taken.end(), place) != taken.end()) continue;
      ++wanted[taken.size()][place];
      taken.push_back(place);
    }
    Random random(3, 0, i);
    const TaskSample sample = task->sample(random, 2 * (kSpace + kPairs));
    for (int pair = 0; pair < kPairs; ++pair)
      for (int place = 0; place < kSpace; ++place)
        got[pair][place] += sample.input[static_cast<size_t>(2 * (kPairs + place))] ==
                            sample.input[static_cast<size_t>(2 * pair)];
  }
  // Two samples of counts from one distribution: chi-square with 11 degrees of freedom; 31.3 is passed once in 1000.
  for (int pair = 0; pair < kPairs; ++pair) {
    double chi = 0;
    for (int place = 0; place < kSpace; ++place)
      chi += std::pow(got[pair][place] - wanted[pair][place], 2) /
             std::max(1.0, got[pair][place] + wanted[pair][place]);
    CAPTURE(pair, chi);
    CHECK(chi < 31.3);
  }
}

TEST_CASE("tasks: recorded samples, the same for every platform and every cut into batches",
          "[tasks]") {
  const std::map<std::string, std::string> recorded = {
      {"parity", "0e3ecca2297f0290"},
      {"even_pairs", "c222d3f3c949a559"},
      {"cycle_nav", "f0a435f9f9b12b58"},
      {"mod_arithmetic", "3744671bc4ea147e"},
      {"mod_arithmetic_brackets", "ae4fb5c4735aa928"},
      {"solve_equation", "45972a49b6642856"},
      {"reverse_string", "45d81843876cace9"},
      {"stack_manipulation", "17464fdaa8bfa20d"},
      {"bucket_sort", "941ae8a2fee0115b"},
      {"missing_duplicate", "ba34803ceb1156ef"},
      {"odds_first", "51e17d2a58769e79"},
      {"repetition", "5d016fbd9045b231"},
      {"set", "0ef6086a993e65f6"},
      {"majority", "bcf7b366a6caf25a"},
      {"majority_count", "e70dbc2419d2e53a"},
      {"mqar", "7afdeb8b60c28748"},
      {"nns", "7de921d1f642f190"},
  };
  for (const auto& [name, samples] : recorded) {
    CAPTURE(name);
    const bool real = name == "nns";
    const auto data = make_task_data(named(name), 40, 1234, true, real ? 1 : 8192, real ? 3 : 0);
    const Batch all = data.train->batch(0, 64);
    CHECK(hash(all) == samples);
    const Batch part = data.train->batch(17, 3);
    for (size_t i = 0; i < part.input.size(); ++i) {
      REQUIRE(part.input[i] == all.input[17 * 40 + i]);
      REQUIRE(part.target[i] == all.target[17 * 40 + i]);
    }
    CHECK(hash(data.held_out->batch(0, 64)) != hash(all));
  }
}

TEST_CASE("nns: the value of the nearest vector so far", "[tasks]") {
  const auto task = make_task(named("nns"));
  for (uint64_t i = 0; i < 2000; ++i) {
    Random random(9, 0, i);
    const int64_t length = random.between(2, 64);
    const TaskSample sample = task->sample(random, length);
    REQUIRE(sample.features.size() == static_cast<size_t>(3 * length));
    REQUIRE(sample.values.size() == static_cast<size_t>(length));
    REQUIRE((std::isnan(sample.values[0]) && sample.features[2] == 0));
    const auto at = [&](int64_t t) { return &sample.features[static_cast<size_t>(3 * t)]; };
    double nearest = 10;
    float value = 0;
    for (int64_t t = 0; t < length; ++t) {
      REQUIRE(std::hypot(at(t)[0], at(t)[1]) == Approx(1).epsilon(1e-6));
      REQUIRE((at(t)[2] >= 0 && at(t)[2] < 1));
      if (t == 0) continue;
      const double distance = std::hypot(at(t)[0] - at(0)[0], at(t)[1] - at(0)[1]);
      if (distance < nearest) nearest = distance, value = at(t)[2];
      REQUIRE(sample.values[static_cast<size_t>(t)] == value);
    }
  }
}

TEST_CASE("tasks: a finite training set comes whole and in a new order each epoch", "[tasks]") {
  TaskOptions options = named("parity");
  options.train_samples = 50, options.min_len = 30;
  const auto data = make_task_data(options, 40, 1, true, 3);
  CHECK(data.train->samples_per_epoch() == 50);
  const auto rows = [&](int64_t epoch) {
    std::vector<Tokens> all;
    for (int64_t i = 0; i < 50; ++i) all.push_back(data.train->batch(50 * epoch + i, 1).input);
    return all;
  };
  auto first = rows(0), second = rows(1);
  CHECK(first != second);
  std::sort(first.begin(), first.end());
  std::sort(second.begin(), second.end());
  CHECK(first == second);
}

TEST_CASE("tasks: settings that do not fit are named", "[tasks]") {
  const auto error = [](const TaskOptions& options, int64_t seq_len, int64_t vocab) {
    return error_of([&] { make_task_data(options, seq_len, 1, true, vocab); },
                    xlstm::ExitCode::kConfig);
  };
  CHECK(contains(error(named("parity"), 40, 2), "model.vocab_size is 2, expected at least 3"));
  TaskOptions options = named("cycle_nav");
  options.vocab_size = 5;
  CHECK(contains(error(options, 40, 100), "data.task.vocab_size is 5, expected at least 6"));
  options = named("solve_equation");
  options.min_len = 3;
  CHECK(contains(error(options, 40, 14), "data.task.min_len is 3, expected at least 5"));
  options.min_len = 41;
  CHECK(contains(error(options, 40, 14), "data.seq_len is 40, expected at least"));
  options.min_len = 5, options.eval_min_len = 50;
  CHECK(contains(error(options, 40, 14), "data.task.eval_len is 40, expected at least"));
  CHECK(contains(error(named("nns"), 40, 1), "model.input_features is 0, expected 3"));
  CHECK(contains(
      error_of([] { make_task_data(named("nns"), 40, 1, true, 10, 3); }, xlstm::ExitCode::kConfig),
      "model.vocab_size is 10, expected 1 for data.task nns"));
  options = named("parity");
  options.path = "x";
  CHECK(
      contains(error(options, 40, 3), "data.task.path is x, but data.task parity reads no files"));
  CHECK(contains(error(named("image"), 1024, 256), "data.task.path is empty, expected the folder"));
  options = named("mqar");
  options.key_values = 11;
  CHECK(contains(error(options, 40, 8192), "data.seq_len is 40, expected at least 44"));
  options.vocab_size = 20;
  CHECK(contains(error(options, 64, 8192), "data.task.key_values is 11, expected 1 to 9"));
}
