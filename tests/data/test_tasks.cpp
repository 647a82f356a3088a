// The synthetic tasks: every answer against a solver that knows the definition alone, the numbers themselves against
// recorded ones, drawn one after the other and by several threads at once.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <thread>

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

/// Bit by bit, so that NaN equals itself.
bool same_bytes(const Batch& a, const Batch& b) {
  const auto same = [](const auto& x, const auto& y) {
    return x.size() == y.size() &&
           (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0);
  };
  return a.num_targets == b.num_targets && same(a.input, b.input) && same(a.target, b.target) &&
         same(a.reset, b.reset) && same(a.features, b.features) && same(a.values, b.values);
}

}  // namespace

TEST_CASE("formal languages: every answer is the solver's, every sample fills its length",
          "[tasks]") {
  for (const std::string& name : task_names()) {
    const auto task = make_formal_language(named(name));
    if (task == nullptr) continue;
    CAPTURE(name);
    std::map<int64_t, int64_t> answers;
    for (uint64_t i = 0; i < 10000; ++i) {
      Random random(5, 0, i);
      const int64_t length = random.between(task->shortest(), 40);
      const TaskSample sample = task->sample(random, length);
      const Asked question = asked(sample);
      REQUIRE(question.answer == solve(name, question.content));
      const auto tokens = static_cast<int64_t>(question.content.size() + question.answer.size());
      REQUIRE(tokens <= length);
      REQUIRE(tokens >= length - 1);
      for (const int64_t token : question.content) REQUIRE(token < task->vocab_size());
      for (const int64_t token : question.answer) ++answers[token];
    }
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
      {"stack_manipulation", "573095b3fe919ede"},
      {"bucket_sort", "941ae8a2fee0115b"},
      {"missing_duplicate", "ba34803ceb1156ef"},
      {"odds_first", "51e17d2a58769e79"},
      {"repetition", "5d016fbd9045b231"},
      {"set", "1c8d23c3a428d9e6"},
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

TEST_CASE("tasks: four threads that draw all of them at once get the same bytes", "[tasks]") {
  std::vector<std::string> names;
  for (const std::string& name : task_names())
    if (!reads_files(named(name))) names.push_back(name);
  const auto make = [](const std::string& name) {
    TaskOptions options = named(name);
    if (name == "listops") options.min_len = 5, options.max_depth = 4;
    const bool real = name == "nns";
    return make_task_data(options, 40, 77, true, real ? 1 : 8192, real ? 3 : 0);
  };
  constexpr size_t kThreads = 4;
  std::vector<TaskData> shared;
  for (const std::string& name : names) shared.push_back(make(name));
  struct Drawn {
    Batch train, held_out;
  };
  // The threads meet at every task; nothing is drawn before them, so that they also meet whatever is made on first use.
  std::vector<std::vector<Drawn>> drawn(kThreads, std::vector<Drawn>(names.size()));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      for (size_t task = 0; task < names.size(); ++task)
        drawn[i][task] = {shared[task].train->batch(0, 64), shared[task].held_out->batch(0, 64)};
    });
  for (std::thread& thread : threads) thread.join();
  for (size_t task = 0; task < names.size(); ++task) {
    CAPTURE(names[task]);
    const TaskData alone = make(names[task]);
    const Batch train = alone.train->batch(0, 64), held_out = alone.held_out->batch(0, 64);
    CHECK((train.num_targets > 0 && !same_bytes(train, held_out)));
    for (size_t i = 0; i < kThreads; ++i) {
      CHECK(same_bytes(drawn[i][task].train, train));
      CHECK(same_bytes(drawn[i][task].held_out, held_out));
    }
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

TEST_CASE("tasks: the fingerprint covers all that samples depend on", "[tasks]") {
  std::set<std::string> fingerprints;
  size_t count = 0;
  const auto add = [&](const char* name, const std::function<void(TaskOptions&)>& change = {},
                       int64_t seq_len = 64, uint64_t seed = 1, bool shuffle = true) {
    TaskOptions options = named(name);
    if (change) change(options);
    fingerprints.insert(
        make_task_data(options, seq_len, seed, shuffle, 10000).train->fingerprint());
    ++count;
  };
  add("parity"), add("majority"), add("parity", {}, 65), add("parity", {}, 64, 2);
  add("parity", [](TaskOptions& o) { o.min_len = 9; });
  add("parity", [](TaskOptions& o) { o.train_samples = 50; });
  add(
      "parity", [](TaskOptions& o) { o.train_samples = 50; }, 64, 1, false);
  add("cycle_nav"), add("cycle_nav", [](TaskOptions& o) { o.vocab_size = 12; });
  add("mqar"), add("mqar", [](TaskOptions& o) { o.key_values = 5; });
  add("mqar", [](TaskOptions& o) { o.random_non_queries = true; });
  const auto shorter = [](auto change) {
    return [change](TaskOptions& o) { o.min_len = 20, change(o); };
  };
  add("listops", shorter([](TaskOptions&) {}));
  add("listops", shorter([](TaskOptions& o) { o.max_depth = 9; }));
  add("listops", shorter([](TaskOptions& o) { o.max_args = 9; }));
  CHECK(fingerprints.size() == count);
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
