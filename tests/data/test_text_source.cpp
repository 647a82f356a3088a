// Finding texts and reading documents out of them.
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <nlohmann/json.hpp>
#include <random>

#include "csrc/data/jsonl.h"
#include "csrc/data/text_source.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

std::string compress(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

std::string gzip(const std::string& text) {
  z_stream stream{};
  constexpr int kGzip = 16 + MAX_WBITS;
  deflateInit2(&stream, 6, Z_DEFLATED, kGzip, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  return out;
}

/// The texts of segments, those that do not count in parentheses, with a bar between two.
std::string joined(std::span<const Segment> segments) {
  std::string text;
  for (const auto& segment : segments) {
    if (&segment != segments.data()) text += "|";
    text += segment.loss ? std::string(segment.text) : "(" + std::string(segment.text) + ")";
  }
  return text;
}

/// Documents as "source|line|text", problems as "line!what".
std::vector<std::string> read_all(const std::string& path, const TextOptions& options = {}) {
  std::vector<std::string> seen;
  int64_t last = 0;
  DocumentSink sink;
  sink.document = [&](const Document& d) {
    seen.push_back(std::string(d.source) + "|" + std::to_string(d.line) + "|" + joined(d.segments));
  };
  sink.bad = [&](int64_t line, const std::string& what) {
    seen.push_back(std::to_string(line) + "!" + what);
  };
  sink.progress = [&](int64_t position) {
    CHECK(position >= last);
    last = position;
  };
  TextFile file = find_texts({path}, options).at(0);
  file.input = "in";
  read_documents(file, options, sink);
  CHECK(last <= file.size_bytes);
  return seen;
}

std::vector<std::string> names(const std::vector<TextFile>& files) {
  std::vector<std::string> result;
  for (const auto& file : files) result.push_back(file.name);
  return result;
}

}  // namespace

TEST_CASE("jsonl parser") {
  JsonlParser parser;
  REQUIRE(parser.parse(
      R"( {"a":[1,-2.5e+3,true,null,{"text":"no"}],"text":"x\u00e9\n\ud83d\ude00\"\/", "meta": )"
      R"({"redpajama_set_name":"RedPajamaC4","n":{}}} )"));
  CHECK(parser.segments().at(0).text == "x\xc3\xa9\n\xf0\x9f\x98\x80\"/");
  CHECK(parser.set_name() == "RedPajamaC4");
  REQUIRE(parser.parse(R"({"meta":null,"text":""})"));
  CHECK(parser.segments().at(0).text.empty());
  CHECK(parser.set_name().empty());
  REQUIRE(parser.parse(R"({"text":"\u0000","meta":{"redpajama_set_name":7}})"));
  CHECK(parser.segments().at(0).text == std::string(1, '\0'));

  const std::vector<std::pair<std::string, std::string>> bad{
      {R"({"text":3})", "\"text\" is not a string"},
      {R"({"text":null})", "\"text\" is not a string"},
      {R"({"id":7,"c\n\"":{"inner":1}})", "no \"text\", but \"id\", \"c\\n\\\"\"; say which key"},
      {R"({})", "no \"text\", but an empty object; say which key"},
      {R"(["text"])", "not a JSON object"},
      {R"("text")", "not a JSON object"},
      {R"({"text":"a"} x)", "not valid JSON at byte 14: text behind the object"},
      {R"({"text":"a")", "expected ',' or '}'"},
      {R"({"text":"a)", "string without an end"},
      {R"({"text":"\ud800"})", "lone surrogate"},
      {R"({"text":"\ud800\u0041"})", "lone surrogate"},
      {R"({"text":"\udc00"})", "lone surrogate"},
      {R"({"text":"\x"})", "unknown escape"},
      {R"({"text":"\u12g4"})", "bad \\u escape"},
      {R"({"text":"a","text":"b"})", "a second \"text\""},
      {R"({"text":"a","n":01})", "expected ',' or '}'"},
      {R"({"text":"a","n":nul})", "unknown word"},
      {R"({"text":"a","n":-})", "unexpected character"},
      {R"({"text":"a",})", "expected a name in quotes"},
      {"{\"text\":\"a\tb\"}", "control character in a string"},
      {"{\"text\":\"\xff\"}", "invalid UTF-8 at byte 10"},
      {"{\"text\":\"\xed\xa0\x80\"}", "invalid UTF-8"},
      {R"({"text":"a","n":)" + std::string(100000, '[') + "}", "nested too deeply"}};
  for (const auto& [line, message] : bad) {
    CHECK_FALSE(parser.parse(line));
    CHECK(contains(parser.error(), message));
  }
}

