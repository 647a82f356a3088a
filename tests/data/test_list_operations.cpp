// ListOps against an evaluator and a generator of their own.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <random>
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

TaskOptions list_options() {
  TaskOptions options;
  options.name = "listops";
  return options;
}

std::string hash(const Batch& batch) {
  std::string text;
  for (const auto* numbers : {&batch.input, &batch.target})
    for (const int64_t x : *numbers) text += std::to_string(x) + " ";
  return xlstm::sha256_hex(text).substr(0, 16);
}

struct Read {
  int64_t value = -1;
  size_t deepest = 0;  ///< nodes from the root to the deepest one
  size_t most_arguments = 0;
};

/// Replaces the innermost list by its value, until one digit is left.
Read evaluated(const Tokens& tokens) {
  const std::map<int64_t, std::string> names = {{11, "min"}, {12, "max"}, {13, "med"}, {14, "sm"}};
  struct List {
    std::string operation;
    std::multiset<int64_t> values;
  };
  std::vector<List> open;
  Read read;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (names.count(tokens[i]) > 0) {
      REQUIRE((i == 0 || !open.empty()));
      open.push_back({names.at(tokens[i]), {}});
      continue;
    }
    REQUIRE(!open.empty());
    int64_t value = tokens[i] - 1;
    if (tokens[i] == 15) {
      const List list = open.back();
      open.pop_back();
      REQUIRE(list.values.size() >= 2);
      read.most_arguments = std::max(read.most_arguments, list.values.size());
      const std::vector<int64_t> sorted(list.values.begin(), list.values.end());
      const size_t n = sorted.size();
      int64_t sum = 0;
      for (const int64_t x : sorted) sum += x;
      value = list.operation == "min"   ? sorted.front()
              : list.operation == "max" ? sorted.back()
              : list.operation == "sm"
                  ? sum % 10
                  : static_cast<int64_t>(std::floor((static_cast<double>(sorted[(n - 1) / 2]) +
                                                     static_cast<double>(sorted[n / 2])) /
                                                    2));
      if (open.empty()) {
        REQUIRE(i + 1 == tokens.size());
        read.value = value;
        return read;
      }
    } else {
      REQUIRE((value >= 0 && value <= 9));
      read.deepest = std::max(read.deepest, open.size() + 1);
    }
    open.back().values.insert(value);
  }
  FAIL("the expression is not closed");
  return read;
}

/// Of the counts of tokens [first, last] against equal shares.
double chi_square_of_even(const std::map<int64_t, int64_t>& counts, int64_t first, int64_t last) {
  double total = 0, chi = 0;
  for (int64_t token = first; token <= last; ++token)
    total += static_cast<double>(counts.at(token));
  const double share = total / static_cast<double>(last - first + 1);
  for (int64_t token = first; token <= last; ++token)
    chi += std::pow(static_cast<double>(counts.at(token)) - share, 2) / share;
  CHECK(share > 1000);
  return chi;
}

/// Tokens of an expression of the Arena's generator; 1 is a digit.
size_t arena_length(std::mt19937& engine, int depth, int max_depth, int max_args) {
  if (depth == max_depth || std::uniform_real_distribution<>()(engine) > 0.25) return 1;
  size_t length = 2;
  for (int i = std::uniform_int_distribution<>(2, max_args)(engine); i > 0; --i)
    length += arena_length(engine, depth + 1, max_depth, max_args);
  return length;
}

}  // namespace

TEST_CASE("listops: values, depths and numbers of arguments", "[arena]") {
  TaskOptions options = list_options();
  options.max_depth = 5, options.max_args = 6;
  const auto task = make_task(options);
  CHECK((task->vocab_size() == 16 && task->chance() == 0.1));
  std::map<int64_t, int64_t> answers;
  std::map<int64_t, int64_t> tokens;
  size_t deepest = 0, arguments = 0, shortest = 1000, longest = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    Random random(5, 0, i);
    const TaskSample sample = task->sample_between(random, {5, 200});
    REQUIRE(sample.input.size() == sample.target.size());
    REQUIRE(std::count(sample.target.begin(), sample.target.end(), kIgnored) ==
            std::ssize(sample.target) - 1);
    const Read read = evaluated(sample.input);
    REQUIRE(sample.target.back() == 1 + read.value);
    REQUIRE((read.deepest <= 5 && read.most_arguments <= 6));
    deepest = std::max(deepest, read.deepest), arguments = std::max(arguments, read.most_arguments);
    shortest = std::min(shortest, sample.input.size());
    longest = std::max(longest, sample.input.size());
    ++answers[read.value];
    for (const int64_t token : sample.input) ++tokens[token];
  }
  CHECK((deepest == 5 && arguments == 6));
  CAPTURE(longest);
  CHECK((shortest == 4 && longest > 100 && longest < 200));
  CHECK(answers.size() == 10);
  CHECK((tokens.size() == 15 && tokens.begin()->first == 1 && tokens.rbegin()->first == 15));
  // Each operator is one of four and each digit one of ten, drawn apart from all lengths: chi-square with 3 and 9 degrees of
  // freedom, which passes 16.27 and 27.88 once in 1000.
  CHECK(chi_square_of_even(tokens, 11, 14) < 16.27);
  CHECK(chi_square_of_even(tokens, 1, 10) < 27.88);
}

