// From text to token files.
#include "csrc/data/prepare.h"

#include <sys/resource.h>

#include <csignal>

#include "csrc/data/prepare_job.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

PrepareOptions options_of(const TemporaryFolder& folder, const std::vector<std::string>& inputs) {
  PrepareOptions options;
  for (const auto& input : inputs) options.inputs.push_back((folder / input).string());
  options.output_prefix = (folder / "out").string();
  options.command = "the command";
  return options;
}

std::string document_text(const TokenFile& file, int64_t d) {
  std::vector<int64_t> ids(
      static_cast<size_t>(file.document_start(d + 1) - file.document_start(d)));
  file.read(file.document_start(d), static_cast<int64_t>(ids.size()), ids.data());
  return make_tokenizer("bytes")->decode(ids);
}

/// A tokenizer whose tokens are words, to see what prepare hands over.
class WordTokenizer final : public Tokenizer {
 public:
  std::vector<int64_t> encode(std::string_view text) override {
    pieces.emplace_back(text);
    std::vector<int64_t> ids;
    bool inside = false;
    for (const char c : text) {
      const bool space = c == ' ' || c == '\n';
      if (!space && !inside) ids.push_back(1);
      inside = !space;
    }
    return ids;
  }
  std::string decode(const std::vector<int64_t>&) override { return ""; }
  int64_t vocab_size() const override { return 2; }
  int64_t eos_id() const override { return -1; }
  std::string sha256() const override { return "words"; }
  std::vector<std::string> pieces;
};

}  // namespace

TEST_CASE("prepare: files, folders and jsonl of several sources") {
  TemporaryFolder folder;
  write_bytes(folder / "a.txt", "caf\xc3\xa9\r\n");
  write_bytes(folder / "dir" / "2.txt", "two");
  write_bytes(folder / "dir" / "1.txt", std::string("o\0ne", 4));
  write_bytes(folder / "dir" / "empty.txt", "");
  write_bytes(folder / "dir" / "bad.txt", "\xff");
  write_bytes(
      folder / "c.jsonl",
      "{\"text\":\"x\",\"meta\":{\"redpajama_set_name\":\"C4\"}}\n{\"text\":\"\"}\n{\"text\":1}\n"
      "{\"text\":\"y\",\"meta\":{\"redpajama_set_name\":\"C4\"}}\n{\"text\":\"z\"}\n");
  const PrepareReport report = prepare(options_of(folder, {"a.txt", "dir", "c.jsonl"}));
  CHECK(report.num_documents == 6);
  CHECK(report.num_bytes == 7 + 4 + 3 + 1 + 1 + 1);
  CHECK(report.num_tokens == report.num_bytes + 6);
  CHECK(report.empty_documents == 2);
  CHECK(report.bad_documents == 2);
  const TokenFile file((folder / "out").string(), Verify::kSha256);
  REQUIRE(file.num_documents() == 6);
  CHECK(document_text(file, 0) == std::string("caf\xc3\xa9\r\n\0", 8));
  CHECK(document_text(file, 1) == std::string("o\0ne\0", 5));  // a NUL of the text ends nothing
  CHECK(document_text(file, 2) == std::string("two\0", 4));
  CHECK(document_text(file, 5) == std::string("z\0", 2));
  const Sidecar& sidecar = *file.sidecar();
  CHECK(sidecar.tokenizer == "bytes");
  CHECK(sidecar.vocab_size == 256);
  CHECK(sidecar.eos_id == 0);
  CHECK(sidecar.num_bytes == report.num_bytes);
  CHECK(sidecar.max_token_id == 0xc3);
  CHECK(sidecar.command == "the command");
  const std::map<std::string, int64_t> want{{(folder / "a.txt").string(), 1},
                                            {(folder / "dir").string(), 2},
                                            {"C4", 2},
                                            {(folder / "c.jsonl").string(), 1}};
  CHECK(sidecar.source_documents == want);
}

TEST_CASE("prepare without end-of-document tokens") {
  TemporaryFolder folder;
  write_bytes(folder / "a.txt", "ab");
  PrepareOptions options = options_of(folder, {"a.txt"});
  options.append_eos = false;
  CHECK(prepare(options).num_tokens == 2);
}

TEST_CASE("prepare of a text larger than its buffers") {
  TemporaryFolder folder;
  std::string text;
  for (int i = 0; text.size() < 3'000'000; ++i) text += std::to_string(i) + "\xe2\x82\xac ";
  write_bytes(folder / "a.txt", text);
  prepare(options_of(folder, {"a.txt"}));
  const TokenFile file((folder / "out").string(), Verify::kSha256);
  CHECK(document_text(file, 0) == text + '\0');
}