TEST_CASE("jsonl parser of another key") {
  JsonlParser parser("content");
  REQUIRE(parser.parse(R"({"text":3,"\u0063ontent":"a","meta":{"content":"b"}})"));
  CHECK(parser.segments().at(0).text == "a");
  CHECK_FALSE(parser.parse(R"({"text":"a"})"));
  CHECK(contains(parser.error(), "no \"content\", but \"text\"; say which key"));
  CHECK(contains(parser.error(), "--text-key"));
  CHECK_FALSE(parser.parse(R"({"content":{}})"));
  CHECK(contains(parser.error(), "\"content\" is not a string"));
  std::string many = "{";
  for (int i = 0; i < 1000; ++i) many += "\"key" + std::to_string(i) + "\":0,";
  CHECK_FALSE(parser.parse(many + "\"z\":0}"));
  CHECK(parser.error().size() < 400);
}

TEST_CASE("jsonl parser agrees with another JSON library on damaged lines") {
  const std::string good =
      R"({"text":"The \"cell\" \u00e9 \\ state\n", "n":[1,2.5e-3,{"k":null}], "meta":{"redpajama_set_name":"A","x":true}})";
  std::mt19937 random(17);
  JsonlParser parser;
  int accepted = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    std::string line = good;
    for (unsigned n = random() % 3; n > 0; --n) {
      const size_t at = random() % line.size();
      if (random() % 2 == 0) {
        line[at] = "{}[]\",:\\u0aef-1.\xc3\n "[random() % 20];
      } else {
        line.erase(at, 1);
      }
    }
    const auto json = nlohmann::json::parse(line, nullptr, false);
    const bool usable = json.is_object() && json.contains("text") && json["text"].is_string();
    const bool parsed = parser.parse(line);
    INFO(line);
    REQUIRE(parsed == usable);
    if (!parsed) continue;
    ++accepted;
    REQUIRE(parser.segments().at(0).text == json["text"].get<std::string>());
  }
  CHECK(accepted > 2000);
}

