#include "csrc/data/tokenizer.h"

#include <filesystem>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/tokenizer_process.h"
#include "csrc/data/tokenizer_spec.h"

namespace xlstm::data {
namespace {

constexpr int64_t kByteValues = 256;
constexpr const char* kReplacement = "\xef\xbf\xbd";  // U+FFFD

/// UTF-8 bytes as ids. NUL (0) ends a document; a NUL inside a text is kept as it is, since documents begin and end
/// where the index says and not where an id is found.
class BytesTokenizer final : public Tokenizer {
 public:
  std::vector<int64_t> encode(std::string_view text) override {
    std::vector<int64_t> ids(text.size());
    for (size_t i = 0; i < text.size(); ++i) ids[i] = static_cast<unsigned char>(text[i]);
    return ids;
  }
  bool is_bytewise() const override { return true; }
  std::string decode(const std::vector<int64_t>& ids) override {
    std::string text;
    for (const int64_t id : ids) {
      if (id >= 0 && id < kByteValues) {
        text += static_cast<char>(static_cast<unsigned char>(id));
      } else {
        text += kReplacement;  // models may have more rows than there are bytes
      }
    }
    return text;
  }
  int64_t vocab_size() const override { return kByteValues; }
  int64_t eos_id() const override { return 0; }
  std::string sha256() const override { return ""; }
};

bool is_file(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

}  // namespace

std::vector<std::string> tokenizer_files(const std::string& spec) {
  if (spec == "bytes") return {};
  const std::filesystem::path path = spec;
  std::error_code error;
  if (is_file(path)) return {spec};
  if (!std::filesystem::is_directory(path, error))
    throw Error(ExitCode::kData, spec + ": no such tokenizer; give " + kTokenizerSpecs);
  if (is_file(path / "tokenizer.json")) return {path / "tokenizer.json"};
  if (is_file(path / "vocab.json") && is_file(path / "merges.txt"))
    return {path / "vocab.json", path / "merges.txt"};
  if (is_file(path / "encoder.json") && is_file(path / "vocab.bpe"))
    return {path / "encoder.json", path / "vocab.bpe"};
  throw Error(ExitCode::kData, spec + ": this folder holds no tokenizer; give " + kTokenizerSpecs);
}

std::vector<std::string> tokenizer_companions(const std::string& spec) {
  const std::vector<std::string> files = tokenizer_files(spec);
  std::vector<std::string> companions;
  if (files.empty()) return companions;
  const std::filesystem::path folder = std::filesystem::path(files.front()).parent_path();
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json",
                           "chat_template.jinja", "generation_config.json", "imported.json"})
    if (is_file(folder / name)) companions.push_back(folder / name);
  return companions;
}

std::vector<int64_t> encode_prompt(Tokenizer& tokenizer, std::string_view text) {
  std::vector<int64_t> ids = tokenizer.encode(text);
  const int64_t bos = tokenizer.bos_id();
  if (bos >= 0 && (ids.empty() || ids.front() != bos)) ids.insert(ids.begin(), bos);
  return ids;
}

std::string tokenizer_sha256(const std::string& spec) {
  std::string digests;
  for (const auto& file : tokenizer_files(spec)) digests += sha256_file(file);
  return digests.empty() ? "" : sha256_hex(digests);
}

bool is_made_with(const Sidecar& sidecar, const std::string& spec) {
  if (sidecar.tokenizer == "bytes") return spec == "bytes";
  return sidecar.tokenizer_sha256.empty() || sidecar.tokenizer_sha256 == tokenizer_sha256(spec);
}

std::unique_ptr<Tokenizer> make_tokenizer(const std::string& spec) {
  if (spec == "bytes") return std::make_unique<BytesTokenizer>();
  return make_process_tokenizer(tokenizer_files(spec), tokenizer_sha256(spec));
}

}  // namespace xlstm::data
