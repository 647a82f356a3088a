// Preparation on the fly: splits, reuse, several processes at once.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "csrc/data/file_lock.h"
#include "csrc/data/prepare.h"
#include "csrc/data/tokenizer.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

namespace fs = std::filesystem;

CachedText cached(const TemporaryFolder& folder, const std::string& text, double fraction = 0.1,
                  const std::string& split = "tail", const std::string& val_text = "") {
  return prepare_cached({.text = text,
                         .val_text = val_text,
                         .val_fraction = fraction,
                         .val_split = split,
                         .cache_dir = (folder / "cache").string()});
}

std::string text_of(const std::string& prefix) {
  return make_tokenizer("bytes")->decode(all_tokens(TokenFile(prefix, Verify::kSha256)));
}

int64_t entries(const fs::path& folder) {
  return std::distance(fs::directory_iterator(folder), fs::directory_iterator());
}

}  // namespace

TEST_CASE("tail split cuts each file at a character") {
  TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 333; ++i)
    text += "\xe2\x82\xac";  // 999 bytes; 90 % of it lies inside a character
  write_bytes(folder / "t" / "a.txt", text);
  write_bytes(folder / "t" / "b.txt", "0123456789");
  const CachedText result = cached(folder, (folder / "t").string());
  const std::string train = text_of(result.train_prefix), val = text_of(result.val_prefix);
  const auto size = static_cast<size_t>(999 * 0.9) / 3 * 3;
  CHECK(train == text.substr(0, size) + '\0' + "012345678" + '\0');
  CHECK(val == text.substr(size) + '\0' + "9" + '\0');
  SECTION("nanoGPT's split of one file: int(n * 0.9) bytes") {
    write_bytes(folder / "one.txt", std::string(1115394, 'x'));
    const CachedText one = cached(folder, (folder / "one.txt").string());
    CHECK(TokenFile(one.train_prefix).num_tokens() == 1003854 + 1);
    CHECK(TokenFile(one.val_prefix).num_tokens() == 111540 + 1);
  }
}

TEST_CASE("split by file keeps files whole") {
  TemporaryFolder folder;
  for (int i = 0; i < 200; ++i)
    write_bytes(folder / "t" / (std::to_string(i) + ".txt"), "text " + std::to_string(i));
  const CachedText result = cached(folder, (folder / "t").string(), 0.2, "file");
  const TokenFile train(result.train_prefix), val(result.val_prefix);
  CHECK(train.num_documents() + val.num_documents() == 200);
  CHECK(val.num_documents() > 20);
  CHECK(val.num_documents() < 60);
  const std::string held_out = text_of(result.val_prefix);
  // Which files are held out depends on names alone: in another folder, the same ones.
  fs::copy(folder / "t", folder / "elsewhere", fs::copy_options::recursive);
  CHECK(text_of(cached(folder, (folder / "elsewhere").string(), 0.2, "file").val_prefix) ==
        held_out);

  // Files of one name in several folders are told apart.
  for (int i = 0; i < 20; ++i)
    write_bytes(folder / "many" / std::to_string(i) / "t.txt", "text " + std::to_string(i));
  for (const char* text : {"many", "many/*/t.txt", "many/*"}) {
    const CachedText many = cached(folder, (folder / text).string(), 0.5, "file");
    const int64_t count = TokenFile(many.val_prefix).num_documents();
    CHECK((count > 4 && count < 16));
    CHECK(text_of(many.val_prefix) ==
          text_of(cached(folder, (folder / "many").string(), 0.5, "file").val_prefix));
  }

  write_bytes(folder / "two" / "a.txt", "first");
  CHECK(contains(error_of([&] { cached(folder, (folder / "two").string(), 0.1, "file"); }),
                 "one file cannot be split by file; set data.val_split=tail"));
  write_bytes(folder / "two" / "b.txt", "second");
  for (const double fraction : {0.001, 0.999}) {  // at least one file on either side
    const CachedText two = cached(folder, (folder / "two").string(), fraction, "file");
    CHECK(TokenFile(two.train_prefix).num_documents() == 1);
    CHECK(TokenFile(two.val_prefix).num_documents() == 1);
  }
}

