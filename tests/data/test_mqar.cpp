// Multi-query associative recall: every sample against the definition, and the distribution of all that is random in it
// against a generator and a sum over all outcomes of their own, written from the description of Zoology's generator
// (arXiv 2312.04927).
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "csrc/data/batch.h"
#include "csrc/data/task.h"
#include "tests/support/catch.h"

namespace {

using namespace xlstm::data;
using Tokens = std::vector<int64_t>;

struct Setting {
  int64_t length, pairs, vocab;
  bool random_non_queries = false;
  int64_t places() const { return (length - 2 * pairs) / 2; }  ///< that a query may stand at
};

std::unique_ptr<Task> recall(const Setting& s) {
  TaskOptions options;
  options.name = "mqar";
  options.key_values = s.pairs, options.vocab_size = s.vocab;
  options.random_non_queries = s.random_non_queries;
  return make_task(options);
}

std::vector<double> power_law(int64_t places, double power) {
  std::vector<double> p;
  for (int64_t gap = 1; gap <= places; ++gap)
    p.push_back(power * std::pow(static_cast<double>(gap), power - 1));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= sum;
  return p;
}

/// Examples as Zoology describes them: keys are drawn without replacement from 1 .. V/2-1, values without replacement from
/// V/2 .. V-1; the sequence begins with the pairs. Of the even places behind them each key takes one, gap g (from 1) with
/// p(g) ~ a g^(a-1), again without replacement: what is taken is drawn again. Elsewhere stand zeros, or, if wanted, tokens
/// drawn evenly from the whole vocabulary. Asked for is the value, where the key stands again.
class Description {
 public:
  Description(const Setting& s, double power = 0.01) : s_(s) {
    const std::vector<double> p = power_law(s.places(), power);
    gap_ = std::discrete_distribution<int64_t>(p.begin(), p.end());
  }
  TaskSample sample() {
    const auto size = static_cast<size_t>(s_.length);
    TaskSample made{Tokens(size, 0), Tokens(size, kIgnored)};
    const Tokens keys = drawn(1, s_.vocab / 2), values = drawn(s_.vocab / 2, s_.vocab);
    std::set<int64_t> taken;
    for (size_t pair = 0; pair < keys.size(); ++pair) {
      int64_t gap = gap_(engine_);
      while (!taken.insert(gap).second) gap = gap_(engine_);
      made.input[2 * pair] = keys[pair], made.input[2 * pair + 1] = values[pair];
      const auto place = static_cast<size_t>(2 * (s_.pairs + gap));
      made.input[place] = keys[pair], made.target[place] = values[pair];
    }
    if (s_.random_non_queries)
      for (int64_t& token : made.input)
        if (token == 0) token = std::uniform_int_distribution<int64_t>(0, s_.vocab - 1)(engine_);
    return made;
  }

 private:
  /// The first of a shuffled deck of [low, high).
  Tokens drawn(int64_t low, int64_t high) {
    Tokens deck(static_cast<size_t>(high - low));
    std::iota(deck.begin(), deck.end(), low);
    for (int64_t i = 0; i < s_.pairs; ++i)
      std::swap(deck[static_cast<size_t>(i)],
                deck[std::uniform_int_distribution<size_t>(static_cast<size_t>(i),
                                                           deck.size() - 1)(engine_)]);
    deck.resize(static_cast<size_t>(s_.pairs));
    return deck;
  }

