#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace xlstm::data {

/// Text <-> token ids. "bytes" is built in; anything else runs `python -m libxlstm.tokenizer_worker` as a child process.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::vector<int64_t> encode(std::string_view text) = 0;
  /// Any ids; invalid UTF-8 is possible for bytes.
  virtual std::string decode(const std::vector<int64_t>& ids) = 0;
  virtual int64_t vocab_size() const = 0;
  /// End-of-document token, or -1 where the tokenizer has none. bytes: 0 (NUL, which text does not contain).
  virtual int64_t eos_id() const = 0;
  /// sha256 over the tokenizer's files; "" for bytes.
  virtual std::string sha256() const = 0;
};

/// spec: "bytes", a tokenizer.json, or a folder with tokenizer.json or vocab.json + merges.txt. Throws Error(kData).
std::unique_ptr<Tokenizer> make_tokenizer(const std::string& spec);

}  // namespace xlstm::data
