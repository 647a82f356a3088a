#include "csrc/data/modular_expressions.h"

namespace xlstm::data {
namespace {

/// sum: product (+|- product)*   product: factor (* factor)*   factor: digit | - factor | ( sum )
class Parser {
 public:
  Parser(const std::vector<int64_t>& expression, const ModularTokens& tokens)
      : expression_(expression), tokens_(tokens) {}

  std::optional<int64_t> parse() {
    const int64_t value = sum();
    if (failed_ || at_ != expression_.size()) return {};
    return value;
  }

 private:
  bool takes(int64_t token) {
    const bool is_next = at_ < expression_.size() && expression_[at_] == token;
    at_ += is_next;
    return is_next;
  }
  int64_t reduced(int64_t x) const {
    return (x % tokens_.modulus() + tokens_.modulus()) % tokens_.modulus();
  }
  int64_t sum() {
    int64_t value = product();
    while (!failed_) {
      if (takes(tokens_.plus())) {
        value = reduced(value + product());
      } else if (takes(tokens_.minus())) {
        value = reduced(value - product());
      } else {
        break;
      }
    }
    return value;
  }
  int64_t product() {
    int64_t value = factor();
    while (!failed_ && takes(tokens_.times())) value = reduced(value * factor());
    return value;
  }
  int64_t factor() {
    if (takes(tokens_.minus())) return reduced(-factor());
    if (takes(tokens_.open())) {
      const int64_t value = sum();
      failed_ = failed_ || !takes(tokens_.close());
      return value;
    }
    if (at_ < expression_.size() && expression_[at_] >= 1 && expression_[at_] <= tokens_.modulus())
      return expression_[at_++] - 1;
    failed_ = true;
    return 0;
  }

  const std::vector<int64_t>& expression_;
  const ModularTokens& tokens_;
  size_t at_ = 0;
  bool failed_ = false;
};

void append_expression(Random& random, int64_t length, const ModularTokens& tokens,
                       std::vector<int64_t>& to) {
  if (length > 4) {
    const int64_t left = random.between(1, length - 4);
    to.push_back(tokens.open());
    append_expression(random, left, tokens, to);
    to.push_back(tokens.plus() + random.below(3));
    append_expression(random, length - 3 - left, tokens, to);
    to.push_back(tokens.close());
    return;
  }
  if (length > 2) to.push_back(tokens.open());
  if (length % 2 == 0) to.push_back(tokens.minus());
  to.push_back(tokens.digit(random.below(tokens.modulus())));
  if (length > 2) to.push_back(tokens.close());
}

}  // namespace

std::vector<int64_t> modular_expression(Random& random, int64_t length,
                                        const ModularTokens& tokens) {
  std::vector<int64_t> expression;
  append_expression(random, length, tokens, expression);
  return expression;
}

std::optional<int64_t> modular_value(const std::vector<int64_t>& expression,
                                     const ModularTokens& tokens) {
  return Parser(expression, tokens).parse();
}

bool has_one_solution(std::vector<int64_t> expression, size_t at, const ModularTokens& tokens) {
  const int64_t own = expression[at];
  const auto value = modular_value(expression, tokens);
  for (int64_t digit = 1; digit <= tokens.modulus(); ++digit) {
    if (digit == own) continue;
    expression[at] = digit;
    if (modular_value(expression, tokens) == value) return false;
  }
  return true;
}

}  // namespace xlstm::data
