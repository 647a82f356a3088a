// Prompts and segments: which tokens count in the loss, from JSONL to batches.
#include <algorithm>
#include <cstdio>
#include <set>

#include "csrc/core/sha256.h"
#include "csrc/data/dataset.h"
#include "csrc/data/jsonl.h"
#include "csrc/data/prepare.h"
#include "csrc/data/prepare_job.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

/// Texts of the last line's segments, those that do not count in parentheses.
std::vector<std::string> segments_of(const JsonlParser& parser) {
  std::vector<std::string> texts;
  for (const auto& [text, loss] : parser.segments())
    texts.push_back(loss ? std::string(text) : "(" + std::string(text) + ")");
  return texts;
}

using Texts = std::vector<std::string>;

/// Documents of (tokens, whether they count).
using Parts = std::vector<std::pair<std::vector<int64_t>, bool>>;

std::string write_parts(const std::filesystem::path& prefix, const std::vector<Parts>& documents,
                        int64_t num_bytes = 0, int64_t num_counted_bytes = 0) {
  TokenWriter writer(prefix.string(), 256);
  for (const Parts& parts : documents) {
    for (const auto& [tokens, counted] : parts)
      writer.append(tokens.data(), std::ssize(tokens), counted);
    writer.end_document();
  }
  Sidecar sidecar;
  sidecar.tokenizer = "bytes";
  sidecar.eos_id = 0;
  sidecar.num_bytes = num_bytes;
  sidecar.num_counted_bytes = num_counted_bytes;
  writer.finish(sidecar);
  return prefix.string();
}

/// "x" for a token that counts, "." for another.
std::string counted_of(const TokenFile& file, int64_t first, int64_t count) {
  std::vector<uint8_t> counted(static_cast<size_t>(count), 7);
  file.read_counted(first, count, counted.data());
  std::string text;
  for (const uint8_t one : counted) text += one == 0 ? '.' : 'x';
  return text;
}

std::string counted_of(const TokenFile& file) { return counted_of(file, 0, file.num_tokens()); }

std::string positions(const std::vector<int64_t>& values) {
  std::string bytes;
  for (const int64_t value : values) bytes += little_endian(static_cast<uint64_t>(value), 8);
  return bytes;
}

PrepareOptions options_of(const TemporaryFolder& folder, const std::string& input) {
  PrepareOptions options;
  options.inputs = {(folder / input).string()};
  options.output_prefix = (folder / "out").string();
  options.strict = true;
  return options;
}

std::string text_of(const TokenFile& file) {
  return make_tokenizer("bytes")->decode(all_tokens(file));
}

/// One token per text: 1 for a document's beginning, 2 for what goes on in one.
class PlaceTokenizer final : public Tokenizer {
 public:
  std::vector<int64_t> encode(std::string_view text) override {
    texts.emplace_back(text);
    return text.empty() ? std::vector<int64_t>{} : std::vector<int64_t>{1};
  }
  std::vector<std::vector<int64_t>> encode_inside(
      const std::vector<std::string_view>& batch) override {
    auto ids = encode_batch(batch);
    for (auto& one : ids) std::replace(one.begin(), one.end(), 1, 2);
    return ids;
  }
  std::string decode(const std::vector<int64_t>&) override { return ""; }
  int64_t vocab_size() const override { return 10; }
  int64_t eos_id() const override { return 9; }
  std::string sha256() const override { return ""; }
  Texts texts;
};

const std::vector<Parts> kDocuments{{{{1, 2, 3}, false}, {{4, 5}, true}, {{0}, true}},
                                    {{{6, 0}, true}},
                                    {{{7, 8, 9}, false}, {{10}, true}, {{11, 0}, false}}};

}  // namespace

