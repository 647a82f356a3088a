#pragma once
#include <cstdint>
#include <vector>

namespace xlstm::data {

/// Finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijective mix of 64 bits.
uint64_t mix64(uint64_t x);

/// Which source global sample i comes from, and how many samples that source gave before: a schedule of kPeriod
/// positions that repeats. Source s gets n_s of them, its share of the weights rounded by largest remainder (at least
/// one). Position r goes to the source that lags most, largest (r+1) n_s - kPeriod count_s, ties to the lower number;
/// so after any number of samples every source is within one sample of its share (two sources) or a few.
class Mixture {
 public:
  static constexpr int64_t kPeriod = 65536;
  explicit Mixture(const std::vector<double>& weights);
  struct Pick {
    int64_t source;
    int64_t rank;  ///< samples of that source before this one
  };
  Pick pick(int64_t sample) const;
  /// Positions of each source in one period.
  const std::vector<int64_t>& shares() const { return shares_; }

 private:
  std::vector<int64_t> shares_;
  std::vector<int32_t> sources_, ranks_;  ///< one period; empty for a single source
};

}  // namespace xlstm::data