TEST_CASE("lines of jsonl are held out whole") {
  TemporaryFolder folder;
  std::string lines;
  for (int i = 0; i < 500; ++i) lines += "{\"text\":\"<" + std::to_string(i) + ">\"}\n";
  write_bytes(folder / "t.jsonl", lines);
  const CachedText result = cached(folder, (folder / "t.jsonl").string(), 0.1);
  const TokenFile train(result.train_prefix), val(result.val_prefix);
  CHECK(train.num_documents() + val.num_documents() == 500);
  CHECK(val.num_documents() > 25);
  CHECK(val.num_documents() < 90);
  const std::string seen = text_of(result.train_prefix), held_out = text_of(result.val_prefix);
  for (int i = 0; i < 500; ++i) {
    const std::string word = "<" + std::to_string(i) + ">";
    REQUIRE((seen.find(word) == std::string::npos) != (held_out.find(word) == std::string::npos));
  }
  // Which ones depends on the file's name and not on where it lies, nor on how it was named.
  write_bytes(folder / "elsewhere" / "t.jsonl", lines);
  for (const char* text : {"elsewhere/t.jsonl", "elsewhere", "elsewhere/*.jsonl", "e*e"}) {
    const CachedText other = cached(folder, (folder / text).string(), 0.1);
    const bool varies = std::string(text) == "e*e";  // then the folder is a part of the name
    CHECK((text_of(other.val_prefix) == held_out) != varies);
  }
}

TEST_CASE("another text can be held out, or none") {
  TemporaryFolder folder;
  const std::string train = write_bytes(folder / "a.txt", "train text"),
                    val = write_bytes(folder / "b.txt", "other");
  const CachedText both = cached(folder, train, 0.5, "tail", val);
  CHECK(text_of(both.train_prefix) == std::string("train text") + '\0');
  CHECK(text_of(both.val_prefix) == std::string("other") + '\0');
  write_bytes(folder / "t" / "train.txt", "train");
  const std::string inside = write_bytes(folder / "t" / "held_out.txt", "held out"),
                    all = (folder / "t").string();
  fs::create_hard_link(inside, folder / "t2.txt");  // the same by another name
  for (const std::string& held_out : {inside, (folder / "t2.txt").string(), all})
    CHECK(contains(error_of([&] { cached(folder, all, 0.1, "tail", held_out); }, ExitCode::kConfig),
                   " is a part of data.text (" + all + "), too"));
  const CachedText none = cached(folder, train, 0);
  CHECK(none.val_prefix.empty());
  CHECK(text_of(none.train_prefix) == std::string("train text") + '\0');
}

TEST_CASE("the cache is reused until text or settings change") {
  TemporaryFolder folder;
  const std::string text = write_bytes(folder / "a.txt", "some text to train on");
  const CachedText first = cached(folder, text);
  const auto written = fs::last_write_time(first.train_prefix + ".bin");
  CHECK(cached(folder, text).train_prefix == first.train_prefix);
  CHECK(fs::last_write_time(first.train_prefix + ".bin") == written);
  CHECK(cached(folder, text, 0.2).train_prefix != first.train_prefix);
  const std::string other = write_bytes(folder / "b.txt", "held out");
  CHECK(cached(folder, text, 0.1, "tail", other).train_prefix != first.train_prefix);
  const auto time = fs::last_write_time(text);
  write_bytes(text, "same size, other text");
  fs::last_write_time(text, time + std::chrono::seconds(1));
  const CachedText changed = cached(folder, text);
  CHECK(changed.train_prefix != first.train_prefix);
  CHECK(text_of(changed.train_prefix) == std::string("same size, other t") + '\0');
  CHECK(entries(folder / "cache") == 4);

  SECTION("the key of the text counts") {
    const std::string lines =
        write_bytes(folder / "a.jsonl", "{\"text\":\"first\",\"content\":\"second\"}\n");
    CacheOptions options{
        .text = lines, .val_fraction = 0, .cache_dir = (folder / "cache").string()};
    const CachedText texts = prepare_cached(options);
    options.text_key = "content";
    const CachedText contents = prepare_cached(options);
    CHECK(text_of(texts.train_prefix) == std::string("first") + '\0');
    CHECK(text_of(contents.train_prefix) == std::string("second") + '\0');
  }
  SECTION("a damaged or half-written entry is prepared again") {
    write_bytes(changed.train_prefix + ".bin", "x");
    fs::remove(changed.val_prefix + ".meta.json");
    CHECK(cached(folder, text).train_prefix == changed.train_prefix);
    CHECK(text_of(changed.train_prefix) == std::string("same size, other t") + '\0');
    CHECK(text_of(changed.val_prefix) == std::string("ext") + '\0');
  }
}