TEST_CASE("a prompt stands before the text, wherever the line has it") {
  JsonlParser parser("answer", "question");
  REQUIRE(parser.parse(R"({"question":"q\n","answer":"a"})"));
  CHECK(segments_of(parser) == Texts{"(q\n)", "a"});
  REQUIRE(parser.parse(R"({"answer":"a2","id":[{"question":1}],"question":""})"));
  CHECK(segments_of(parser) == Texts{"()", "a2"});
  REQUIRE(parser.parse(
      R"({"answer":[{"text":"a"},{"text":"b","loss":false},{"loss":true,"text":""}],"question":"q"})"));
  CHECK(segments_of(parser) == Texts{"(q)", "a", "(b)", ""});
  const std::vector<std::pair<std::string, std::string>> bad{
      {R"({"answer":"a","id":1})",
       "no \"question\", but \"answer\", \"id\"; say which key has the prompt (--prompt-key KEY of "
       "xlstm-data, or data.prompt_key)"},
      {R"({"question":"q"})", "no \"answer\", but \"question\"; say which key has the text"},
      {R"({"question":null,"answer":"a"})", "\"question\" is not a string"},
      {R"({"question":"q","answer":"a","question":"q"})", "a second \"question\""},
      {R"({"question":)", "ends early"}};
  for (const auto& [line, message] : bad) {
    CHECK_FALSE(parser.parse(line));
    CHECK(contains(parser.error(), message));
  }
  JsonlParser plain("answer");  // without a prompt key it is one of the other keys
  REQUIRE(plain.parse(R"({"question":3,"answer":"a"})"));
  CHECK(segments_of(plain) == Texts{"a"});
}

TEST_CASE("a text may be a list of segments") {
  JsonlParser parser;
  REQUIRE(parser.parse(
      R"({"text":[ {"text":"User: hi\n","loss":false} , {"text":"\u00e9"},{"loss":true,"text":"c"} ]})"));
  CHECK(segments_of(parser) == Texts{"(User: hi\n)", "\xc3\xa9", "c"});
  REQUIRE(parser.parse(R"({"text":[]})"));
  CHECK(parser.segments().empty());
  const std::string form = "; write each as {\"text\": \"...\", \"loss\": true or false}";
  const std::vector<std::pair<std::string, std::string>> bad{
      {R"({"text":["a"]})", "segment 1 of \"text\" is not an object" + form},
      {R"({"text":[{"text":"a"},3]})", "segment 2 of \"text\" is not an object" + form},
      {R"({"text":[{"text":"a"},{"loss":true}]})", "segment 2 of \"text\" has no \"text\"" + form},
      {R"({"text":[{"text":["a"]}]})", "segment 1 of \"text\" has a \"text\" that is not a string"},
      {R"({"text":[{"text":"a","loss":0}]})", "has a \"loss\" that is not true or false" + form},
      {R"({"text":[{"text":"a","loss":null}]})", "that is not true or false"},
      {R"({"text":[{"text":"a","los":false}]})", "segment 1 of \"text\" has a \"los\"" + form},
      {R"({"text":[{"text":"a","text":"b"}]})", "a second \"text\""},
      {R"({"text":[{"text":"a","loss":true,"loss":false}]})", "a second \"loss\""},
      {R"({"text":[{"text":"a","loss":tru}]})", "unknown word"},
      {R"({"text":[{"text":"a"})", "expected ',' or ']'"},
      {R"({"text":[{"text":"a"},]})", "is not an object"},
      {R"({"text":[)", "ends early"},
      {R"({"text":true})", "\"text\" is not a string, nor a list of segments"}};
  for (const auto& [line, message] : bad) {
    INFO(line);
    CHECK_FALSE(parser.parse(line));
    CHECK(contains(parser.error(), message));
  }
  REQUIRE(parser.parse(R"({"text":"a"})"));  // nothing is left of a line before
  CHECK(segments_of(parser) == Texts{"a"});
}