  Setting s_;
  std::mt19937_64 engine_{20260};
  std::discrete_distribution<int64_t> gap_;
};

/// Counts of the outcomes of one quantity, by name.
using Tables = std::map<std::string, std::vector<double>>;

void tally(Tables& tables, const Setting& s, const TaskSample& sample) {
  constexpr int64_t kBuckets = 16;
  const auto count = [&](const std::string& name, int64_t outcome, int64_t outcomes) {
    auto& table = tables[name];
    table.resize(static_cast<size_t>(outcomes));
    ++table[static_cast<size_t>(outcome)];
  };
  const int64_t half = s.vocab / 2, context = 2 * s.pairs;
  Tokens keys, values, places;
  for (int64_t i = 0; i < s.pairs; ++i) {
    keys.push_back(sample.input[static_cast<size_t>(2 * i)]);
    values.push_back(sample.input[static_cast<size_t>(2 * i + 1)] - half);
    const auto asked = std::find(sample.target.begin(), sample.target.end(), values.back() + half);
    places.push_back((asked - sample.target.begin() - context) / 2);
  }
  const auto bucket = [&](int64_t token) { return token * kBuckets / half; };
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string own = " " + std::to_string(i);
    count("key" + own, keys[i], half), count("value" + own, values[i], half);
    count("key and value" + own, bucket(keys[i]) * kBuckets + bucket(values[i]),
          kBuckets * kBuckets);
    count("key and place" + own, bucket(keys[i]) * s.places() + places[i], kBuckets * s.places());
    for (size_t j = 0; j < i; ++j) {
      const std::string both = " " + std::to_string(j) + " and " + std::to_string(i);
      count("keys" + both, bucket(keys[j]) * kBuckets + bucket(keys[i]), kBuckets * kBuckets);
      count("places" + both, places[j] * s.places() + places[i], s.places() * s.places());
    }
  }
  for (int64_t t = context; t < s.length; ++t)
    if (sample.target[static_cast<size_t>(t)] == kIgnored)
      count("not asked", sample.input[static_cast<size_t>(t)], s.vocab);
}

/// Where a chi-square statistic lies, in standard deviations of a normal variable (Wilson and Hilferty).
double deviations(double chi, double freedom) {
  if (freedom < 1) return chi > 1e-9 ? INFINITY : 0;
  const double spread = 2 / (9 * freedom);
  return (std::cbrt(chi / freedom) - (1 - spread)) / std::sqrt(spread);
}

/// Over cells; small ones are put together.
class ChiSquare {
 public:
  /// `variance`: of a difference, in units of what is expected.
  explicit ChiSquare(double variance) : variance_(variance) {}
  void add(double got, double expected) {
    if (expected >= kLeast) {
      term(got, expected);
    } else {
      got_ += got, expected_ += expected;
    }
  }
  double deviations() {
    if (expected_ >= kLeast) {
      term(got_, expected_);
    } else if (got_ > expected_ + 6 * std::sqrt(kLeast)) {  // of what should hardly ever come
      return INFINITY;
    }
    return ::deviations(chi_, cells_ - 1);
  }

 private:
  static constexpr double kLeast = 8;
  void term(double got, double expected) {
    chi_ += std::pow(got - expected, 2) / (variance_ * expected);
    ++cells_;
  }
  double variance_, chi_ = 0, cells_ = 0, got_ = 0, expected_ = 0;
};

constexpr double kLimit = 4.3;  // passed once in 100 000 times
constexpr int kSamples = 40000;

/// The quantities whose counts do not come from one distribution.
std::set<std::string> different(const Tables& one, const Tables& other) {
  std::set<std::string> names;
  REQUIRE(one.size() == other.size());
  for (const auto& [name, counts] : one) {
    const std::vector<double>& others = other.at(name);
    ChiSquare test(0.5);  // what is expected is the mean of both
    for (size_t i = 0; i < counts.size(); ++i) test.add(counts[i], (counts[i] + others[i]) / 2);
    if (test.deviations() > kLimit) names.insert(name);
  }
  return names;
}

