// Windows, shuffling, mixtures, masks.
#include "csrc/data/dataset.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "csrc/core/sha256.h"
#include "csrc/data/sampling.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

struct Golden {
  uint64_t index, n, seed, epoch;
  int order;
  uint64_t value;
};
// Written by the independent Python version in tests/python/test_token_data.py, which checks this table too.
const Golden kGolden[] = {
#include "tests/data/permute_golden.inc"
};

/// One document 0, 1, 2, ...: a token is its own position.
std::string write_counting(const TemporaryFolder& folder, const std::string& name, int64_t count) {
  std::vector<int64_t> document(static_cast<size_t>(count));
  std::iota(document.begin(), document.end(), 0);
  return write_tokens(folder / name, 1 << 20, {document}, count);
}

DatasetOptions options_of(int64_t seq_len, bool shuffle = true) {
  DatasetOptions options;
  options.seq_len = seq_len;
  options.shuffle = shuffle;
  return options;
}

}  // namespace

TEST_CASE("permute is the same as in Python") {
  for (const auto& golden : kGolden)
    CHECK(permute(golden.index, golden.n, golden.seed, golden.epoch, golden.order) == golden.value);
}

TEST_CASE("permute is a bijection that moves things") {
  for (const uint64_t n : {1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097}) {
    for (const uint64_t epoch : {0, 1, 2}) {
      std::set<uint64_t> seen;
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t value = permute(i, n, 42, epoch);
        CHECK(value < n);
        seen.insert(value);
      }
      CHECK(seen.size() == n);
    }
  }
  const uint64_t n = 10000;
  double product = 0;
  int fixed = 0, same_in_next_epoch = 0;
  for (uint64_t i = 0; i < n; ++i) {
    const uint64_t value = permute(i, n, 1, 0);
    fixed += value == i;
    same_in_next_epoch += value == permute(i, n, 1, 1);
    product += (static_cast<double>(i) - 4999.5) * (static_cast<double>(value) - 4999.5);
  }
  CHECK(fixed < 10);
  CHECK(same_in_next_epoch < 10);
  const double variance = (static_cast<double>(n) * static_cast<double>(n) - 1) / 12;
  CHECK(std::abs(product / static_cast<double>(n) / variance) <
        0.04);  // 4 deviations of a random order
  CHECK(permute((uint64_t{1} << 63) - 5, uint64_t{1} << 63, 1, 1) < uint64_t{1} << 63);
  error_of([] { permute(3, 3, 0, 0); });
}

TEST_CASE("permute has no favourites among the orders of small sets") {
  // 24,000 epochs of 5 windows, 120 orders: chi squared has mean 119 and deviation 15.4.
  std::map<std::vector<uint64_t>, double> counts;
  for (uint64_t epoch = 0; epoch < 24000; ++epoch) {
    std::vector<uint64_t> order;
    for (uint64_t i = 0; i < 5; ++i) order.push_back(permute(i, 5, 1234, epoch));
    ++counts[order];
  }
  CHECK(counts.size() == 120);
  double chi_squared = 0;
  for (const auto& [order, count] : counts) chi_squared += (count - 200) * (count - 200) / 200;
  CHECK(chi_squared < 119 + 5 * 15.4);
  // Windows that follow each other do so again 2 * 255 / 256 times per epoch of 256, deviation 1.4.
  int64_t neighbours = 0;
  for (uint64_t epoch = 0; epoch < 600; ++epoch) {
    uint64_t before = permute(0, 256, 1234, epoch);
    for (uint64_t i = 1; i < 256; ++i) {
      const uint64_t now = permute(i, 256, 1234, epoch);
      neighbours += now == before + 1 || before == now + 1;
      before = now;
    }
  }
  CHECK(std::abs(static_cast<double>(neighbours) - 1195) < 5 * 35);
}

