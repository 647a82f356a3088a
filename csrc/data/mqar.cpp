// Multi-query associative recall, as the generator of Zoology (arXiv 2312.04927) defines it: K pairs of key and value,
// then, at even distances that follow a power law, the keys again, each to be answered by its value.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/task.h"

namespace xlstm::data {
namespace {

constexpr int64_t kDefaultVocab = 8192;
/// Query distance i (from 1, in pairs of tokens) has probability ~ i^(kPower - 1).
constexpr double kPower = 0.01;

/// `count` different numbers of [low, high), in random order. Few of them are wanted, so that doubles are rare.
std::vector<int64_t> different(Random& random, int64_t count, int64_t low, int64_t high) {
  std::vector<int64_t> chosen;
  while (static_cast<int64_t>(chosen.size()) < count) {
    const int64_t x = random.between(low, high - 1);
    if (std::find(chosen.begin(), chosen.end(), x) == chosen.end()) chosen.push_back(x);
  }
  return chosen;
}

/// Draws of indices with integer weights, each index once.
class Urn {
 public:
  /// Weights are rounded to whole numbers, so that no platform's pow() can change a draw.
  explicit Urn(int64_t size) : weights_(static_cast<size_t>(size)) {
    for (size_t i = 0; i < weights_.size(); ++i)
      weights_[i] = std::llround(std::pow(static_cast<double>(i + 1), kPower - 1) * (1 << 24));
    left_ = std::accumulate(weights_.begin(), weights_.end(), int64_t{0});
  }
  int64_t draw(Random& random) {
    int64_t rest = random.below(left_);
    size_t i = 0;
    while (rest >= weights_[i]) rest -= weights_[i++];
    left_ -= weights_[i];
    weights_[i] = 0;
    return static_cast<int64_t>(i);
  }

 private:
  std::vector<int64_t> weights_;
  int64_t left_ = 0;
};

class Mqar final : public Task {
 public:
  explicit Mqar(const TaskOptions& options)
      : vocab_(options.vocab_size > 0 ? options.vocab_size : kDefaultVocab),
        pairs_(options.key_values),
        random_non_queries_(options.random_non_queries) {
    if (pairs_ > vocab_ / 2 - 1 || pairs_ < 1)
      throw Error(ExitCode::kConfig, "data.task.key_values is " + std::to_string(pairs_) +
                                         ", expected 1 to " + std::to_string(vocab_ / 2 - 1) +
                                         " with a vocabulary of " + std::to_string(vocab_));
  }
  int64_t vocab_size() const override { return vocab_; }
  double chance() const override { return 0; }
  int64_t shortest() const override { return 4 * pairs_; }
  bool varies() const override { return false; }

  TaskSample sample(Random& random, int64_t length) const override {
    const int64_t even = length / 2 * 2, context = 2 * pairs_;
    TaskSample s{std::vector<int64_t>(static_cast<size_t>(even), 0),
                 std::vector<int64_t>(static_cast<size_t>(even), kIgnored)};
    const std::vector<int64_t> keys = different(random, pairs_, 1, vocab_ / 2),
                               values = different(random, pairs_, vocab_ / 2, vocab_);
    Urn distances((even - context) / 2);
    for (int64_t i = 0; i < pairs_; ++i) {
      const auto pair = static_cast<size_t>(i);
      const auto query = static_cast<size_t>(context + 2 * distances.draw(random));
      s.input[2 * pair] = s.input[query] = keys[pair];
      s.input[2 * pair + 1] = s.target[query] = values[pair];
    }
    if (random_non_queries_)
      for (int64_t& token : s.input)
        if (token == 0) token = random.between(0, vocab_ - 1);
    return s;
  }

 private:
  int64_t vocab_, pairs_;
  bool random_non_queries_;
};

}  // namespace

std::unique_ptr<Task> make_mqar(const TaskOptions& options) {
  return std::make_unique<Mqar>(options);
}

}  // namespace xlstm::data