TEST_CASE("prepare: prompts are read and do not count") {
  TemporaryFolder folder;
  write_bytes(folder / "c.jsonl",
              "{\"q\":\"2+2=\",\"a\":\"4\"}\n{\"a\":\"no prompt\",\"q\":\"\"}\n"
              "{\"q\":\"say nothing\",\"a\":\"\"}\n{\"q\":\"\",\"a\":\"\"}\n"
              "{\"q\":\"\xc3\xa9\",\"a\":[{\"text\":\"A\"},{\"text\":\"U\",\"loss\":false}]}\n");
  PrepareOptions options = options_of(folder, "c.jsonl");
  options.texts.text_key = "a";
  options.texts.prompt_key = "q";
  const PrepareReport report = prepare(options);
  CHECK(report.num_documents == 4);
  CHECK(report.empty_documents == 1);
  const TokenFile file(options.output_prefix, Verify::kSha256);
  CHECK(text_of(file) == std::string("2+2=4\0no prompt\0say nothing\0\xc3\xa9"
                                     "AU\0",
                                     33));
  // The end counts where the last segment does, also where that is empty.
  CHECK(counted_of(file) == "....xxxxxxxxxxxx...........x..x..");
  CHECK(report.num_tokens == 33);
  CHECK(report.num_counted_tokens == 14);
  CHECK(file.num_counted_tokens() == 14);
  CHECK(report.num_bytes == 29);
  CHECK(report.num_counted_bytes == 1 + 9 + 1);
  CHECK(file.sidecar()->num_counted_bytes == 11);
  CHECK(file.sidecar()->num_counted_tokens == 14);
  CHECK(read_bytes(options.output_prefix + ".loss") == positions({4, 16, 27, 28, 30, 31, 33}));
  CHECK(contains(read_bytes(options.output_prefix + ".meta.json"), "\"version\": 2"));
}

TEST_CASE("segments that all count are files as ever, whatever stood there before") {
  TemporaryFolder folder;
  write_bytes(folder / "c.jsonl", "{\"text\":\"two parts\"}\n{\"text\":\"b\"}\n");
  write_bytes(folder / "s.jsonl",
              "{\"text\":[{\"text\":\"two \"},{\"text\":\"parts\"}]}\n{\"text\":\"b\"}\n");
  write_bytes(folder / "p.jsonl",
              "{\"text\":[{\"text\":\"q\",\"loss\":false},{\"text\":\"a\"}]}\n");
  PrepareOptions options = options_of(folder, "c.jsonl");
  options.overwrite = true;
  prepare(options);
  const std::string& prefix = options.output_prefix;
  const std::string idx = read_bytes(prefix + ".idx"), bin = read_bytes(prefix + ".bin"),
                    meta = read_bytes(prefix + ".meta.json");
  CHECK(contains(meta, "\"version\": 1"));
  CHECK(meta.find("count") == std::string::npos);
  const std::string fingerprint = TokenFile(prefix).fingerprint();
  const Sidecar sidecar = *TokenFile(prefix).sidecar();
  CHECK(fingerprint == "sha256:" + sha256_hex(sidecar.bin_sha256 + sidecar.idx_sha256));

  options.inputs = {(folder / "p.jsonl").string()};
  prepare(options);
  CHECK(std::filesystem::exists(prefix + ".loss"));
  options.inputs = {(folder / "s.jsonl").string()};
  prepare(options);
  CHECK_FALSE(std::filesystem::exists(prefix + ".loss"));
  CHECK(read_bytes(prefix + ".idx") == idx);
  CHECK(read_bytes(prefix + ".bin") == bin);
  const TokenFile file(prefix, Verify::kSha256);
  CHECK(file.num_counted_tokens() == file.num_tokens());
  CHECK(counted_of(file, 2, 4) == "xxxx");
  CHECK(file.fingerprint() == fingerprint);
}