TEST_CASE("a mixture follows its weights at every moment") {
  const std::vector<double> weights{0.5, 3, 1.5};
  const Mixture mixture(weights);
  const auto period = static_cast<double>(Mixture::kPeriod);
  CHECK(std::accumulate(mixture.shares().begin(), mixture.shares().end(), int64_t{0}) ==
        Mixture::kPeriod);
  std::vector<double> shares;
  for (size_t k = 0; k < 3; ++k) {
    shares.push_back(static_cast<double>(mixture.shares()[k]) / period);
    CHECK(std::abs(shares[k] - weights[k] / 5) <= 1 / period);
  }
  std::vector<int64_t> counts(3);
  double farthest = 0;
  for (int64_t i = 0; i < 3 * Mixture::kPeriod; ++i) {
    const auto pick = mixture.pick(i);
    const auto s = static_cast<size_t>(pick.source);
    REQUIRE(pick.rank == counts[s]);
    ++counts[s];
    for (size_t k = 0; k < 3; ++k) {
      const double share = static_cast<double>(i + 1) * shares[k];
      farthest = std::max(farthest, std::abs(static_cast<double>(counts[k]) - share));
    }
  }
  CHECK(farthest < 1);
  const Mixture tiny({1.0, 1e-30});
  CHECK(tiny.shares() == std::vector<int64_t>{Mixture::kPeriod - 1, 1});
  CHECK(Mixture({2.0}).pick(int64_t{1} << 50).rank == int64_t{1} << 50);
  for (const double weight : {0.0, -1.0, std::nan(""), HUGE_VAL})
    CHECK(contains(error_of(
                       [&] {
                         Mixture m({1.0, weight});
                       },
                       ExitCode::kConfig),
                   "is not positive"));
}

TEST_CASE("each window of an epoch is seen once, offsets move by epoch") {
  TemporaryFolder folder;
  const int64_t seq_len = 7, count = 100;  // 14 windows, one token left over
  const auto file = open_tokens(write_counting(folder, "t", count));
  const Dataset dataset({{file, 1.0}}, options_of(seq_len));
  REQUIRE(dataset.samples_per_epoch() == 14);
  std::set<int64_t> offsets;
  std::vector<std::vector<int64_t>> orders;
  for (int64_t epoch = 0; epoch < 12; ++epoch) {
    std::vector<int64_t> firsts;
    for (int64_t i = 0; i < 14; ++i) {
      const Batch batch = dataset.batch(epoch * 14 + i, 1);
      for (size_t t = 0; t < 7; ++t) {
        CHECK(batch.input[t] == batch.input[0] + static_cast<int64_t>(t));
        CHECK(batch.target[t] == batch.input[t] + 1);
        CHECK(batch.reset[t] == (t == 0));
      }
      CHECK(batch.num_targets == 7);
      firsts.push_back(batch.input[0]);
    }
    orders.push_back(firsts);
    std::sort(firsts.begin(), firsts.end());
    const int64_t offset = firsts[0];
    CHECK((offset == 0 || offset == 1));
    offsets.insert(offset);
    for (int64_t w = 0; w < 14; ++w) CHECK(firsts[static_cast<size_t>(w)] == offset + 7 * w);
  }
  CHECK(offsets.size() == 2);
  CHECK(std::set<std::vector<int64_t>>(orders.begin(), orders.end()).size() == 12);
  const Batch straight = Dataset({{file, 1.0}}, options_of(seq_len, false)).batch(13, 2);
  CHECK(straight.input[0] == 91);
  CHECK(straight.input[7] == 0);
}

TEST_CASE("batches do not depend on how samples are asked for") {
  TemporaryFolder folder;
  const auto a = open_tokens(write_counting(folder, "a", 1000)),
             b = open_tokens(write_counting(folder, "b", 333));
  const Dataset dataset({{a, 1.0}, {b, 2.0}}, options_of(16)),
      again({{a, 1.0}, {b, 2.0}}, options_of(16));
  CHECK(dataset.samples_per_epoch() == 62 + 20);
  const Batch all = dataset.batch(0, 300);
  for (const int64_t size : {1, 7, 100}) {
    for (int64_t first = 0; first + size <= 300; first += size) {
      const Batch part = again.batch(first, size);
      CHECK(std::equal(part.input.begin(), part.input.end(), all.input.begin() + first * 16));
      CHECK(std::equal(part.target.begin(), part.target.end(), all.target.begin() + first * 16));
    }
  }
  CHECK(dataset.batch(5, 0).input.empty());
  CHECK(dataset.fingerprint() == again.fingerprint());
}