TEST_CASE("texts are found in a fixed order") {
  TemporaryFolder folder;
  for (const std::string name :
       {"b.txt", "a/z.py", "a/c.txt", "a.txt", ".hidden.txt", ".git/x.txt", "a/.deep/y.txt"})
    write_bytes(folder / "t" / name, name);
  const std::string root = (folder / "t").string();
  CHECK(names(find_texts({root}, {})) ==
        std::vector<std::string>{"a.txt", "a/c.txt", "a/z.py", "b.txt"});
  CHECK(names(find_texts({root}, {.glob = "*.txt"})) ==
        std::vector<std::string>{"a.txt", "a/c.txt", "b.txt"});
  CHECK(names(find_texts({root + "/*.txt"}, {})) == std::vector<std::string>{"a.txt", "b.txt"});
  CHECK(names(find_texts({root + "/[ab]*/c.txt"}, {})) == std::vector<std::string>{"a/c.txt"});
  CHECK(names(find_texts({(folder / "?").string() + "/a"}, {.glob = "*.txt"})) ==
        std::vector<std::string>{"t/a/c.txt"});
  CHECK(names(find_texts({root + "/a"}, {.glob = "[yz].py"})) == std::vector<std::string>{"z.py"});
  SECTION("a file counts once") {
    CHECK(names(find_texts({root + "/b.txt", root, root}, {.glob = "*.txt"})) ==
          std::vector<std::string>{"b.txt", "a.txt", "a/c.txt"});
    std::filesystem::create_symlink(root + "/b.txt", root + "/link.txt");
    CHECK(find_texts({root}, {.glob = "*.txt"}).size() == 3);
  }
  SECTION("folders that are linked count, once and without end") {
    write_bytes(folder / "far" / "x" / "f.txt", "f");
    std::filesystem::create_directory_symlink(folder / "far", root + "/link");
    std::filesystem::create_directory_symlink(root, root + "/a/up");
    std::filesystem::create_directory_symlink(root + "/a", root + "/b");
    std::filesystem::create_symlink(root + "/nowhere", root + "/dangling.txt");
    CHECK(names(find_texts({root, root}, {.glob = "*.txt"})) ==
          std::vector<std::string>{"a.txt", "a/c.txt", "b.txt", "link/x/f.txt"});
  }
  SECTION("a folder that cannot be read is an error") {
    if (::geteuid() == 0) return;  // reads everything
    std::filesystem::permissions(root + "/a", std::filesystem::perms::none);
    CHECK(contains(error_of([&] { find_texts({root}, {.glob = "*.txt"}); }),
                   "a: cannot read: Permission"));
    std::filesystem::permissions(root + "/a", std::filesystem::perms::owner_all);
  }
  SECTION("nothing found") {
    CHECK(contains(error_of([&] { find_texts({root + "/nope"}, {}); }),
                   "nope: no such file or folder"));
    CHECK(contains(error_of([&] { find_texts({root + "/*.rst"}, {}); }),
                   "no file matches it as a pattern"));
    CHECK(contains(error_of([&] { find_texts({root}, {.glob = "*.rst"}); }),
                   "nor a folder with files that match \"*.rst\""));
    CHECK(contains(error_of([&] { find_texts({"/dev/null"}, {}); }), "not a text file"));
  }
  SECTION("kinds go by name") {
    write_bytes(folder / "k" / "a.jsonl", "");
    for (const char* name : {"b.jsonl.zst", "c.json", "d.ndjson.gz", "e.txt.gz", "f.zst"})
      write_bytes(folder / "k" / name, "");
    const auto files = find_texts({(folder / "k").string()}, {});
    using Kind = TextFile::Kind;
    using Compression = TextFile::Compression;
    const std::pair<Kind, Compression> kinds[] = {
        {Kind::kJsonl, Compression::kNone}, {Kind::kJsonl, Compression::kZstd},
        {Kind::kText, Compression::kNone},  {Kind::kJsonl, Compression::kGzip},
        {Kind::kText, Compression::kGzip},  {Kind::kText, Compression::kZstd}};
    REQUIRE(files.size() == std::size(kinds));
    for (size_t i = 0; i < files.size(); ++i) {
      CHECK(files[i].kind == kinds[i].first);
      CHECK(files[i].compression == kinds[i].second);
    }
    for (const auto& file : find_texts({(folder / "k").string()}, {.format = "jsonl"}))
      CHECK(file.kind == Kind::kJsonl);
    for (const auto& file : find_texts({(folder / "k").string()}, {.format = "text"}))
      CHECK(file.kind == Kind::kText);
    CHECK(contains(error_of([&] { find_texts({root}, {.format = "json"}); }, ExitCode::kConfig),
                   "\"json\", expected auto, text or jsonl"));
  }
}

TEST_CASE("documents of a text file") {
  TemporaryFolder folder;
  CHECK(read_all(write_bytes(folder / "t.txt", "a\r\nb")) ==
        std::vector<std::string>{"in|1|a\r\nb"});
  CHECK(read_all(write_bytes(folder / "e.txt", "")) == std::vector<std::string>{"in|1|"});
  CHECK(read_all(write_bytes(folder / "m.txt",
                             "\xef\xbb\xbf"
                             "a\xef\xbb\xbf")) == std::vector<std::string>{"in|1|a\xef\xbb\xbf"});
  const auto bad = read_all(write_bytes(folder / "b.txt", "ok\nok\n\xff"));
  REQUIRE(bad.size() == 1);
  CHECK(contains(bad[0], "3!invalid UTF-8 at byte 7 of the file; convert it (iconv"));
}