/// Probabilities of the places of two keys, by a sum over every order in which all keys can take places.
std::vector<double> exact_places(const Setting& s, size_t first, size_t second) {
  const auto places = static_cast<size_t>(s.places());
  const std::vector<double> p = power_law(s.places(), 0.01);
  std::vector<double> joint(places * places, 0.0);
  std::vector<size_t> taken;
  std::vector<bool> free(places, true);
  const std::function<void(double, double)> take = [&](double probability, double left) {
    if (taken.size() > second) {
      joint[taken[first] * places + taken[second]] += probability;
      return;
    }
    for (size_t i = 0; i < places; ++i) {
      if (!free[i]) continue;
      free[i] = false, taken.push_back(i);
      take(probability * p[i] / left, left - p[i]);
      free[i] = true, taken.pop_back();
    }
  };
  take(1, 1);
  return joint;
}

Tables of_task(const Setting& s) {
  const auto task = recall(s);
  Tables tables;
  for (uint64_t i = 0; i < kSamples; ++i) {
    Random random(3, 0, i);
    tally(tables, s, task->sample(random, s.length));
  }
  return tables;
}

Tables of_description(const Setting& s, double power = 0.01,
                      const std::function<void(TaskSample&)>& change = {}) {
  Description description(s, power);
  Tables tables;
  for (int i = 0; i < kSamples; ++i) {
    TaskSample sample = description.sample();
    if (change) change(sample);
    tally(tables, s, sample);
  }
  return tables;
}

constexpr std::array<Setting, 3> kSettings = {{{32, 4, 64}, {64, 4, 512}, {64, 4, 512, true}}};

}  // namespace

TEST_CASE("mqar: pairs, then every key once, answered by its value", "[mqar]") {
  const auto task = recall({64, 8, 512});
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

TEST_CASE("mqar: random tokens stand where nothing is asked", "[mqar]") {
  const auto zeros = recall({64, 4, 64}), filled = recall({64, 4, 64, true});
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

TEST_CASE("mqar: keys, values, places and tokens between are distributed as described", "[mqar]") {
  for (const Setting& s : kSettings) {
    CAPTURE(s.length, s.vocab, s.random_non_queries);
    CHECK(different(of_task(s), of_description(s)) == std::set<std::string>{});
  }
}

TEST_CASE("mqar: places of every two queries have their exact probabilities", "[mqar]") {
  for (const Setting& s : {kSettings[0], kSettings[1]}) {
    const Tables tables = of_task(s);
    for (size_t second = 1; second < static_cast<size_t>(s.pairs); ++second)
      for (size_t first = 0; first < second; ++first) {
        CAPTURE(s.length, first, second);
        const std::vector<double> exact = exact_places(s, first, second);
        CHECK(std::accumulate(exact.begin(), exact.end(), 0.0) == Approx(1).epsilon(1e-12));
        const auto& counts =
            tables.at("places " + std::to_string(first) + " and " + std::to_string(second));
        ChiSquare test(1);
        for (size_t i = 0; i < exact.size(); ++i) test.add(counts[i], kSamples * exact[i]);
        CHECK(test.deviations() < kLimit);
      }
  }
}

TEST_CASE("mqar: the comparison sees another power and another order", "[mqar]") {
  const Setting s = kSettings[1];
  const Tables tables = of_task(s);
  CHECK(different(tables, of_description(s, 0.1)).count("places 0 and 1") == 1);
  const auto swap_pairs = [](TaskSample& sample) {
    std::swap_ranges(sample.input.begin(), sample.input.begin() + 2, sample.input.begin() + 6);
  };
  const std::set<std::string> swapped = different(tables, of_description(s, 0.01, swap_pairs));
  CHECK((swapped.count("places 0 and 3") == 1 && swapped.count("key 0") == 0));
  const auto sort_keys = [](TaskSample& sample) {
    if (sample.input[0] > sample.input[2])
      std::swap_ranges(sample.input.begin(), sample.input.begin() + 2, sample.input.begin() + 2);
  };
  const std::set<std::string> sorted = different(tables, of_description(s, 0.01, sort_keys));
  CHECK((sorted.count("keys 0 and 1") == 1 && sorted.count("key 0") == 1));
}