TEST_CASE("data of a run that began in an earlier version keeps that order") {
  TemporaryFolder folder;
  const auto file = open_tokens(write_counting(folder, "t", 161));
  Dataset dataset({{file, 1.0}}, options_of(16));
  const std::string now = dataset.fingerprint();
  CHECK(!dataset.take_order_of("of something else"));
  CHECK(dataset.fingerprint() == now);
  const std::string before =
      sha256_hex("order-1 T=16 shuffle=1 seed=1234 reset=1 mask=1 65536*" + file->fingerprint());
  REQUIRE(dataset.take_order_of(before));
  CHECK(dataset.fingerprint() == before);
  const Batch batch = dataset.batch(0, 30);
  for (uint64_t i = 0; i < 30; ++i)
    CHECK(batch.input[16 * i] ==
          static_cast<int64_t>(16 * permute(i % 10, 10, mix64(1234), i / 10, 1)));
  REQUIRE(dataset.take_order_of(now));
  CHECK(dataset.batch(0, 30).input != batch.input);
}

TEST_CASE("mixed files keep their own epochs") {
  TemporaryFolder folder;
  // Tokens tell the file: even in one, odd in the other.
  std::vector<int64_t> even, odd;
  for (int64_t i = 0; i < 41; ++i) even.push_back(2 * i);
  for (int64_t i = 0; i < 11; ++i) odd.push_back(2 * i + 1);
  const auto a = open_tokens(write_tokens(folder / "a", 256, {even}));
  const auto b = open_tokens(write_tokens(folder / "b", 256, {odd}));
  const Dataset dataset({{a, 3.0}, {b, 1.0}}, options_of(5));  // 8 and 2 windows
  std::map<int64_t, std::vector<int64_t>> firsts;
  const Batch batch = dataset.batch(0, 64);
  for (size_t row = 0; row < 64; ++row)
    firsts[batch.input[row * 5] % 2].push_back(batch.input[row * 5]);
  REQUIRE(firsts[0].size() == 48);
  REQUIRE(firsts[1].size() == 16);
  for (const auto& [source, values] : firsts) {
    const size_t windows = source == 0 ? 8 : 2;
    for (size_t epoch = 0; (epoch + 1) * windows <= values.size(); ++epoch) {
      const auto first = values.begin() + static_cast<ptrdiff_t>(epoch * windows);
      CHECK(std::set<int64_t>(first, first + static_cast<ptrdiff_t>(windows)).size() == windows);
    }
  }
}

TEST_CASE("streams go on in one another and cover every part of an epoch") {
  TemporaryFolder folder;
  const auto file = open_tokens(write_counting(folder, "t", 100));
  for (const bool shuffle : {false, true}) {
    DatasetOptions options = options_of(4, shuffle);
    options.streams = 3;
    const Dataset dataset({{file, 1.0}}, options);  // 24 windows: 3 parts of 8
    CHECK(dataset.samples_per_epoch() == 24);
    std::set<std::vector<int64_t>> orders;
    for (int64_t epoch = 0; epoch < 8; ++epoch) {
      std::vector<int64_t> firsts;
      int64_t before = 0;
      for (int64_t stream = 0; stream < 3; ++stream) {
        for (int64_t i = 0; i < 8; ++i) {
          const Batch batch = dataset.batch((epoch * 8 + i) * 3 + stream, 1);
          CHECK(batch.reset == std::vector<uint8_t>{i == 0, 0, 0, 0});
          if (i == 0) firsts.push_back(batch.input[0]);
          for (int64_t t = 0; t < 4; ++t)
            CHECK(batch.input[static_cast<size_t>(t)] ==
                  firsts[static_cast<size_t>(stream)] + 4 * i + t);
        }
      }
      before = *std::min_element(firsts.begin(), firsts.end());
      CHECK((before >= 0 && before <= 3));  // 99 - 96 tokens are left over
      orders.insert(firsts);
      std::sort(firsts.begin(), firsts.end());
      CHECK(firsts == std::vector<int64_t>{before, before + 32, before + 64});
    }
    CHECK((orders.size() > 1) == shuffle);
  }
}

