#pragma once
#include <cstdint>

#include "csrc/data/sampling.h"

namespace xlstm::data {

/// Random numbers that are a pure function of three keys and how many came before (splitmix64): the same on every
/// platform, unlike the distributions of <random>.
class Random {
 public:
  Random(uint64_t seed, uint64_t stream, uint64_t index)
      : state_(mix64(mix64(mix64(seed) + stream) + index)) {}
  uint64_t next() { return mix64(state_ += 0x9e3779b97f4a7c15); }
  /// Uniform in [0, n), n > 0.
  int64_t below(int64_t n) {
    const auto range = static_cast<uint64_t>(n);
    const uint64_t rejected = -range % range;  // 2^64 mod n: the rest is a multiple of n
    uint64_t x = next();
    while (x < rejected) x = next();
    return static_cast<int64_t>(x % range);
  }
  /// Uniform in [low, high].
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }

 private:
  uint64_t state_;
};

}  // namespace xlstm::data