TEST_CASE("a tokenizer gets each segment by itself") {
  TemporaryFolder folder;
  const std::string longest(20'000'000, 'x');
  write_bytes(folder / "c.jsonl", R"({"q":"Q1","text":"A1"})"
                                  "\n"
                                  R"({"q":"","text":[{"text":"A2"},{"text":""},{"text":"A3"}]})"
                                  "\n{\"q\":\"" +
                                      longest + "\",\"text\":\"" + longest + "\"}\n");
  PrepareJob job;
  job.texts.prompt_key = "q";
  job.files = find_texts({(folder / "c.jsonl").string()}, job.texts);
  job.output_prefix = (folder / "out").string();
  PlaceTokenizer tokenizer;
  const PrepareReport report = run_prepare(job, tokenizer);
  const TokenFile file(job.output_prefix, Verify::kSha256);
  CHECK(all_tokens(file) == std::vector<int64_t>{1, 2, 9, 1, 2, 9, 1, 1, 2, 2, 9});
  CHECK(counted_of(file) == ".xxxxx..xxx");
  CHECK(report.num_counted_bytes == 6 + 20'000'000);
  REQUIRE(tokenizer.texts.size() == 10);
  CHECK(Texts(tokenizer.texts.begin(), tokenizer.texts.begin() + 6) ==
        Texts{"Q1", "", "A2", "A1", "", "A3"});
  CHECK(tokenizer.texts[6].size() + tokenizer.texts[7].size() == longest.size());
  CHECK(tokenizer.texts[8].size() + tokenizer.texts[9].size() == longest.size());
}

TEST_CASE("prompts need JSONL, and a key of their own") {
  TemporaryFolder folder;
  write_bytes(folder / "d" / "a.txt", "text");
  write_bytes(folder / "d" / "b.jsonl", "{\"q\":\"a\",\"text\":\"b\"}\n");
  TextOptions texts{.prompt_key = "q"};
  const std::string message =
      error_of([&] { find_texts({(folder / "d").string()}, texts); }, ExitCode::kConfig);
  CHECK(contains(message, "a.txt: is a plain text, but the prompt key \"q\" is for JSONL"));
  texts.glob = "*.jsonl";
  CHECK(find_texts({(folder / "d").string()}, texts).size() == 1);
  CHECK(find_texts({"-"}, texts).at(0).kind == TextFile::Kind::kJsonl);
  texts.prompt_key = "text";
  CHECK(contains(error_of([&] { find_texts({"-"}, texts); }, ExitCode::kConfig),
                 "prompt and text have the same key, \"text\""));
}

TEST_CASE("the cache knows prompts, and holds out whole lines with theirs") {
  TemporaryFolder folder;
  std::string lines;
  for (int i = 0; i < 200; ++i)
    lines += "{\"q\":\"q" + std::to_string(i) + "=\",\"text\":\"a" + std::to_string(i) + "\"}\n";
  const std::string text = write_bytes(folder / "t.jsonl", lines);
  CacheOptions options{.text = text, .cache_dir = (folder / "cache").string()};
  const CachedText plain = prepare_cached(options);
  options.prompt_key = "q";
  const CachedText prompts = prepare_cached(options);
  CHECK(prompts.train_prefix != plain.train_prefix);
  CHECK(prepare_cached(options).val_prefix == prompts.val_prefix);
  int64_t documents = 0;
  for (const auto& prefix : {prompts.train_prefix, prompts.val_prefix}) {
    const TokenFile file(prefix, Verify::kSha256);
    documents += file.num_documents();
    const std::string read = text_of(file), counted = counted_of(file);
    bool counts = false;
    for (size_t i = 0; i < read.size(); ++i) {
      if (read[i] == 'q') counts = false;
      if (read[i] == 'a') counts = true;
      CHECK(counted[i] == (counts ? 'x' : '.'));
    }
  }
  CHECK(documents == 200);
  std::filesystem::remove(prompts.val_prefix + ".loss");  // it is not used without: made again
  CHECK(TokenFile(prepare_cached(options).val_prefix, Verify::kSha256).num_counted_tokens() > 0);
  write_bytes(folder / "v.txt", "plain");
  options.val_text = (folder / "v.txt").string();
  CHECK(contains(error_of([&] { prepare_cached(options); }, ExitCode::kConfig), "is a plain text"));
}