TEST_CASE("streams are shared by files as their weights say, and reset where documents start") {
  TemporaryFolder folder;
  std::vector<int64_t> even, odd;  // tokens tell the file
  for (int64_t i = 0; i < 61; ++i) even.push_back(2 * i);
  for (int64_t i = 0; i < 10; ++i) odd.push_back(2 * i + 1);
  const auto a = open_tokens(write_tokens(folder / "a", 256, {even}));
  const auto b = open_tokens(write_tokens(folder / "b", 256, {odd, odd}));
  DatasetOptions options = options_of(5, false);
  options.streams = 4;
  const Dataset dataset({{a, 3.0}, {b, 1.0}}, options);
  const Batch batch = dataset.batch(0, 16);
  std::vector<size_t> of_b;
  for (size_t row = 0; row < 16; ++row)
    if (batch.input[row * 5] % 2 == 1) of_b.push_back(row);
  REQUIRE(of_b.size() == 4);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(of_b[i] == of_b[0] + 4 * i);  // one stream
    for (size_t t = 0; t < 5; ++t)      // 10 tokens a document, 3 windows an epoch
      CHECK(batch.reset[of_b[i] * 5 + t] == (t == 0 && i != 1));
  }
  const auto message_of = [&](int64_t streams, ExitCode code) {
    options.streams = streams;
    return error_of([&] { Dataset({{a, 3.0}, {b, 1.0}}, options); }, code);
  };
  CHECK(contains(message_of(1, ExitCode::kConfig),
                 "b: none of the 1 sequences of a batch falls to it by its weight; raise"));
  CHECK(contains(message_of(16, ExitCode::kData),
                 "b.bin: 3 sequences of data.seq_len=5, but the 4 sequences of a batch that it"));
}

TEST_CASE("mixed files have orders of their own") {
  TemporaryFolder folder;
  const auto file = open_tokens(write_counting(folder, "t", 101));
  const Batch batch = Dataset({{file, 1.0}, {file, 1.0}}, options_of(5)).batch(0, 40);
  std::vector<int64_t> firsts[2];  // of 20 windows each, in turn
  for (size_t row = 0; row < 40; ++row) firsts[row % 2].push_back(batch.input[row * 5]);
  CHECK(firsts[0] != firsts[1]);
  for (auto& each : firsts) std::sort(each.begin(), each.end());
  CHECK(firsts[0] == firsts[1]);
}

TEST_CASE("resets at document starts and no target across documents") {
  TemporaryFolder folder;
  const auto file =
      open_tokens(write_tokens(folder / "t", 256, {{1, 2, 3}, {4}, {}, {5, 6, 7, 8}, {9}}));
  DatasetOptions options = options_of(4, false);
  const Batch batch = Dataset({{file, 1.0}}, options).batch(0, 2);
  CHECK(batch.input == std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8});
  CHECK(batch.target == std::vector<int64_t>{2, 3, -100, -100, 6, 7, 8, -100});
  CHECK(batch.reset == std::vector<uint8_t>{1, 0, 0, 1, 1, 0, 0, 0});
  CHECK(batch.num_targets == 5);
  options.mask_loss_across_documents = false;
  options.reset_state_at_document = false;
  const Batch plain = Dataset({{file, 1.0}}, options).batch(0, 2);
  CHECK(plain.target == std::vector<int64_t>{2, 3, 4, 5, 6, 7, 8, 9});
  CHECK(plain.reset == std::vector<uint8_t>{1, 0, 0, 0, 1, 0, 0, 0});
  CHECK(plain.num_targets == 8);
}