TEST_CASE("many processes may prepare the same text at once") {
  TemporaryFolder folder;
  std::string words;
  for (int i = 0; i < 200'000; ++i) words += std::to_string(i) + " ";
  const std::string text = write_bytes(folder / "a.txt", words);
  std::vector<pid_t> children;
  for (int i = 0; i < 6; ++i) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      int status = 1;
      try {
        const CachedText result = cached(folder, text);
        status = text_of(result.train_prefix).size() + text_of(result.val_prefix).size() ==
                         words.size() + 2
                     ? 0
                     : 2;
      } catch (...) {
        status = 3;
      }
      ::_exit(status);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
  }
  CHECK(entries(folder / "cache") == 1);
  for (const auto& entry : fs::recursive_directory_iterator(folder / "cache"))
    CHECK(entry.path().extension() != ".tmp");
}

TEST_CASE("preparation can be ended, and leaves nothing half-written") {
  struct Ended {};
  TemporaryFolder folder;
  const std::string text = write_bytes(folder / "t.txt", std::string(300000, 'a'));
  const std::string cache = (folder / "cache").string();
  int calls = 0;
  CHECK_THROWS_AS(prepare_cached({.text = text, .cache_dir = cache},
                                 [&] {
                                   if (++calls == 5) throw Ended();  // inside the one document
                                 }),
                  Ended);
  const fs::path entry = *fs::directory_iterator(cache);
  CHECK(entries(entry) == 1);  // the lock
  {
    const FileLock held(entry / "lock", "text");
    calls = 0;
    CHECK_THROWS_AS(prepare_cached({.text = text, .cache_dir = cache},
                                   [&] {
                                     if (++calls == 3) throw Ended();  // while it waits
                                   }),
                    Ended);
    CHECK(entries(entry) == 1);
  }
  CHECK(text_of(prepare_cached({.text = text, .cache_dir = cache}).val_prefix).size() == 30001);
}

TEST_CASE("a text that every run reads is not standard input") {
  TemporaryFolder folder;
  CHECK(contains(error_of([&] { cached(folder, "-"); }, ExitCode::kConfig),
                 "standard input (-) can be read only once"));
}

TEST_CASE("wrong split settings and too small texts are errors") {
  TemporaryFolder folder;
  const std::string text = write_bytes(folder / "a.txt", "a");
  CHECK(contains(error_of([&] { cached(folder, text, 0.1, "head"); }, ExitCode::kConfig),
                 "expected tail or file"));
  error_of([&] { cached(folder, text, 1.0); }, ExitCode::kConfig);
  error_of([&] { cached(folder, text, -0.1); }, ExitCode::kConfig);
  CHECK(contains(error_of([&] { cached(folder, text); }),
                 "no text in it (1 files, 0 empty and 0 bad documents); give more text, another "
                 "data.val_fraction, or a data.val_text"));
  CHECK(contains(error_of([&] {
                   prepare_cached({.text = text, .val_fraction = 0, .cache_dir = text + "/cache"});
                 }),
                 "set data.cache_dir to a folder that can be written"));
}

TEST_CASE("python-stdlib finds Python's own sources") {
  TemporaryFolder folder;
  const CachedText result = cached(folder, "python-stdlib", 0.1, "file");
  const TokenFile train(result.train_prefix), val(result.val_prefix);
  CHECK(train.num_tokens() > 3'000'000);
  CHECK(val.num_tokens() > 200'000);
  const std::string source = text_of(result.train_prefix) + text_of(result.val_prefix);
  CHECK(contains(source, "class OrderedDict"));
  {
    const PythonIs python("/nonexistent/python");
    CHECK(contains(error_of([&] { cached(folder, "python-stdlib"); }),
                   "/nonexistent/python: cannot run it"));
  }
  const PythonIs python("/bin/false");
  CHECK(contains(error_of([&] { cached(folder, "python-stdlib"); }),
                 "does not tell its standard library (exit status 1)"));
}
