#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/data/token_file.h"

namespace xlstm::data {

/// Text <-> token ids. "bytes" is built in; anything else runs libxlstm/tokenizer_worker.py in a child
/// process, by the Python that XLSTM_PYTHON names.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::vector<int64_t> encode(std::string_view text) = 0;
  /// Several texts at once, which costs a tokenizer in another process one round trip.
  virtual std::vector<std::vector<int64_t>> encode_batch(
      const std::vector<std::string_view>& texts) {
    std::vector<std::vector<int64_t>> ids;
    for (const auto text : texts) ids.push_back(encode(text));
    return ids;
  }
  /// The same for texts that go on in a document: what the tokenizer puts before a text, such as a space, is left out.
  virtual std::vector<std::vector<int64_t>> encode_inside(
      const std::vector<std::string_view>& texts) {
    return encode_batch(texts);
  }
  /// True where the tokens of a text are those of its pieces, cut anywhere.
  virtual bool is_bytewise() const { return false; }
  /// Any ids; invalid UTF-8 is possible for bytes.
  virtual std::string decode(const std::vector<int64_t>& ids) = 0;
  virtual int64_t vocab_size() const = 0;
  /// End-of-document token, or -1 where the tokenizer has none. bytes: 0 (NUL, which text does not contain).
  virtual int64_t eos_id() const = 0;
  /// The token that imported weights want before a prompt (imported.json of convert.py); -1: none.
  virtual int64_t bos_id() const { return -1; }
  /// sha256 over the tokenizer's files; "" for bytes.
  virtual std::string sha256() const = 0;
};

/// spec: one of kTokenizerSpecs (csrc/data/tokenizer_spec.h; encoder.json and vocab.bpe are GPT-2's original names).
/// Special tokens written out in the text become their ids; none is added.
/// Throws Error(kData): missing or unreadable files, no Python, no `tokenizers` package.
std::unique_ptr<Tokenizer> make_tokenizer(const std::string& spec);

/// The files that define a tokenizer, in a fixed order; none for "bytes". Copied into one folder under their own names
/// they are that tokenizer again (spec: the folder; for a spec that names a file, the copied file). Throws Error(kData).
std::vector<std::string> tokenizer_files(const std::string& spec);
/// What lies beside them in their folder and belongs to them, as far as it is there: transformers' files about the tokenizer and
/// about generation, and imported.json. They leave the tokens of a text as they are. Throws as tokenizer_files().
std::vector<std::string> tokenizer_companions(const std::string& spec);
/// The tokens of `text` behind bos_id(), if there is one and they do not begin with it themselves.
std::vector<int64_t> encode_prompt(Tokenizer& tokenizer, std::string_view text);
/// sha256 over the contents of tokenizer_files(); "" for "bytes". Starts no process.
std::string tokenizer_sha256(const std::string& spec);
/// Whether a file's tokens are those of the tokenizer `spec`; true where its sidecar does not say whose they are.
bool is_made_with(const Sidecar& sidecar, const std::string& spec);

}  // namespace xlstm::data
