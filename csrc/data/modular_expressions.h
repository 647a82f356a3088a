#pragma once
// Expressions modulo a small number, as tokens: digit d is 1 + d, then + - * ( ) in this order.
#include <cstdint>
#include <optional>
#include <vector>

#include "csrc/data/random.h"

namespace xlstm::data {

class ModularTokens {
 public:
  explicit ModularTokens(int64_t modulus) : modulus_(modulus) {}
  int64_t modulus() const { return modulus_; }
  int64_t digit(int64_t value) const { return 1 + value; }
  int64_t plus() const { return modulus_ + 1; }
  int64_t minus() const { return modulus_ + 2; }
  int64_t times() const { return modulus_ + 3; }
  int64_t open() const { return modulus_ + 4; }
  int64_t close() const { return modulus_ + 5; }

 private:
  int64_t modulus_;
};

/// An expression of `length` >= 1 tokens: d, -d, (d), (-d), or (a op b) with expressions a and b of random lengths.
std::vector<int64_t> modular_expression(Random& random, int64_t length,
                                        const ModularTokens& tokens);

/// Value in [0, modulus); products bind closer than sums. Absent where `expression` is none.
std::optional<int64_t> modular_value(const std::vector<int64_t>& expression,
                                     const ModularTokens& tokens);

/// Whether no other digit at `at` gives the same value.
bool has_one_solution(std::vector<int64_t> expression, size_t at, const ModularTokens& tokens);

}  // namespace xlstm::data
