#pragma once
// Megatron's .bin/.idx pair, read through a memory map, with what libxlstm adds: the sidecar .meta.json, and .loss where not
// all tokens count (csrc/data/token_format.h).
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "csrc/core/file.h"

namespace xlstm::data {

/// What `<prefix>.meta.json` says (written by prepare; other tools ignore it).
struct Sidecar {
  std::string bin_sha256, idx_sha256;
  std::string loss_sha256;       ///< "" where all tokens count
  std::string tokenizer;         ///< "bytes" or the path it was prepared with
  std::string tokenizer_sha256;  ///< of the tokenizer's files; "" for bytes
  int64_t vocab_size = 0, eos_id = -1;
  int64_t num_tokens = 0, num_documents = 0, max_token_id = -1;
  int64_t num_bytes = 0;  ///< UTF-8 bytes of the source text (bits per byte)
  int64_t num_counted_tokens = 0, num_counted_bytes = 0;  ///< of them, those that count
  std::map<std::string, int64_t>
      source_documents;  ///< documents per source (file, or meta.redpajama_set_name)
  std::string command;
  /// Over names, sizes and times of the files it was made of; "" where that is not known, as of standard input
  std::string inputs_sha256;
};

/// The prefix that a name means: ".bin" or ".idx" at its end is left out.
std::string token_file_prefix(const std::string& name);

enum class Verify { kNone, kSizes, kSha256 };

class TokenFile {
 public:
  /// Opens <prefix>.bin/.idx (a name ending in .bin or .idx is accepted). Checks magic, version, dtype, sizes, bounds,
  /// and with kSha256 the sidecar's hashes; .loss is held against them in any case. Throws Error(kData) naming the file and the fix.
  explicit TokenFile(const std::string& prefix, Verify verify = Verify::kSizes);
  const std::string& prefix() const { return prefix_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return num_documents_; }
  /// First token of document d; document_start(num_documents()) = num_tokens().
  int64_t document_start(int64_t document) const {
    return document_starts_[static_cast<size_t>(document)];
  }
  /// Copies tokens [first, first+count) as int64.
  void read(int64_t first, int64_t count, int64_t* out) const;
  /// Sets out[i] = 1 where token first+i starts a document.
  void read_document_starts(int64_t first, int64_t count, uint8_t* out) const;
  /// Tokens that count in the loss, as targets: all without a .loss file.
  int64_t num_counted_tokens() const { return num_counted_tokens_; }
  /// Sets out[i] = 1 where token first+i counts.
  void read_counted(int64_t first, int64_t count, uint8_t* out) const;
  const std::optional<Sidecar>& sidecar() const { return sidecar_; }
  /// Largest id: the sidecar's when present, else a scan. Throws when it does not fit vocab_size, with its position.
  void check_vocab(int64_t vocab_size) const;
  /// Identifies the content for resumption: from the sidecar's hash, else sizes.
  std::string fingerprint() const;

 private:
  std::string prefix_;
  void open_loss(Verify verify);

  MappedFile bin_, idx_, loss_;
  int dtype_code_ = 0;
  int64_t num_tokens_ = 0, num_documents_ = 0;
  std::vector<int64_t> document_starts_;
  std::span<const int64_t> loss_borders_;  ///< the positions of .loss; none where all tokens count
  int64_t num_counted_tokens_ = 0;
  std::optional<Sidecar> sidecar_;
};

}  // namespace xlstm::data