TEST_CASE("prepare: strict stops at the first bad document") {
  TemporaryFolder folder;
  write_bytes(folder / "c.jsonl", "{\"text\":\"x\"}\n{\"txt\":\"y\"}\n");
  PrepareOptions options = options_of(folder, {"c.jsonl"});
  options.strict = true;
  CHECK(contains(error_of([&] { prepare(options); }), "c.jsonl:2: no \"text\", but \"txt\"; say"));
  CHECK_FALSE(std::filesystem::exists(folder / "out.bin"));
  CHECK_FALSE(std::filesystem::exists(folder / "out.bin.tmp"));
}

TEST_CASE("prepare: an empty corpus is an error") {
  TemporaryFolder folder;
  write_bytes(folder / "a.txt", "");
  write_bytes(folder / "b.txt", "\x80");
  CHECK(contains(error_of([&] {
                   prepare(options_of(folder, {"a.txt", "b.txt"}));
                 }),
                 "no text in it (2 files, 1 empty and 1 bad documents)"));
  CHECK_FALSE(std::filesystem::exists(folder / "out.bin.tmp"));
  error_of([&] { prepare(options_of(folder, {"nope.txt"})); });
}

TEST_CASE("prepare: an output that cannot be written is an error") {
  TemporaryFolder folder;
  write_bytes(folder / "a.txt", "text");
  PrepareOptions options = options_of(folder, {"a.txt"});
  options.output_prefix = (folder / "a.txt" / "out").string();
  CHECK(contains(error_of([&] { prepare(options); }), "cannot create"));

  SECTION("no space: the old token file survives") {
    options = options_of(folder, {"a.txt"});
    prepare(options);
    write_bytes(folder / "a.txt", std::string(5'000'000, 'x'));
    options.overwrite = true;
    rlimit old{};
    getrlimit(RLIMIT_FSIZE, &old);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit small{1 << 20, old.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    const std::string message = error_of([&] { prepare(options); });
    setrlimit(RLIMIT_FSIZE, &old);
    std::signal(SIGXFSZ, handler);
    CHECK(contains(message, "out.bin.tmp"));
    CHECK(contains(message, "choose an output folder"));
    CHECK(TokenFile((folder / "out").string(), Verify::kSha256).num_tokens() == 5);
    CHECK_FALSE(std::filesystem::exists(folder / "out.bin.tmp"));
  }
}

TEST_CASE("long documents reach a tokenizer in pieces that end in lines") {
  TemporaryFolder folder;
  // So long a first line that 16 MiB end between a line's end and the white space that follows it.
  std::string text = std::string(26, 'x') + "\n";
  int64_t words = 1;
  while (text.size() < 40'000'000) {
    text += "some words of a line\n  \nmore\n";
    words += 6;
  }
  write_bytes(folder / "a.txt", text);
  PrepareJob job;
  job.files = find_texts({(folder / "a.txt").string()}, {});
  job.output_prefix = (folder / "out").string();
  job.tokenizer = "words";
  WordTokenizer tokenizer;
  const PrepareReport report = run_prepare(job, tokenizer);
  CHECK(report.num_documents == 1);
  CHECK(report.num_tokens == words);
  REQUIRE(tokenizer.pieces.size() == 3);
  std::string joined;
  for (const auto& piece : tokenizer.pieces) {
    joined += piece;
    CHECK(piece.back() == '\n');
  }
  CHECK(joined == text);
  CHECK(text[(1 << 24) - 1] == ' ');
  CHECK(tokenizer.pieces[1][0] == 's');
}

TEST_CASE("documents that a tokenizer makes nothing of count as empty") {
  TemporaryFolder folder;
  write_bytes(folder / "c.jsonl", "{\"text\":\"a b\"}\n{\"text\":\"  \"}\n{\"text\":\"c\"}\n");
  PrepareJob job;
  job.files = find_texts({(folder / "c.jsonl").string()}, {});
  job.output_prefix = (folder / "out").string();
  WordTokenizer tokenizer;
  const PrepareReport report = run_prepare(job, tokenizer);
  CHECK(report.num_documents == 2);
  CHECK(report.empty_documents == 1);
  CHECK(report.num_tokens == 3);
  CHECK(TokenFile(job.output_prefix).sidecar()->tokenizer_sha256 == "words");
}
