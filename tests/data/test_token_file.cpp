// Token files: the bytes on disk, reading them back, and what is said about damaged ones.
#include <cstring>
#include <random>

#include "csrc/core/sha256.h"
#include "csrc/data/sidecar.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

const std::string kMagic("MMIDIDX\0\0", 9);

std::string index_bytes(int dtype, const std::vector<int64_t>& lengths,
                        const std::vector<int64_t>& offsets,
                        const std::vector<int64_t>& documents) {
  std::string bytes = kMagic + little_endian(1, 8) + little_endian(static_cast<uint64_t>(dtype), 1);
  bytes += little_endian(lengths.size(), 8) + little_endian(documents.size(), 8);
  for (const int64_t v : lengths) bytes += little_endian(static_cast<uint64_t>(v), 4);
  for (const int64_t v : offsets) bytes += little_endian(static_cast<uint64_t>(v), 8);
  for (const int64_t v : documents) bytes += little_endian(static_cast<uint64_t>(v), 8);
  return bytes;
}

/// A pair without sidecar.
std::string write_pair(const TemporaryFolder& folder, const std::string& idx,
                       const std::string& bin) {
  write_bytes(folder / "t.idx", idx);
  write_bytes(folder / "t.bin", bin);
  return (folder / "t").string();
}

std::string open_error(const std::string& prefix, Verify verify = Verify::kSizes) {
  return error_of([&] { TokenFile file(prefix, verify); });
}

}  // namespace

TEST_CASE("token writer writes Megatron's bytes") {
  TemporaryFolder folder;
  const std::string prefix =
      write_tokens(folder / "sub" / "t", 50257, {{1, 2, 50256}, {7}, {258, 0}});
  std::string bin;
  for (const uint64_t id : {1, 2, 50256, 7, 258, 0}) bin += little_endian(id, 2);
  CHECK(read_bytes(prefix + ".bin") == bin);
  CHECK(read_bytes(prefix + ".idx") == index_bytes(8, {3, 1, 2}, {0, 6, 8}, {0, 1, 2, 3}));
  CHECK_FALSE(std::filesystem::exists(prefix + ".bin.tmp"));

  const std::string wide = write_tokens(folder / "wide", 65537, {{65536, 3}});
  CHECK(read_bytes(wide + ".bin") == little_endian(65536, 4) + little_endian(3, 4));
  CHECK(read_bytes(wide + ".idx") == index_bytes(4, {2}, {0}, {0, 1}));
  const std::string limit = write_tokens(folder / "limit", 65536, {{65535}});
  CHECK(read_bytes(limit + ".bin") == "\xff\xff");
}

TEST_CASE("token file round trip with a sidecar") {
  TemporaryFolder folder;
  std::vector<std::vector<int64_t>> documents;
  std::mt19937 random(3);
  for (int d = 0; d < 50; ++d) {
    std::vector<int64_t> document(random() % 3000);
    for (auto& id : document) id = random() % 70000;
    documents.push_back(document);
  }
  documents[0].clear();  // an empty first document (Megatron-LM once dropped the one behind it)
  const std::string prefix = write_tokens(folder / "t", 70000, documents, 12345);
  for (const std::string& name : {prefix, prefix + ".bin", prefix + ".idx"}) {
    const TokenFile file(name, Verify::kSha256);
    REQUIRE(file.num_documents() == 50);
    std::vector<int64_t> expected, starts;
    for (const auto& document : documents) {
      starts.push_back(static_cast<int64_t>(expected.size()));
      expected.insert(expected.end(), document.begin(), document.end());
    }
    CHECK(all_tokens(file) == expected);
    for (int64_t d = 0; d < 50; ++d)
      CHECK(file.document_start(d) == starts[static_cast<size_t>(d)]);
    CHECK(file.document_start(50) == file.num_tokens());
    std::vector<uint8_t> flags(expected.size(), 9), want(expected.size(), 0);
    file.read_document_starts(0, file.num_tokens(), flags.data());
    for (const int64_t s : starts) want[static_cast<size_t>(s)] = 1;
    CHECK(flags == want);
    REQUIRE(file.sidecar());
    CHECK(file.sidecar()->bin_sha256 == sha256_hex(read_bytes(prefix + ".bin")));
    CHECK(file.sidecar()->idx_sha256 == sha256_hex(read_bytes(prefix + ".idx")));
    CHECK(file.sidecar()->max_token_id == *std::max_element(expected.begin(), expected.end()));
    CHECK(file.sidecar()->num_bytes == 12345);
    CHECK(file.fingerprint().rfind("sha256:", 0) == 0);
  }
}