TEST_CASE("too little text is an error with counts") {
  TemporaryFolder folder;
  const auto file = open_tokens(write_counting(folder, "t", 9));
  CHECK(Dataset({{file, 1.0}}, options_of(8)).samples_per_epoch() == 1);  // T+1 tokens exactly
  CHECK(Dataset({{file, 1.0}}, options_of(8)).batch(5, 1).input[7] == 7);
  CHECK(contains(
      error_of([&] {
        Dataset({{file, 1.0}}, options_of(9));
      }),
      "t.bin: 9 tokens, but a window of data.seq_len=9 needs 10; set a smaller data.seq_len"));
  error_of([&] { Dataset({{file, 1.0}}, options_of(0)); }, ExitCode::kConfig);
  error_of([&] { Dataset({}, options_of(4)); }, ExitCode::kConfig);
  error_of([&] { Dataset({{file, 1.0}}, options_of(4)).batch(-1, 1); });
  const auto one = open_tokens(write_counting(folder, "one", 1));
  CHECK(contains(error_of([&] { EvalSet(one, options_of(4)); }),
                 "1 tokens; a held-out set needs at least 2"));
}

TEST_CASE("the fingerprint covers data, order and settings") {
  TemporaryFolder folder;
  std::vector<std::vector<int64_t>> halves(2);  // a's tokens
  for (int64_t token = 0; token < 100; ++token) halves[token < 50 ? 0 : 1].push_back(token);
  const auto a = open_tokens(write_counting(folder, "a", 100)),
             b = open_tokens(write_counting(folder, "b", 101)),
             two = open_tokens(write_tokens(folder / "two", 1 << 20, halves, 100));
  DatasetOptions seed = options_of(8), reset = options_of(8), mask = options_of(8);
  seed.seed = 7;
  reset.reset_state_at_document = false;
  mask.mask_loss_across_documents = false;
  DatasetOptions streams = options_of(8);
  streams.streams = 2;
  const std::vector<Dataset> datasets{{{{a, 1.0}}, options_of(8)},
                                      {{{b, 1.0}}, options_of(8)},
                                      {{{two, 1.0}}, options_of(8)},
                                      {{{a, 1.0}}, options_of(9)},
                                      {{{a, 1.0}}, seed},
                                      {{{a, 1.0}}, reset},
                                      {{{a, 1.0}}, mask},
                                      {{{a, 1.0}}, streams},
                                      {{{a, 1.0}}, options_of(8, false)},
                                      {{{a, 1.0}, {b, 1.0}}, options_of(8)},
                                      {{{b, 1.0}, {a, 1.0}}, options_of(8)},
                                      {{{a, 1.0}, {b, 2.0}}, options_of(8)},
                                      {{{a, 1.0}, {a, 1.0}}, options_of(8)}};
  std::set<std::string> fingerprints;
  for (const auto& dataset : datasets) fingerprints.insert(dataset.fingerprint());
  CHECK(fingerprints.size() == datasets.size());
}

