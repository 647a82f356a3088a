// Tokenizers: bytes, and the child process with its faults.
#include "csrc/data/tokenizer.h"

#include <unistd.h>

#include <cstdlib>

#include "csrc/core/sha256.h"
#include "csrc/data/child_process.h"
#include "tests/data/data_files.h"

using namespace xlstm;
using namespace xlstm::data;
using namespace xlstm::testing;

namespace {

std::string write_script(const TemporaryFolder& folder, const std::string& body) {
  const std::string path = write_bytes(folder / "python", "#!/bin/sh\n" + body + "\n");
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  return path;
}

/// Words a, b, c, é and the end-of-document token.
std::string write_word_tokenizer(const TemporaryFolder& folder) {
  return write_bytes(folder / "words" / "tokenizer.json", R"({
    "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": null, "normalizer": null, "decoder": null,
    "added_tokens": [{"id": 5, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
      "pair": [], "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [5], "tokens": ["<|endoftext|>"]}}},
    "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "a": 1, "b": 2, "c": 3, "é": 4}}})");
}

bool have_tokenizers() {
  ChildProcess python({python_interpreter(), "-c", "import tokenizers"});
  python.wait_for_end();
  if (!python.ended_well())
    WARN("not tested: " << python_interpreter() << " has no tokenizers package");
  return python.ended_well();
}

/// A frame of the worker's protocol, as printf writes it.
std::string frame(char kind, const std::string& payload) {
  std::string octal;
  for (const char c : little_endian(payload.size(), 8)) {
    char digits[8];
    std::snprintf(digits, sizeof digits, "\\%03o", static_cast<unsigned char>(c));
    octal += digits;
  }
  return "printf '" + std::string(1, kind) + octal + payload + "'";
}

}  // namespace

TEST_CASE("bytes tokenizer") {
  const auto bytes = make_tokenizer("bytes");
  CHECK(bytes->vocab_size() == 256);
  CHECK(bytes->eos_id() == 0);
  CHECK(bytes->sha256().empty());
  CHECK(bytes->is_bytewise());
  CHECK(bytes->encode("a\xc3\xa9") == std::vector<int64_t>{97, 0xc3, 0xa9});
  CHECK(bytes->encode("").empty());
  CHECK(bytes->decode({97, 0xc3, 0xa9, 0}) == std::string("a\xc3\xa9\0", 4));
  CHECK(bytes->decode({97, 256, -1}) == "a\xef\xbf\xbd\xef\xbf\xbd");
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  CHECK(bytes->decode(bytes->encode(all)) == all);
  CHECK(tokenizer_files("bytes").empty());
  CHECK(tokenizer_sha256("bytes").empty());
}

TEST_CASE("tokenizer files by kind of folder") {
  TemporaryFolder folder;
  const std::string root = folder.string();
  CHECK(contains(error_of([&] { tokenizer_files(root); }), "this folder holds no tokenizer"));
  CHECK(contains(error_of([&] { tokenizer_files(root + "/nope"); }),
                 "no such tokenizer; give \"bytes\""));
  for (const auto& [first, second] :
       {std::pair<std::string, std::string>{"encoder.json", "vocab.bpe"},
        {"vocab.json", "merges.txt"}}) {
    write_bytes(folder / first, "1");
    error_of([&] { tokenizer_files(root + "/nope"); });
    write_bytes(folder / second, "2");
    CHECK(tokenizer_files(root) ==
          std::vector<std::string>{root + "/" + first, root + "/" + second});
  }
  CHECK(tokenizer_sha256(root) == sha256_hex(sha256_hex("1") + sha256_hex("2")));
  write_bytes(folder / "tokenizer.json", "3");
  CHECK(tokenizer_files(root) == std::vector<std::string>{root + "/tokenizer.json"});
  CHECK(tokenizer_files(root + "/tokenizer.json") ==
        std::vector<std::string>{root + "/tokenizer.json"});
  CHECK(tokenizer_sha256(root) == sha256_hex(sha256_hex("3")));
}

TEST_CASE("what belongs to a tokenizer lies beside it and is no part of it") {
  TemporaryFolder folder;
  const std::string root = folder.string();
  CHECK(tokenizer_companions("bytes").empty());
  CHECK_FALSE(error_of([&] { tokenizer_companions(root); }).empty());
  write_bytes(folder / "tokenizer.json", "3");
  CHECK(tokenizer_companions(root).empty());
  const std::string sha256 = tokenizer_sha256(root);
  for (const char* name : {"imported.json", "chat_template.jinja", "tokenizer_config.json", "x"})
    write_bytes(folder / name, "{}");
  for (const std::string& spec : {root, root + "/tokenizer.json"})
    CHECK(tokenizer_companions(spec) == std::vector<std::string>{root + "/tokenizer_config.json",
                                                                 root + "/chat_template.jinja",
                                                                 root + "/imported.json"});
  CHECK(tokenizer_sha256(root) == sha256);
}

TEST_CASE("a token before prompts, where weights were imported with one") {
  const auto bytes = make_tokenizer("bytes");
  CHECK(encode_prompt(*bytes, "ab") == std::vector<int64_t>{97, 98});
  CHECK(encode_prompt(*bytes, "").empty());
  if (!have_tokenizers()) return;
  TemporaryFolder folder;
  const std::string spec = write_word_tokenizer(folder);
  CHECK(make_tokenizer(spec)->bos_id() == -1);
  write_bytes(folder / "words" / "imported.json", R"({"bos_id": 5})");
  const auto words = make_tokenizer(spec);
  CHECK(words->bos_id() == 5);
  CHECK(encode_prompt(*words, "a b") == std::vector<int64_t>{5, 1, 2});
  CHECK(encode_prompt(*words, "<|endoftext|>a") == std::vector<int64_t>{5, 1});  // once
  CHECK(encode_prompt(*words, "") == std::vector<int64_t>{5});
  CHECK(words->encode("a b") == std::vector<int64_t>{1, 2});  // texts to train on have none
  write_bytes(folder / "words" / "imported.json", R"({"config": {}})");
  CHECK(make_tokenizer(spec)->bos_id() == -1);
  write_bytes(folder / "words" / "imported.json", "[");
  CHECK(contains(error_of([&] { make_tokenizer(spec); }), "imported.json"));
}

TEST_CASE("a tokenizer.json in its own process") {
  if (!have_tokenizers()) return;
  TemporaryFolder folder;
  const std::string spec = write_word_tokenizer(folder);
  const auto words = make_tokenizer(spec);
  CHECK(words->vocab_size() == 6);
  CHECK(words->eos_id() == 5);
  CHECK(words->sha256() == tokenizer_sha256(spec));
  CHECK_FALSE(words->is_bytewise());
  // Neither the template's end token nor the truncation to two tokens applies to documents.
  CHECK(words->encode("a b \xc3\xa9 zzz c") == std::vector<int64_t>{1, 2, 4, 0, 3});
  CHECK(words->encode("a<|endoftext|>b") == std::vector<int64_t>{1, 5, 2});
  CHECK(words->encode("").empty());
  CHECK(words->encode_batch({}).empty());
  CHECK(words->encode_batch({"a", "", "b b"}) ==
        std::vector<std::vector<int64_t>>{{1}, {}, {2, 2}});
  CHECK(words->decode({1, 4, 5}) == "a \xc3\xa9 <|endoftext|>");
  CHECK(words->decode({1, 999, 2}) == "a b");  // models may have more rows than the tokenizer
  CHECK(words->decode({}).empty());
  std::string many;
  for (int i = 0; i < 300'000; ++i) many += "a b ";  // larger than any pipe
  CHECK(words->encode(many).size() == 600'000);
  CHECK(contains(error_of([&] { words->decode({-1}); }), "a token id is negative"));
  CHECK(contains(error_of([&] { words->encode("\xff"); }), "can't decode byte 0xff"));
  CHECK(words->encode("a") == std::vector<int64_t>{1});  // it lives on after an error
  CHECK(contains(error_of([&] { make_tokenizer(write_bytes(folder / "bad.json", "{")); }),
                 "bad.json: not a tokenizer"));
}

TEST_CASE("a space before a text stands at a document's beginning alone") {
  if (!have_tokenizers()) return;
  TemporaryFolder folder;
  const auto with = [&](const std::string& name, const std::string& normalizer,
                        const std::string& pre_tokenizer) {
    return make_tokenizer(
        write_bytes(folder / name, R"({"version": "1.0", "truncation": null, "padding": null,
      "added_tokens": [], "decoder": null, "post_processor": null, "normalizer": )" +
                                       normalizer + R"(, "pre_tokenizer": )" + pre_tokenizer +
                                       R"(, "model": {"type": "BPE", "unk_token": "?",
      "vocab": {"?": 0, "a": 1, "▁": 2, "\u0120": 3, "▁a": 4, "\u0120a": 5}, "merges": ["▁ a", "\u0120 a"]}})"));
  };
  const std::string space = R"({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})";
  const std::string prepend = R"({"type": "Prepend", "prepend": "▁"})";
  struct Case {
    std::string name, normalizer, pre_tokenizer;
    int64_t a, space_a;
  };
  for (
      const Case& one :
      {Case{"llama", R"({"type": "Sequence", "normalizers": [)" + prepend + ", " + space + "]}",
            "null", 4, 4},
       Case{"prepend", prepend, "null", 4, 0},
       Case{
           "metaspace", "null",
           R"({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true})",
           4, 4},
       Case{
           "bytes", "null",
           R"({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": true,
                 "trim_offsets": true, "use_regex": true}]})",
           5, 5}}) {
    INFO(one.name);
    const auto tokenizer = with(one.name + ".json", one.normalizer, one.pre_tokenizer);
    CHECK(tokenizer->encode("a") == std::vector<int64_t>{one.a});
    const auto inside = tokenizer->encode_inside({"a", "", "aa"});
    CHECK(inside == std::vector<std::vector<int64_t>>{{1}, {}, {1, 1}});
    if (one.space_a > 0)
      CHECK(tokenizer->encode_inside({" a"}).at(0) == std::vector<int64_t>{one.space_a});
    CHECK(tokenizer->encode("a") == std::vector<int64_t>{one.a});  // still the other one
  }
}