TEST_CASE("a document longer than the index can count is several sequences") {
  TemporaryFolder folder;
  const std::string prefix = (folder / "t").string();
  TokenWriter writer(prefix, 256);
  writer.set_max_sequence(4);
  const std::vector<int64_t> ids{1, 2, 3, 4, 5, 6, 7, 8, 9};
  writer.append(ids.data(), 3);
  writer.end_document();
  writer.append(ids.data(), 9);
  writer.end_document();
  writer.append(ids.data(), 4);
  writer.end_document();
  writer.finish({});
  CHECK(read_bytes(prefix + ".idx") ==
        index_bytes(8, {3, 4, 4, 1, 4}, {0, 6, 14, 22, 24}, {0, 1, 4, 5}));
  const TokenFile file(prefix);
  REQUIRE(file.num_documents() == 3);
  CHECK(file.document_start(1) == 3);
  CHECK(file.document_start(2) == 12);
}

TEST_CASE("token file reads every integer type") {
  TemporaryFolder folder;
  const std::vector<std::pair<int, int>> types{{1, 1}, {2, 1}, {3, 2}, {4, 4}, {5, 8}, {8, 2}};
  for (const auto& [code, bytes] : types) {
    std::string bin;
    for (const uint64_t id : {5, 127, 0}) bin += little_endian(id, bytes);
    const std::string prefix =
        write_pair(folder, index_bytes(code, {1, 2}, {0, bytes}, {0, 1, 2}), bin);
    const TokenFile file(prefix);
    CHECK(all_tokens(file) == std::vector<int64_t>{5, 127, 0});
    file.check_vocab(128);
    CHECK(contains(error_of([&] { file.check_vocab(127); }),
                   "token id 127 at position 1 is beyond the vocabulary of 127"));
    CHECK(file.fingerprint().rfind("sizes:", 0) == 0);
  }
  const std::string prefix = write_pair(folder, index_bytes(4, {2}, {0}, {0, 1}),
                                        little_endian(3, 4) + "\xff\xff\xff\xff");
  const TokenFile negative(prefix);
  CHECK(contains(error_of([&] { negative.check_vocab(1 << 30); }), "token id -1 at position 1"));
  int64_t out[2];
  CHECK(contains(error_of([&] { negative.read(0, 2, out); }),
                 "token id -1 at position 1 is negative"));
}

TEST_CASE("token file refuses damaged indexes by name") {
  TemporaryFolder folder;
  const std::string good = index_bytes(8, {2, 1}, {0, 4}, {0, 1, 2});
  const std::string bin = "aabbcc";
  const auto message = [&](const std::string& idx) {
    return open_error(write_pair(folder, idx, bin));
  };
  CHECK(TokenFile(write_pair(folder, good, bin)).num_tokens() == 3);
  CHECK(contains(message(good.substr(0, 20)), "t.idx: 20 bytes are fewer than the header's 34"));
  CHECK(contains(message(""), "0 bytes are fewer"));
  CHECK(contains(message("X" + good.substr(1)), "does not start with MMIDIDX"));
  std::string changed = good;
  changed[9] = 2;
  CHECK(contains(message(changed), "version 2, expected 1"));
  for (const int code : {0, 6, 7, 9, 255}) {
    changed = good;
    changed[17] = static_cast<char>(code);
    CHECK(contains(message(changed), "dtype code " + std::to_string(code)));
  }
  CHECK(contains(message(good.substr(0, good.size() - 1)),
                 "do not fit its header (2 sequences, 3 document entries)"));
  CHECK(contains(message(good + "x"), "truncated or damaged"));
  for (const uint64_t count :
       {uint64_t{1} << 63, uint64_t{1} << 62, ~uint64_t{0}, uint64_t{0x1555555555555555}}) {
    changed = good;  // 12 * count would wrap around
    changed.replace(18, 8, little_endian(count, 8));
    CHECK(contains(message(changed), "do not fit its header"));
    changed = good;
    changed.replace(26, 8, little_endian(count, 8));
    CHECK(contains(message(changed), "do not fit its header"));
  }
  CHECK(contains(message(index_bytes(8, {2, -1}, {0, 4}, {0, 1, 2})), "sequence 1 has length -1"));
  CHECK(contains(message(index_bytes(8, {2, 1}, {0, 2}, {0, 1, 2})),
                 "sequence 1 starts at byte 2, expected 4"));
  CHECK(contains(message(index_bytes(8, {2, 1}, {0, 4}, {0, 2, 1})),
                 "document index covers sequences 0 to 1 of 2"));
  CHECK(contains(message(index_bytes(8, {2, 1}, {0, 4}, {0, 3, 2})),
                 "document index 1 is out of order"));
  CHECK(contains(message(index_bytes(8, {2, 1}, {0, 4}, {0, 2, 1, 2})),
                 "document index 2 is out of order"));
  CHECK(contains(message(index_bytes(8, {2, 1}, {0, 4}, {})), "the document index is empty"));
  CHECK(contains(message(index_bytes(8, {2, 1}, {0, 4}, {0, -1, 2})), "out of order"));
}