TEST_CASE("windows of documents alone: the last one begins earlier and scores nothing twice") {
  TemporaryFolder folder;
  const std::vector<std::vector<int64_t>> documents{
      {1, 2, 3, 4, 5}, {60}, {6, 7, 8, 9, 10, 11}, {70, 71}};
  const auto file = open_tokens(write_tokens(folder / "t", 256, documents, 90));
  DatasetOptions options = options_of(4);
  options.fill_last_window = true;
  for (const bool apart : {true, false}) {  // what training does at documents is of no account
    options.reset_state_at_document = options.mask_loss_across_documents = apart;
    const EvalSet set(file, options);
    REQUIRE(set.num_windows() == 4);
    const Batch batch = set.batch(0, 4);
    CHECK(batch.input == std::vector<int64_t>{1, 2, 3, 4, 6, 7, 8, 9, 7, 8, 9, 10, 70, 0, 0, 0});
    CHECK(batch.target == std::vector<int64_t>{2, 3, 4, 5, 7, 8, 9, 10, -100, -100, -100, 11, 71,
                                               -100, -100, -100});
    for (size_t t = 0; t < 16; ++t) CHECK(batch.reset[t] == (t % 4 == 0));
    CHECK(batch.num_targets == 10);
    CHECK(set.batch(2, 1).num_targets == 1);
    CHECK(set.text_bytes(batch) == Approx(90.0 * 10 / 14));
  }

  options.seq_len = 50;  // longer than a document: nothing lies before
  const Batch all = EvalSet(file, options).batch(0, 3);
  CHECK(all.num_targets == 10);
  CHECK(all.seq_len == 5);  // nor behind the longest one
  CHECK((all.target[4] == -100 && all.input[5] == 6 && all.target[9] == 11));
  CHECK(
      EvalSet(open_tokens(write_tokens(folder / "ones", 256, {{1}, {2}})), options).num_windows() ==
      0);
}

TEST_CASE("a token that ends documents counts as text within one") {
  TemporaryFolder folder;
  // 0 ends each document, and stands within the first: 8 tokens of text of 2 bytes.
  const auto file =
      open_tokens(write_tokens(folder / "t", 256, {{1, 0, 2, 0, 3, 0}, {4, 5, 0}, {6, 0}}, 16));
  for (const int64_t seq_len : {1, 3, 4, 50}) {
    for (const auto& [mask, fill] :
         {std::pair(true, false), std::pair(false, false), std::pair(true, true)}) {
      DatasetOptions options = options_of(seq_len);
      options.mask_loss_across_documents = mask;
      options.fill_last_window = fill;
      const EvalSet set(file, options);
      // The first token of each document is no target, or that of the first one alone.
      CHECK(set.text_bytes(set.batch(0, set.num_windows())) == Approx(mask ? 10 : 14));
    }
  }
}

TEST_CASE("held-out tokens are scored exactly once") {
  TemporaryFolder folder;
  const std::vector<std::vector<int64_t>> documents{
      {1, 2, 3, 4, 5}, {6}, {7, 8, 9}, {10, 11, 12, 13}};
  const auto file = open_tokens(write_tokens(folder / "t", 256, documents, 90));
  for (const int64_t seq_len : {1, 2, 3, 4, 5, 6, 7, 12, 13, 50}) {
    for (const auto& [mask, fill] :
         {std::pair(true, false), std::pair(false, false), std::pair(false, true)}) {
      DatasetOptions options = options_of(seq_len);
      options.mask_loss_across_documents = mask;
      options.fill_last_window = fill;
      const EvalSet set(file, options);
      std::multiset<int64_t> scored;
      int64_t counted = 0;
      for (int64_t w = 0; w < set.num_windows(); ++w) {
        const Batch batch = set.batch(w, 1);
        counted += batch.num_targets;
        CHECK(batch.reset[0] == 1);
        CHECK(batch.seq_len <= std::min<int64_t>(seq_len, 12));
        for (size_t t = 0; t < static_cast<size_t>(batch.seq_len); ++t) {
          if (batch.target[t] == -100) continue;
          scored.insert(batch.target[t]);
          CHECK(batch.input[t] == batch.target[t] - 1);
        }
      }
      const std::multiset<int64_t> want =
          mask || fill ? std::multiset<int64_t>{2, 3, 4, 5, 8, 9, 11, 12, 13}
                       : std::multiset<int64_t>{2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};
      CHECK(scored == want);
      CHECK(counted == static_cast<int64_t>(want.size()));
      const Batch all = set.batch(0, set.num_windows());
      CHECK(all.num_targets == counted);
      CHECK(set.text_bytes(all) == Approx(90.0 / 13 * static_cast<double>(want.size())));
      error_of([&] { set.batch(0, set.num_windows() + 1); });
    }
  }
}