TEST_CASE("documents are shown with their segments, as they can be read again") {
  TemporaryFolder folder;
  const std::string text = "{\"text\":\"a\",\"q\":\"\"}\n{\"q\":\"l\xc3\xb6ng\",\"text\":\"b\"}\n";
  write_bytes(folder / "c.jsonl", text);
  const auto shown = [&](int64_t limit, const std::string& prompt_key) {
    std::FILE* out = std::fopen((folder / "shown").c_str(), "wb");
    show_documents({(folder / "c.jsonl").string()}, {.prompt_key = prompt_key}, limit, out);
    std::fclose(out);
    return read_bytes(folder / "shown");
  };
  CHECK(shown(0, "") == "\"a\"\n\"b\"\n");
  const std::string first = "[{\"text\":\"\",\"loss\":false},{\"text\":\"a\",\"loss\":true}]\n";
  CHECK(shown(0, "q") ==
        first + "[{\"text\":\"l\xc3\xb6ng\",\"loss\":false},{\"text\":\"b\",\"loss\":true}]\n");
  CHECK(shown(3, "q") == first + "[{\"text\":\"l\",\"loss\":false}]\n");
}

TEST_CASE("which tokens count, from any place") {
  TemporaryFolder folder;
  const TokenFile file(write_parts(folder / "t", kDocuments), Verify::kSha256);
  const std::string all = "...xxxxx...x..";
  CHECK(counted_of(file) == all);
  CHECK(file.num_counted_tokens() == 6);
  for (int64_t first = 0; first < file.num_tokens(); ++first)
    for (int64_t count = 0; first + count <= file.num_tokens(); ++count)
      CHECK(counted_of(file, first, count) ==
            all.substr(static_cast<size_t>(first), static_cast<size_t>(count)));
  // The pair itself is that of the same documents whose tokens all count.
  std::vector<std::vector<int64_t>> plain;
  for (const Parts& parts : kDocuments) {
    plain.emplace_back();
    for (const auto& [tokens, counted] : parts)
      plain.back().insert(plain.back().end(), tokens.begin(), tokens.end());
  }
  const std::string other = write_tokens(folder / "plain", 256, plain);
  CHECK(read_bytes(other + ".idx") == read_bytes(file.prefix() + ".idx"));
  CHECK(read_bytes(other + ".bin") == read_bytes(file.prefix() + ".bin"));
  CHECK(TokenFile(other).fingerprint() != file.fingerprint());

  const TokenFile none(write_parts(folder / "none", {{{{1, 2}, false}}}), Verify::kSha256);
  CHECK(counted_of(none) == "..");
  CHECK(none.num_counted_tokens() == 0);
  CHECK(contains(error_of([&] {
                   Dataset({{open_tokens(none.prefix()), 1.0}}, {.seq_len = 1});
                 }),
                 "none.loss: none of the tokens counts"));
}

TEST_CASE("a .loss file that is damaged, missing or of other tokens is an error") {
  TemporaryFolder folder;
  const std::string prefix = write_parts(folder / "t", kDocuments);
  const std::string path = prefix + ".loss", good = read_bytes(path);
  REQUIRE(good == positions({3, 8, 11, 12, 14}));
  const auto with = [&](const std::string& bytes, Verify verify = Verify::kSizes) {
    write_bytes(path, bytes);
    return error_of([&] { TokenFile file(prefix, verify); });
  };
  for (const bool sidecar : {true, false}) {
    if (!sidecar) std::filesystem::remove(prefix + ".meta.json");
    for (size_t size = 0; size < good.size(); ++size)
      CHECK(contains(with(good.substr(0, size)), size % 8 != 0 || size == 0
                                                     ? "t.loss: " + std::to_string(size) + " bytes"
                                                     : "truncated, or not of this .bin; copy it"));
    CHECK(contains(with(positions({3, 8, 8, 12, 14})), "position 2 is 8, expected more than 8"));
    CHECK(contains(with(positions({-1, 8, 14})), "position 0 is -1, expected more than -1"));
    CHECK(contains(with(positions({0, 15})), "ends at token 15 of 14"));
    write_bytes(path, good);
    CHECK(TokenFile(prefix).num_counted_tokens() == 6);  // which others may write, too
  }
  const std::string sizes = TokenFile(prefix).fingerprint();
  write_bytes(path, positions({4, 8, 11, 12, 14}));
  CHECK(TokenFile(prefix).fingerprint() != sizes);

  write_parts(folder / "t", kDocuments);
  CHECK(contains(with(positions({4, 8, 11, 12, 14})),
                 "5 tokens that count, its .meta.json says 6; the files do not belong together"));
  const std::string moved = positions({3, 8, 10, 11, 14});
  CHECK(contains(with(moved, Verify::kSha256), "t.loss: sha256 is"));
  std::filesystem::remove(path);
  CHECK(contains(error_of([&] { TokenFile file(prefix); }),
                 "t.loss: no such file, but its .meta.json says that not all tokens count"));
  write_tokens(folder / "t", 256, {{1, 2}});
  write_bytes(path, positions({1, 2}));
  CHECK(contains(error_of([&] { TokenFile file(prefix); }),
                 "t.loss: its .meta.json knows of no such file: all tokens count; delete it"));
}