TEST_CASE("token file refuses pairs that do not fit") {
  TemporaryFolder folder;
  const std::string idx = index_bytes(8, {2, 1}, {0, 4}, {0, 1, 2});
  const std::string prefix = write_pair(folder, idx, "aabb");
  CHECK(contains(open_error(prefix), "t.bin: 4 bytes, but"));
  CHECK(contains(open_error(prefix), "the .bin is truncated"));
  write_pair(folder, idx, "aabbccdd");
  CHECK(contains(open_error(prefix), "not a pair"));
  write_pair(folder, idx, "aabbccd");
  CHECK(contains(open_error(prefix), "7 bytes"));
  std::filesystem::remove(prefix + ".bin");
  CHECK(contains(open_error(prefix), "t.bin: no such file; a token file is a pair"));
  std::filesystem::create_directory(prefix + ".bin");
  CHECK(contains(open_error(prefix), "not a regular file"));
  std::filesystem::remove(prefix + ".idx");
  CHECK(contains(open_error(prefix), "t.idx: no such file"));
}

TEST_CASE("damaged token files against their sidecar") {
  TemporaryFolder folder;
  const std::string prefix = write_tokens(folder / "t", 256, {{1, 2, 3}, {4, 5}});
  const std::string bin = read_bytes(prefix + ".bin"), idx = read_bytes(prefix + ".idx");
  const std::string meta = read_bytes(prefix + ".meta.json");

  SECTION("each flipped bit of either file is found by its sha256") {
    for (const std::string suffix : {".bin", ".idx"}) {
      const std::string bytes = suffix == ".bin" ? bin : idx;
      for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
        std::string damaged = bytes;
        damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ 1 << bit % 8);
        write_bytes(prefix + suffix, damaged);
        CHECK(contains(open_error(prefix, Verify::kSha256), prefix));
      }
      write_bytes(prefix + suffix, bytes);
    }
  }
  SECTION("another pair under the same sidecar") {
    TemporaryFolder other;
    const std::string p = write_tokens(other / "t", 256, {{1, 2, 3}, {4, 5}, {6}});
    std::filesystem::copy_file(p + ".bin", prefix + ".bin",
                               std::filesystem::copy_options::overwrite_existing);
    std::filesystem::copy_file(p + ".idx", prefix + ".idx",
                               std::filesystem::copy_options::overwrite_existing);
    CHECK(contains(open_error(prefix), "6 tokens, its .meta.json says 5"));
    CHECK(TokenFile(prefix, Verify::kNone).num_tokens() == 6);
  }
  SECTION("an id beyond the vocabulary written into the file") {
    write_bytes(prefix + ".bin", bin.substr(0, 6) + little_endian(300, 2) + bin.substr(8));
    const TokenFile file(prefix);
    CHECK(contains(error_of([&] { file.check_vocab(256); }),
                   "t.bin: token id 300 at position 3 is beyond the vocabulary of 256"));
    int64_t out[5];
    CHECK(contains(error_of([&] { file.read(1, 4, out); }),
                   "token id 300 at position 3 is beyond the largest id"));
    file.read(0, 3, out);  // the rest can be read
  }
  SECTION("damaged sidecars") {
    const auto with = [&](const std::string& from, const std::string& to) {
      std::string text = meta;
      REQUIRE(text.find(from) != std::string::npos);
      text.replace(text.find(from), from.size(), to);
      write_bytes(prefix + ".meta.json", text);
      return open_error(prefix);
    };
    CHECK(contains(with("{", "["), "t.meta.json: is not a JSON object"));
    CHECK(contains(with("\"eos_id\": 0", "\"eos_id\": \"0\""),
                   "\"eos_id\" is not an integer of at least -1"));
    CHECK(contains(with("\"eos_id\": 0", "\"eos_id\": 1e99"), "\"eos_id\" is not an integer"));
    CHECK(contains(with("\"eos_id\": 0", "\"eos_id\": 18446744073709551615"),
                   "\"eos_id\" is not an integer"));
    CHECK(contains(with("\"vocab_size\"", "\"vocab\""), "\"vocab_size\" is missing"));
    CHECK(contains(with("\"version\": 1", "\"version\": 3"), "version 3 is newer"));
    CHECK(contains(with("libxlstm-tokens", "other"), "\"format\" is not"));
    CHECK(contains(with("\"tokenizer\": \"bytes\"", "\"tokenizer\": 3"),
                   "\"tokenizer\" is not a string"));
    CHECK(
        contains(with("\"source_documents\": {}", "\"source_documents\": 3"), "is not an object"));
  }
  SECTION("no sidecar: sizes are checked, sha256 cannot be") {
    std::filesystem::remove(prefix + ".meta.json");
    CHECK(TokenFile(prefix).num_tokens() == 5);
    CHECK(contains(open_error(prefix, Verify::kSha256), "t.meta.json: no such file"));
  }
}