TEST_CASE("a compressed text is one document") {
  TemporaryFolder folder;
  std::string text = "\xef\xbb\xbf";
  for (int i = 0; text.size() < 5'000'000; ++i) text += std::to_string(i) + "\xe2\x82\xac\n";
  const std::vector<std::string> want{"in|1|" + text.substr(3)};
  CHECK(read_all(write_bytes(folder / "t.txt.gz", gzip(text))) == want);
  CHECK(read_all(write_bytes(folder / "t.zst", compress(text))) == want);
  CHECK(read_all(write_bytes(folder / "e.gz", gzip(""))) == std::vector<std::string>{"in|1|"});
  const std::string cut = gzip(text).substr(0, 100'000);
  const auto seen = read_all(write_bytes(folder / "cut.txt.gz", cut));  // half a text is none
  CHECK(seen == std::vector<std::string>{
                    "1!the gzip data ends early: the file is truncated; copy it again"});
}

TEST_CASE("a text is split where a line matches") {
  TemporaryFolder folder;
  const std::string text =
      " \n = One = \n\nfirst\n = = Part = = \nmore\n = Two = \n = Three = \nlast";
  const std::string path = write_bytes(folder / "t.txt", text);
  CHECK(read_all(path, {.split_at = "^ = [^=]"}) ==
        std::vector<std::string>{"in|1| \n = One = \n\nfirst\n = = Part = = \nmore\n",
                                 "in|7| = Two = \n", "in|8| = Three = \nlast"});
  CHECK(read_all(path, {.split_at = "nowhere"}) == std::vector<std::string>{"in|1|" + text});
  CHECK(read_all(path, {.split_at = "^last$"}).size() == 2);
  CHECK(read_all(path, {.split_at = "^$"}).size() == 2);
  CHECK(read_all(write_bytes(folder / "t.gz", gzip(text)), {.split_at = "^ = (Two|Three) = $"})
            .size() == 3);
  CHECK(read_all(write_bytes(folder / "e.txt", ""), {.split_at = "x"}) ==
        std::vector<std::string>{"in|1|"});
  CHECK(contains(error_of([&] { read_all(path, {.split_at = "("}); }, ExitCode::kConfig),
                 "--split-at: \"(\" is not a regular expression"));
}

TEST_CASE("what is not text is told") {
  using namespace std::string_literals;
  TemporaryFolder folder;
  const std::string tar = "name" + std::string(253, '\0') + "ustar" + std::string(250, '\0');
  const std::pair<std::string, std::string> formats[] = {
      {gzip("text"), "gzip data, not text; rename the file so that it ends in .gz"},
      {compress("text"), "zstd data, not text; rename the file so that it ends in .zst"},
      {"BZh91AY&SY\x8b\xff\xff\xff\xff"s, "bzip2 data, not text; pipe it: bzcat "},
      {"\xfd"
       "7zXZ\0\0"s,
       "xz data, not text; pipe it: xzcat "},
      {"PAR1\x15\0\x15"s, "a Parquet file, not text; pipe it as JSONL: python -c"},
      {"ARROW1\0\0"s, "an Arrow file, not text; pipe it as JSONL"},
      {"\xff\xff\xff\xff\x10\0"s, "an Arrow stream (as datasets writes it), not text"},
      {"\x89HDF\r\n\x1a\n\0"s, "an HDF5 file, not text"},
      {"PK\x03\x04\x14\0"s, "a zip archive, not text; unpack it"},
      {tar, "a tar archive, not text; unpack it"},
      {"\x88\xd8\x34\x01\x01\0"s, "ids of tokens (llm.c), not text; libxlstm.TokenWriter"},
      {"\x93NUMPY\x01\0"s, "an array of numpy, not text"},
      {"MMIDIDX\0\0"s, "the index of a token file, not text; it is prepared already"},
      {"%PDF-1.7\n%\xb5\xed\xae\xfb\n"s, "a PDF document, not text; extract its text"},
      {"\xff\xfet\0"s, "text in UTF-16, not text; convert it: iconv"},
  };
  for (const auto& [bytes, message] : formats) {
    for (const char* name : {"t.txt", "t.jsonl"}) {
      const auto refused = [&](const std::string& path) {
        return error_of([&] { read_all(path); });
      };
      const std::string path = write_bytes(folder / name, bytes);
      CHECK(contains(refused(path), path + ": " + message));
      CHECK(contains(refused(write_bytes(folder / (name + ".gz"s), gzip(bytes))), message));
      CHECK(contains(error_of([&] { check_formats(find_texts({path}, {})); }), message));
    }
  }
  // Words that a text may begin with.
  for (const std::string& text : {"PAR1 and \xc3\xa9"s, "%PDF-1.7 begins a document"s, "BZh91AY"s})
    CHECK(read_all(write_bytes(folder / "w.txt", text)) ==
          std::vector<std::string>{"in|1|" + text});
}

TEST_CASE("documents of jsonl, plain and compressed") {
  TemporaryFolder folder;
  std::string text =
      "{\"text\":\"one\",\"meta\":{\"redpajama_set_name\":\"C4\"}}\r\n\n  "
      "\n{\"text\":\"two\"}\n{bad\n{\"text\":3}\n";
  std::vector<std::string> want{"C4|1|one", "in|4|two",
                                "5!not valid JSON at byte 2: expected a name in quotes",
                                "6!\"text\" is not a string, nor a list of segments"};
  for (int i = 7; i < 4000;
       ++i) {  // several buffers of the decompressor, lines across their borders
    const std::string word = std::to_string(i) + std::string(static_cast<size_t>(i % 300), 'x');
    text += "{\"text\":\"" + word + "\"}\n";
    want.push_back("in|" + std::to_string(i) + "|" + word);
  }
  text += "{\"text\":\"last\"}";
  want.push_back("in|4000|last");
  CHECK(read_all(write_bytes(folder / "t.jsonl", text)) == want);
  const std::string packed = compress(text);
  CHECK(read_all(write_bytes(folder / "t.jsonl.zst", packed)) == want);
  CHECK(read_all(write_bytes(folder / "two.jsonl.zst", compress(text + "\n") + compress(""))) ==
        want);
  CHECK(read_all(write_bytes(folder / "empty.jsonl.zst", "")).empty());
  const std::string zipped = gzip(text), padding(100, '\0');
  CHECK(read_all(write_bytes(folder / "t.jsonl.gz", zipped)) == want);
  CHECK(read_all(write_bytes(folder / "two.jsonl.gz", gzip(text.substr(0, 5000)) + gzip("") +
                                                          gzip(text.substr(5000)) + padding)) ==
        want);
  CHECK(read_all(write_bytes(folder / "empty.jsonl.gz", "")).empty());
  const std::string marked = "\xef\xbb\xbf" + text;
  CHECK(read_all(write_bytes(folder / "marked.jsonl", marked)) == want);
  CHECK(read_all(write_bytes(folder / "marked.jsonl.zst", compress(marked))) == want);

  SECTION("a truncated file gives its whole documents and one problem") {
    for (const auto& [bytes, format] : {std::pair(packed, "zst"), std::pair(zipped, "gz")}) {
      for (const size_t size : {bytes.size() - 1, bytes.size() / 2, size_t{5}}) {
        const auto seen = read_all(
            write_bytes(folder / (std::string("cut.jsonl.") + format), bytes.substr(0, size)));
        REQUIRE_FALSE(seen.empty());
        CHECK(contains(seen.back(), "data ends early: the file is truncated"));
        CHECK(std::equal(seen.begin(), seen.end() - 1, want.begin()));
        if (bytes == zipped && size > 1000) CHECK(seen.size() > 1000);
      }
    }
  }
  SECTION("a damaged file") {
    const auto seen = read_all(write_bytes(folder / "bad.jsonl.zst", "this is not zstd"));
    REQUIRE(seen.size() == 1);
    CHECK(contains(seen[0], "1!damaged zstd data"));
    const auto not_gzip = read_all(write_bytes(folder / "bad.jsonl.gz", "this is not gzip"));
    REQUIRE(not_gzip.size() == 1);
    CHECK(contains(not_gzip[0], "1!damaged gzip data (incorrect header check)"));
    std::string flipped = zipped;
    flipped[flipped.size() / 2] ^= 0x55;
    const auto some = read_all(write_bytes(folder / "flipped.jsonl.gz", flipped));
    CHECK(some.size() < want.size() + 1);
    CHECK(contains(some.back(), "!damaged gzip data"));
  }
}
