// ListOps of the Long Range Arena (arXiv 2011.04006, from arXiv 1804.06028): an expression of operators over lists of digits,
// each [MIN, [MAX, [MED or [SM (sum modulo 10), its arguments and ]; asked at the last ] is the value. Sizes follow the
// Arena's generator: a node above max_depth is an operator once in four times, has 2 to max_args arguments, and expressions
// whose length is out of bounds are drawn again.
#include <algorithm>
#include <numeric>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/task.h"

namespace xlstm::data {
namespace {

/// Tokens: digit d is 1 + d, then the operators, then the closing bracket.
enum Token : int64_t { kZero = 1, kMin = 11, kMax, kMed, kSumMod, kClose, kVocab };
constexpr int64_t kOperators = kSumMod - kMin + 1;
/// The Arena's expressions have more than 500 tokens; and there is an answer.
constexpr int64_t kArenaMinLength = 502;
/// Tokens drawn for a sample before its bounds count as unreachable: seconds, where the Arena's take a millisecond.
constexpr int64_t kMostTokens = int64_t{1} << 28;

int64_t applied(int64_t operation, std::vector<int64_t>& values) {
  const size_t half = values.size() / 2;
  switch (operation) {
    case kMin:
      return *std::min_element(values.begin(), values.end());
    case kMax:
      return *std::max_element(values.begin(), values.end());
    case kMed:  // of an even number the mean of both in the middle, rounded down
      std::sort(values.begin(), values.end());
      return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
    default:
      return std::accumulate(values.begin(), values.end(), int64_t{0}) % 10;
  }
}

class ListOperations final : public Task {
 public:
  explicit ListOperations(const TaskOptions& options)
      : max_depth_(options.max_depth), max_args_(options.max_args) {
    if (options.vocab_size != 0 && options.vocab_size != kVocab)
      throw Error(ExitCode::kConfig, "data.task.vocab_size is " +
                                         std::to_string(options.vocab_size) + ", expected 0 or " +
                                         std::to_string(kVocab) + " for listops");
  }
  int64_t vocab_size() const override { return kVocab; }
  double chance() const override { return 0.1; }
  /// An operator, two digits, the bracket, the answer.
  int64_t shortest() const override { return 5; }
  int64_t longest() const override {
    int64_t length = 1;
    for (int64_t depth = 1; depth < max_depth_ && length < kMostTokens; ++depth)
      length = 2 + max_args_ * length;
    return length + 1;
  }
  int64_t usual_min_len() const override { return kArenaMinLength; }
  bool varies() const override { return true; }
  std::string mark() const override {
    return " depth=" + std::to_string(max_depth_) + " arguments=" + std::to_string(max_args_);
  }

  TaskSample sample(Random& random, int64_t length) const override {
    return sample_between(random, {shortest(), length});
  }

  TaskSample sample_between(Random& random, const TaskLengths& lengths) const override {
    TaskSample s;
    for (int64_t drawn = 0; drawn < kMostTokens; drawn += std::ssize(s.input)) {
      s.input.clear();
      const int64_t value = append_operation(random, 1, lengths.max_len - 1, s.input);
      const auto length = static_cast<int64_t>(s.input.size()) + 1;
      if (length < lengths.min_len || length > lengths.max_len) continue;
      s.target.assign(s.input.size(), kIgnored);
      s.target.back() = kZero + value;
      return s;
    }
    throw Error(ExitCode::kConfig,
                "data.task listops: no expression of " + std::to_string(lengths.min_len) + " to " +
                    std::to_string(lengths.max_len) +
                    " tokens, answer included, among very many; widen these lengths, or raise "
                    "data.task.max_depth or data.task.max_args");
  }

 private:
  /// Appends a node and returns its value; 0 as soon as there are more than `most` tokens, which are too many in any case.
  int64_t append_node(Random& random, int64_t depth, int64_t most,
                      std::vector<int64_t>& tokens) const {
    if (depth < max_depth_ && random.below(4) == 0)
      return append_operation(random, depth, most, tokens);
    const int64_t digit = random.below(10);
    tokens.push_back(kZero + digit);
    return digit;
  }

  /// The root is always one: digits alone are too short for every bound.
  int64_t append_operation(Random& random, int64_t depth, int64_t most,
                           std::vector<int64_t>& tokens) const {
    const int64_t operation = kMin + random.below(kOperators);
    tokens.push_back(operation);
    std::vector<int64_t> values(static_cast<size_t>(random.between(2, max_args_)));
    for (int64_t& value : values) {
      value = append_node(random, depth + 1, most, tokens);
      if (std::ssize(tokens) > most) return 0;
    }
    tokens.push_back(kClose);
    return applied(operation, values);
  }

  int64_t max_depth_, max_args_;
};

}  // namespace

std::unique_ptr<Task> make_list_operations(const TaskOptions& options) {
  return std::make_unique<ListOperations>(options);
}

}  // namespace xlstm::data