TEST_CASE("random damage of an index never crashes the reader") {
  TemporaryFolder folder;
  const std::string good = index_bytes(8, {2, 1, 5}, {0, 4, 6}, {0, 1, 2, 3});
  const std::string prefix = write_pair(folder, good, std::string(16, 'x'));
  std::mt19937 random(11);
  int refused = 0;
  for (int trial = 0; trial < 1000; ++trial) {
    std::string idx = good;
    for (unsigned n = random() % 4 + 1; n > 0; --n)
      idx[random() % idx.size()] = static_cast<char>(random());
    if (random() % 4 == 0) idx.resize(random() % idx.size());
    write_bytes(prefix + ".idx", idx);
    try {
      const TokenFile file(prefix);
      std::vector<uint8_t> starts(static_cast<size_t>(file.num_tokens()));
      file.read_document_starts(0, file.num_tokens(), starts.data());
      all_tokens(file);
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(refused > 800);
}

TEST_CASE("reads outside the file are refused") {
  TemporaryFolder folder;
  const TokenFile file(write_tokens(folder / "t", 256, {{1, 2, 3}}));
  int64_t out[4];
  CHECK(contains(error_of([&] { file.read(0, 4, out); }), "tokens 0 to 4 of 3"));
  CHECK(contains(error_of([&] { file.read(-1, 1, out); }), "of 3"));
  CHECK(contains(error_of([&] { file.read(3, 1, out); }), "of 3"));
  file.read(3, 0, out);
}

TEST_CASE("token writer refuses bad ids and leaves nothing behind") {
  TemporaryFolder folder;
  for (const int64_t id : {int64_t{256}, int64_t{-1}, int64_t{1} << 40}) {
    TokenWriter writer((folder / "t").string(), 256);
    CHECK(contains(error_of([&] { writer.append(&id, 1); }),
                   "token id " + std::to_string(id) + " is beyond"));
  }
  CHECK(contains(error_of([&] { TokenWriter((folder / "t").string(), int64_t{1} << 33); }),
                 "0 to 2^31-1"));
  CHECK(std::filesystem::is_empty(folder.string()));
  TokenWriter first((folder / "t").string(), 256);
  CHECK(contains(error_of([&] { TokenWriter second((folder / "t").string(), 256); }),
                 "another process"));
}

TEST_CASE("a new token file replaces an old one") {
  TemporaryFolder folder;
  write_tokens(folder / "t", 256, {{1, 2, 3}});
  const TokenFile file(write_tokens(folder / "t", 256, {{9}, {8}}), Verify::kSha256);
  CHECK(all_tokens(file) == std::vector<int64_t>{9, 8});
}