TEST_CASE("GPT-2 files in their own process") {
  if (!have_tokenizers()) return;
  TemporaryFolder folder;
  write_bytes(
      folder / "vocab.json",
      "{\"a\":0,\"b\":1,\"\\u0120\":2,\"ab\":3,\"\\u0120ab\":4,\"<|endoftext|>\":5,\"\\u010a\":6}");
  write_bytes(folder / "merges.txt", "#version: 0.2\na b\n\xc4\xa0 ab\n");
  const auto tokenizer = make_tokenizer(folder.string());
  CHECK(tokenizer->vocab_size() == 7);
  CHECK(tokenizer->eos_id() == 5);
  CHECK(tokenizer->encode("ab ab ba\n") == std::vector<int64_t>{3, 4, 2, 1, 0, 6});
  CHECK(tokenizer->decode({3, 4, 2, 1, 0, 6}) == "ab ab ba\n");
}

TEST_CASE("faults of the tokenizer's process are one-line errors") {
  TemporaryFolder folder;
  const std::string spec = write_word_tokenizer(folder);
  const auto message = [&](const std::string& body) {
    const PythonIs python(write_script(folder, body));
    return error_of([&] { make_tokenizer(spec); });
  };
  {
    const PythonIs python("/nonexistent/python");
    CHECK(contains(error_of([&] { make_tokenizer(spec); }),
                   "/nonexistent/python: cannot run it: No such file or directory; name a Python"));
  }
  CHECK(contains(
      message("exit 3"),
      "ended with exit status 3; check that this Python runs, or name another by XLSTM_PYTHON"));
  CHECK(contains(message("kill -9 $$"), "ended with signal 9"));
  CHECK(contains(message(frame('X', "no tokenizers package")),
                 "tokenizer.json: no tokenizers package"));
  CHECK(contains(message("echo something else entirely"), "unexpected reply"));
  CHECK(contains(message(frame('H', "[]")), "unexpected reply"));
  CHECK(contains(message(frame('H', "{}")), "its vocabulary is empty"));
  CHECK(contains(message("printf 'H'"), "ended with exit status 0"));

  const std::string hello = frame('H', "{\"vocab_size\":6,\"eos_id\":5}");
  {
    const PythonIs python(write_script(folder, hello + "; exit 4"));
    const auto dead = make_tokenizer(spec);
    ::usleep(100'000);
    CHECK(contains(error_of([&] { dead->encode("a"); }), "ended with exit status 4"));
    CHECK(contains(error_of([&] { dead->encode(std::string(10'000'000, 'a')); }),
                   "ended with exit status 4"));
  }
  {
    const PythonIs python(write_script(
        folder, hello + "; head -c 26 >/dev/null; " + frame('E', "xxxxxxx") + "; cat >/dev/null"));
    const auto liar = make_tokenizer(spec);
    CHECK(contains(error_of([&] { liar->encode("a"); }), "short reply"));
  }
}

TEST_CASE("a Python without the tokenizers package is named") {
  TemporaryFolder folder;
  write_bytes(folder / "shadow" / "tokenizers.py", "raise ImportError('not here')");
  const char* old = std::getenv("PYTHONPATH");
  const std::string kept = old != nullptr ? old : "";
  ::setenv("PYTHONPATH", ((folder / "shadow").string() + ":" + kept).c_str(), 1);
  const std::string message = error_of([&] { make_tokenizer(write_word_tokenizer(folder)); });
  ::setenv("PYTHONPATH", kept.c_str(), 1);
  CHECK(contains(message, "has no `tokenizers` package (not here); install it with:"));
}