TEST_CASE("listops: lengths are distributed as those of the Arena's generator", "[arena]") {
  constexpr int kSamples = 8000;
  TaskOptions options = list_options();
  options.max_depth = 4, options.max_args = 5;
  const auto task = make_task(options);
  const std::array<size_t, 6> edges = {6, 8, 12, 20, 30, 59};  // of 4 to 59 tokens
  const auto bin = [&](size_t length) {
    return std::lower_bound(edges.begin(), edges.end(), length) - edges.begin();
  };
  std::mt19937 engine(11);
  double wanted[6] = {}, got[6] = {};
  for (int found = 0; found < kSamples;) {
    const size_t length = arena_length(engine, 1, 4, 5);
    if (length < 4 || length > 59) continue;
    ++wanted[bin(length)], ++found;
  }
  for (uint64_t i = 0; i < kSamples; ++i) {
    Random random(3, 0, i);
    ++got[bin(task->sample_between(random, {5, 60}).input.size())];
  }
  // Two samples of counts from one distribution: chi-square with 5 degrees of freedom; 20.5 is passed once in 1000.
  double chi = 0;
  for (int i = 0; i < 6; ++i) chi += std::pow(got[i] - wanted[i], 2) / (got[i] + wanted[i]);
  CAPTURE(chi);
  CHECK(chi < 20.5);
  CHECK(*std::min_element(got, got + 6) > 100);
}

TEST_CASE("listops: what is drawn to choose by is neither what trains nor the test", "[arena]") {
  TaskOptions options = list_options();
  const auto test = make_task_data(options, 600, 5, false, 16);
  options.held_out = "validation";
  const auto validation = make_task_data(options, 600, 5, false, 16);
  const std::string train = hash(test.train->batch(0, 4));
  CHECK(hash(validation.train->batch(0, 4)) == train);
  CHECK(validation.train->fingerprint() == test.train->fingerprint());
  const std::string held_out[] = {hash(test.held_out->batch(0, 4)),
                                  hash(validation.held_out->batch(0, 4))};
  CHECK((held_out[0] != held_out[1] && held_out[0] != train && held_out[1] != train));
  CHECK(validation.held_out->num_windows() == test.held_out->num_windows());
  options.held_out = "train";
  const std::string message =
      error_of([&] { make_task_data(options, 600, 5, false, 16); }, xlstm::ExitCode::kConfig);
  CHECK(message == "data.task.held_out is train, expected test or validation");
}

TEST_CASE("listops: the Arena's lengths, recorded, for every cut into batches and every thread",
          "[arena]") {
  const auto data = make_task_data(list_options(), 2000, 1234, true, 16);
  const Batch all = data.train->batch(0, 16);
  CHECK(hash(all) == "454fd82fee1bbaf8");
  CHECK(hash(data.held_out->batch(0, 16)) == "bcfda9d207b8cbd6");
  CHECK(hash(make_task_data(list_options(), 2000, 7, true, 16).train->batch(0, 16)) ==
        "ef35a2834efb4a40");
  CHECK(all.num_targets == 16);
  for (size_t row = 0; row < 16; ++row) {
    const auto first = all.input.begin() + static_cast<std::ptrdiff_t>(2000 * row);
    const auto padding = std::find(first, first + 2000, 0);
    const auto length = static_cast<size_t>(padding - first);
    REQUIRE((length > 500 && length < 2000));
    REQUIRE(std::count(padding, first + 2000, 0) == first + 2000 - padding);
    REQUIRE(all.target[2000 * row + length - 1] == 1 + evaluated({first, padding}).value);
  }
  std::vector<Batch> parts(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; ++i)
    threads.emplace_back([&, i] { parts[i] = data.train->batch(static_cast<int64_t>(4 * i), 4); });
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < 4; ++i) {
    const auto offset = static_cast<std::ptrdiff_t>(4 * 2000 * i);
    CHECK(std::equal(parts[i].input.begin(), parts[i].input.end(), all.input.begin() + offset));
    CHECK(std::equal(parts[i].target.begin(), parts[i].target.end(), all.target.begin() + offset));
  }
}

TEST_CASE("listops: settings that do not fit are named", "[arena]") {
  const auto error = [](const TaskOptions& options, int64_t seq_len) {
    return error_of([&] { make_task_data(options, seq_len, 1, true, 16); },
                    xlstm::ExitCode::kConfig);
  };
  TaskOptions options = list_options();
  CHECK(contains(error(options, 400),
                 "data.seq_len is 400, expected at least data.task.min_len, 502"));
  options.max_depth = 3;
  CHECK(contains(error(options, 2000), "data.task.min_len is 502, expected at most 123 for this"));
  options.min_len = 4;
  CHECK(contains(error(options, 2000), "data.task.min_len is 4, expected at least 5"));
  options.min_len = 0, options.max_depth = 10, options.vocab_size = 15;
  CHECK(contains(error(options, 2000), "data.task.vocab_size is 15, expected 0 or 16"));
  // Settings of a generator are part of what a run may be resumed on.
  options = list_options(), options.min_len = 10;
  const auto one = make_task_data(options, 100, 1, true, 16);
  options.max_args = 9;
  CHECK(make_task_data(options, 100, 1, true, 16).train->fingerprint() != one.train->fingerprint());
}