TEST_CASE("targets are tokens that count, the first of an answer included") {
  TemporaryFolder folder;
  const auto file = open_tokens(write_parts(folder / "t", kDocuments));
  DatasetOptions options;
  options.seq_len = 13;
  options.shuffle = false;
  Batch batch = Dataset({{file, 1.0}}, options).batch(0, 1);
  CHECK(batch.input == std::vector<int64_t>{1, 2, 3, 4, 5, 0, 6, 0, 7, 8, 9, 10, 11});
  // 4 is predicted from the prompt's last token; 6 counts, but begins a document.
  CHECK(batch.target ==
        std::vector<int64_t>{-100, -100, 4, 5, 0, -100, 0, -100, -100, -100, 10, -100, -100});
  CHECK(batch.num_targets == 5);
  CHECK(batch.reset == std::vector<uint8_t>{1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0});
  options.mask_loss_across_documents = false;
  batch = Dataset({{file, 1.0}}, options).batch(0, 1);
  CHECK(batch.target[5] == 6);
  CHECK(batch.num_targets == 6);

  options.seq_len = 2;
  options.streams = 2;
  const Dataset streams({{file, 1.0}}, options);
  int64_t counted = 0;
  for (int64_t i = 0; i < 6; ++i) {
    batch = streams.batch(i, 1);
    int64_t own = 0;
    for (const int64_t target : batch.target) own += target != kIgnored ? 1 : 0;
    CHECK(batch.num_targets == own);
    counted += own;
  }
  CHECK(counted == 6);
}

TEST_CASE("held-out text is judged by what counts, in its bytes") {
  TemporaryFolder folder;
  // Ends of documents are 0: two of them count. 4, 5, 6 and 10 are text that counts, of 2 bytes each.
  const auto file = open_tokens(write_parts(folder / "t", kDocuments, 99, 8));
  for (const int64_t seq_len : {1, 2, 3, 5, 50}) {
    for (const auto& [mask, fill] :
         {std::pair(true, false), std::pair(false, false), std::pair(true, true)}) {
      DatasetOptions options;
      options.seq_len = seq_len;
      options.mask_loss_across_documents = mask;
      options.fill_last_window = fill;
      const EvalSet set(file, options);
      std::multiset<int64_t> scored;
      int64_t counted = 0;
      double bytes = 0;
      for (int64_t w = 0; w < set.num_windows(); ++w) {
        const Batch batch = set.batch(w, 1);
        counted += batch.num_targets;
        bytes += set.text_bytes(batch);
        for (const int64_t target : batch.target)
          if (target != kIgnored) scored.insert(target);
      }
      const std::multiset<int64_t> want =
          mask ? std::multiset<int64_t>{4, 5, 0, 0, 10} : std::multiset<int64_t>{4, 5, 0, 6, 0, 10};
      CHECK(scored == want);
      CHECK(counted == std::ssize(want));
      CHECK(bytes == Approx(mask ? 6 : 8));
      CHECK(set.batch(0, set.num_windows()).num_targets == counted);
    }
  }
}
