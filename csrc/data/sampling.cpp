#include "csrc/data/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "csrc/core/error.h"
#include "csrc/data/dataset.h"

namespace xlstm::data {
namespace {

constexpr uint64_t kGoldenGamma = 0x9e3779b97f4a7c15u;

/// Integer shares of kPeriod in proportion to the weights, by largest remainder; each at least one.
std::vector<int64_t> round_shares(const std::vector<double>& weights) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int64_t> shares;
  std::vector<std::pair<double, size_t>> remainders;
  for (size_t s = 0; s < weights.size(); ++s) {
    const double exact = weights[s] / total * static_cast<double>(Mixture::kPeriod);
    shares.push_back(std::max<int64_t>(1, static_cast<int64_t>(exact)));
    remainders.emplace_back(static_cast<double>(shares.back()) - exact,
                            s);  // most negative lags most
  }
  std::sort(remainders.begin(), remainders.end());
  int64_t left = Mixture::kPeriod - std::accumulate(shares.begin(), shares.end(), int64_t{0});
  for (size_t i = 0; left > 0; --left) ++shares[remainders[i++ % remainders.size()].second];
  for (; left < 0; ++left) --*std::max_element(shares.begin(), shares.end());
  return shares;
}

}  // namespace

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t permute(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch, int order) {
  if (index >= n)
    throw Error(ExitCode::kData,
                "permute: index " + std::to_string(index) + " of " + std::to_string(n));
  if (n == 1) return 0;
  const int half = (std::bit_width(n - 1) + 1) / 2;  // 2^(2 half) >= n
  const uint64_t mask = (uint64_t{1} << half) - 1;
  const uint64_t key = mix64(mix64(seed + kGoldenGamma) + epoch);
  const uint64_t rounds = order == 1 ? 4 : 12;
  const uint64_t flip = order == 1 ? 0 : mix64(key) & 1;
  uint64_t value = index;
  do {
    uint64_t left = value >> half, right = value & mask;
    for (uint64_t round = 0; round < rounds; ++round) {
      const uint64_t next = left ^ (mix64(key + (round + 1) * kGoldenGamma + right) & mask);
      left = right;
      right = next;
    }
    value = left << half | right;
    if (value < 2) value ^= flip;  // rounds alone give even permutations
  } while (value >= n);            // cycle walking: fewer than 4 turns on average
  return value;
}

Mixture::Mixture(const std::vector<double>& weights) {
  for (const double weight : weights)
    if (!(weight > 0) || !std::isfinite(weight))
      throw Error(ExitCode::kConfig,
                  "data: weight " + std::to_string(weight) + " of a token file is not positive");
  if (weights.empty() || static_cast<int64_t>(weights.size()) > kPeriod)
    throw Error(ExitCode::kConfig, "data: " + std::to_string(weights.size()) +
                                       " token files; 1 to 65536 can be mixed");
  shares_ = round_shares(weights);
  if (weights.size() == 1) return;
  std::vector<int64_t> counts(weights.size()), lag(weights.size());
  sources_.reserve(kPeriod);
  ranks_.reserve(kPeriod);
  for (int64_t r = 0; r < kPeriod; ++r) {
    for (size_t s = 0; s < lag.size(); ++s) lag[s] += shares_[s];
    const auto most = static_cast<size_t>(std::max_element(lag.begin(), lag.end()) - lag.begin());
    lag[most] -= kPeriod;
    sources_.push_back(static_cast<int32_t>(most));
    ranks_.push_back(static_cast<int32_t>(counts[most]++));
  }
}

Mixture::Pick Mixture::pick(int64_t sample) const {
  if (sources_.empty()) return {0, sample};
  const auto position = static_cast<size_t>(sample % kPeriod);
  const int64_t source = sources_[position];
  return {source, sample / kPeriod * shares_[static_cast<size_t>(source)] + ranks_[position]};
}

}  // namespace xlstm::data
