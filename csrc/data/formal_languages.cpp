// The formal languages of arXiv 2405.04517, B.1.1. A sample is a content, then the answer's tokens; the model reads the
// content with padding in the answer's place and predicts each token of the answer one position before it.
#include <algorithm>
#include <array>
#include <map>
#include <string_view>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/modular_expressions.h"
#include "csrc/data/task.h"

namespace xlstm::data {
namespace {

using Tokens = std::vector<int64_t>;

struct Sequence {
  Tokens content, answer;
};

/// `count` tokens of [1, symbols].
Tokens word(Random& random, int64_t count, int64_t symbols) {
  Tokens w(static_cast<size_t>(count));
  for (int64_t& token : w) token = random.between(1, symbols);
  return w;
}

Tokens joined(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// 1 for an even number of 2s, else 2.
Sequence parity(Random& random, int64_t size, int64_t) {
  Tokens w = word(random, size - 1, 2);
  const auto twos = std::count(w.begin(), w.end(), 2);
  return {std::move(w), {twos % 2 == 0 ? 1 : 2}};
}

/// 1 where the first token is the last one, that is, where "12" and "21" together occur an even number of times.
Sequence even_pairs(Random& random, int64_t size, int64_t) {
  Tokens w = word(random, size - 1, 2);
  const int64_t answer = w.front() == w.back() ? 1 : 2;
  return {std::move(w), {answer}};
}

/// Moves 1: forward, 2: back, 3: stay on a cycle of vocab - 4 places, which are the tokens from 4 on.
Sequence cycle_nav(Random& random, int64_t size, int64_t vocab) {
  const int64_t places = vocab - 4;
  Tokens w = word(random, size - 1, 3);
  int64_t place = 0;
  for (const int64_t move : w) place += move == 1 ? 1 : move == 2 ? places - 1 : 0;
  return {std::move(w), {4 + place % places}};
}

/// Digits with + - * between them, "=", the value modulo vocab - 5; products bind closer.
Sequence mod_arithmetic(Random& random, int64_t size, int64_t vocab) {
  const ModularTokens tokens(vocab - 5);
  Tokens w;
  for (int64_t i = 0; i < (size - 1) / 2; ++i) {
    if (i > 0) w.push_back(tokens.plus() + random.below(3));
    w.push_back(tokens.digit(random.below(tokens.modulus())));
  }
  const int64_t value = *modular_value(w, tokens);
  w.push_back(tokens.times() + 1);
  return {std::move(w), {tokens.digit(value)}};
}

/// A bracketed expression, "=", its value modulo vocab - 7.
Sequence mod_arithmetic_brackets(Random& random, int64_t size, int64_t vocab) {
  const ModularTokens tokens(vocab - 7);
  Tokens w = modular_expression(random, size - 2, tokens);
  const int64_t value = *modular_value(w, tokens);
  w.push_back(tokens.close() + 1);
  return {std::move(w), {tokens.digit(value)}};
}

/// A bracketed expression with one digit replaced by x, "=", its value modulo vocab - 9, ACT; asks for x. Only equations
/// with one solution.
Sequence solve_equation(Random& random, int64_t size, int64_t vocab) {
  const ModularTokens tokens(vocab - 9);
  const int64_t unknown = tokens.close() + 1, equals = unknown + 1, act = unknown + 2;
  for (;;) {
    Tokens w = modular_expression(random, size - 4, tokens);
    const auto length = static_cast<int64_t>(w.size());
    const int64_t start = random.below(length);
    for (int64_t i = 0; i < length; ++i) {
      const auto at = static_cast<size_t>((start + i) % length);
      if (w[at] > tokens.modulus() || !has_one_solution(w, at, tokens)) continue;
      const int64_t answer = w[at], value = *modular_value(w, tokens);
      w[at] = unknown;
      return {joined(std::move(w), {equals, tokens.digit(value), act}), {answer}};
    }
  }
}

Sequence reverse_string(Random& random, int64_t size, int64_t vocab) {
  Tokens w = word(random, (size - 1) / 2, vocab - 2);
  Tokens answer(w.rbegin(), w.rend());
  return {joined(std::move(w), {vocab - 1}), std::move(answer)};
}

/// Symbols 1..k, k = (vocab - 3) / 2; k + i pushes symbol i, 2k + 1 pops, 2k + 2 asks for the stack from the bottom up. The
/// last symbol is never popped, so that there is an answer. A push takes two tokens, its own and that of the answer, a pop as
/// many as it saves: whatever is popped, the sample is as long as wanted.
Sequence stack_manipulation(Random& random, int64_t size, int64_t vocab) {
  const int64_t symbols = (vocab - 3) / 2, pop = 2 * symbols + 1, most = (size - 1) / 2;
  Tokens stack = word(random, random.between(1, most), symbols);
  Tokens content = stack;
  int64_t pushes = most - static_cast<int64_t>(stack.size()), pops = random.below(most);
  while (pushes + pops > 0) {
    if (stack.size() == 1 || random.below(pushes + pops) < pushes) {
      stack.push_back(random.between(1, symbols));
      content.push_back(symbols + stack.back());
      --pushes;
    } else {
      content.push_back(pop);
      stack.pop_back();
      --pops;
    }
  }
  return {joined(std::move(content), {pop + 1}), std::move(stack)};
}

Sequence bucket_sort(Random& random, int64_t size, int64_t vocab) {
  Tokens w = word(random, size / 2, vocab - 1);
  Tokens answer = w;
  std::sort(answer.begin(), answer.end());
  return {std::move(w), std::move(answer)};
}

/// A word twice, with one token of the second replaced by MIS.
Sequence missing_duplicate(Random& random, int64_t size, int64_t vocab) {
  const Tokens w = word(random, (size - 1) / 2, vocab - 2);
  Tokens content = joined(w, w);
  const auto missing = static_cast<size_t>(random.below(static_cast<int64_t>(w.size())));
  content[w.size() + missing] = vocab - 1;
  return {std::move(content), {w[missing]}};
}

/// The first, third, ... token, then the second, fourth, ...
Sequence odds_first(Random& random, int64_t size, int64_t vocab) {
  Tokens w = word(random, (size - 1) / 2, vocab - 2), answer;
  for (size_t first : {size_t{0}, size_t{1}})
    for (size_t i = first; i < w.size(); i += 2) answer.push_back(w[i]);
  return {joined(std::move(w), {vocab - 1}), std::move(answer)};
}

Sequence repetition(Random& random, int64_t size, int64_t vocab) {
  Tokens w = word(random, (size - 1) / 2, vocab - 2), answer = w;
  return {joined(std::move(w), {vocab - 1}), std::move(answer)};
}

/// Every token once, in the order of first occurrence. Tokens are drawn until there is no room for the next one.
Sequence set(Random& random, int64_t size, int64_t vocab) {
  Tokens w, answer;
  for (int64_t room = size - 1;;) {  // without ACT
    const int64_t token = random.between(1, vocab - 2);
    const bool is_new = std::find(answer.begin(), answer.end(), token) == answer.end();
    room -= is_new ? 2 : 1;
    if (room < 0) return {joined(std::move(w), {vocab - 1}), std::move(answer)};
    w.push_back(token);
    if (is_new) answer.push_back(token);
  }
}

struct Most {
  int64_t token = 0, count = 0;
};
/// The most frequent token, the smallest of several.
Most most_frequent(const Tokens& w) {
  std::map<int64_t, int64_t> counts;
  for (const int64_t token : w) ++counts[token];
  Most most;
  for (const auto& [token, count] : counts)
    if (count > most.count) most = {token, count};
  return most;
}

Sequence majority(Random& random, int64_t size, int64_t vocab) {
  Tokens w = word(random, size - 1, vocab - 1);
  const int64_t answer = most_frequent(w).token;
  return {std::move(w), {answer}};
}

/// How often the most frequent token occurs, at most the highest token.
Sequence majority_count(Random& random, int64_t size, int64_t vocab) {
  Tokens w = word(random, size - 1, vocab - 1);
  const int64_t answer = std::min(most_frequent(w).count, vocab - 1);
  return {std::move(w), {answer}};
}

struct Language {
  std::string_view name;
  int64_t vocab;           ///< the paper's
  int64_t smallest_vocab;  ///< with which there is something to answer
  int64_t shortest;        ///< tokens of the shortest sample
  double (*chance)(int64_t vocab);
  Sequence (*make)(Random& random, int64_t size, int64_t vocab);
};

double one_of(int64_t answers) { return 1 / static_cast<double>(answers); }
template <int64_t kOthers>
double all_but(int64_t vocab) {
  return one_of(vocab - kOthers);
}

const std::array<Language, 15> kLanguages = {{
    {"parity", 3, 3, 2, all_but<1>, parity},
    {"even_pairs", 3, 3, 2, all_but<1>, even_pairs},
    {"cycle_nav", 9, 6, 2, all_but<4>, cycle_nav},
    {"mod_arithmetic", 10, 7, 3, all_but<5>, mod_arithmetic},
    {"mod_arithmetic_brackets", 12, 9, 3, all_but<7>, mod_arithmetic_brackets},
    {"solve_equation", 14, 11, 5, all_but<9>, solve_equation},
    {"reverse_string", 12, 4, 3, all_but<2>, reverse_string},
    {"stack_manipulation", 11, 7, 3, [](int64_t vocab) { return one_of((vocab - 3) / 2); },
     stack_manipulation},
    {"bucket_sort", 11, 3, 2, all_but<1>, bucket_sort},
    {"missing_duplicate", 11, 4, 3, all_but<2>, missing_duplicate},
    {"odds_first", 12, 4, 3, all_but<2>, odds_first},
    {"repetition", 12, 4, 3, all_but<2>, repetition},
    {"set", 128, 4, 3, all_but<2>, set},
    {"majority", 64, 3, 2, all_but<1>, majority},
    {"majority_count", 64, 3, 2, all_but<1>, majority_count},
}};

class FormalLanguage final : public Task {
 public:
  FormalLanguage(const Language& language, int64_t vocab) : language_(language), vocab_(vocab) {
    if (vocab_ < language_.smallest_vocab)
      throw Error(ExitCode::kConfig, "data.task.vocab_size is " + std::to_string(vocab_) +
                                         ", expected at least " +
                                         std::to_string(language_.smallest_vocab) + " for " +
                                         std::string(language_.name));
  }
  int64_t vocab_size() const override { return vocab_; }
  double chance() const override { return language_.chance(vocab_); }
  int64_t shortest() const override { return language_.shortest; }
  bool varies() const override { return true; }

  TaskSample sample(Random& random, int64_t length) const override {
    const Sequence s = language_.make(random, length, vocab_);
    TaskSample result{s.content, Tokens(s.content.size() - 1, kIgnored)};
    result.input.resize(s.content.size() + s.answer.size() - 1, 0);
    result.target = joined(std::move(result.target), s.answer);
    return result;
  }

 private:
  const Language& language_;
  int64_t vocab_;
};

}  // namespace

std::unique_ptr<Task> make_formal_language(const TaskOptions& options) {
  for (const Language& language : kLanguages)
    if (language.name == options.name)
      return std::make_unique<FormalLanguage>(
          language, options.vocab_size > 0 ? options.vocab_size : language.vocab);
  return nullptr;
}

}  // namespace xlstm::data
