#pragma once
// Writes Megatron's .bin/.idx pair and the sidecar, streaming, with .loss where not all tokens count.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/core/file.h"
#include "csrc/core/sha256.h"
#include "csrc/data/file_lock.h"
#include "csrc/data/token_file.h"

namespace xlstm::data {

/// The prefix that an output's name means, as token_file_prefix has it. Throws Error(kConfig) where it names a folder.
std::string output_prefix(const std::string& name);

/// Throws Error(kConfig) where a token file of this prefix is there already (or a part of one), and tells what it is. One that
/// the same command made of the same inputs with the same tokenizer may be made again: what `next` says of these is compared.
/// So may what is left where such a command was interrupted.
void check_replaceable(const std::string& prefix, const Sidecar& next);

/// Tokens are stored as uint16 for vocabularies of up to 65536 ids, else as int32. (Bytes would fit uint8, but several
/// readers of the format only know the two types that Megatron itself writes.) Everything goes into `<prefix>.*.tmp`;
/// finish() syncs and renames, the sidecar last, so that a sidecar proves a whole pair. Without finish() the temporary
/// files are removed. Throws std::system_error from the file system, Error(kData) for ids beyond the vocabulary.
class TokenWriter {
 public:
  TokenWriter(const std::string& prefix, int64_t vocab_size);
  ~TokenWriter();
  TokenWriter(const TokenWriter&) = delete;
  TokenWriter& operator=(const TokenWriter&) = delete;

  /// Appends to the document under construction. counted: whether these tokens count in the loss.
  void append(const int64_t* ids, int64_t count, bool counted = true);
  /// Ends the document under construction; one without tokens is recorded as such.
  void end_document();
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_counted_tokens() const { return num_counted_tokens_; }
  int64_t num_documents() const { return num_documents_; }
  /// Completes the pair. Counts of tokens and documents, largest id and hashes of `sidecar` are filled in here.
  void finish(Sidecar sidecar);

  /// Tokens per sequence of the index; a longer document becomes several sequences. For tests smaller than 2^31-1.
  void set_max_sequence(int64_t tokens) { max_sequence_ = tokens; }

 private:
  template <typename T>
  void store(const int64_t* ids, int64_t count);
  void write_bin(const void* data, size_t size_bytes);
  void end_sequence();
  std::string write_index();
  std::string write_loss();

  std::string prefix_;
  int64_t vocab_size_;
  int dtype_code_;
  std::unique_ptr<FileLock> lock_;
  std::unique_ptr<OutputFile> bin_;
  Sha256 bin_hash_;
  std::vector<unsigned char> buffer_;
  std::vector<int32_t> lengths_;        ///< tokens of each finished sequence
  std::vector<int64_t> continuations_;  ///< sequences that continue the document of the one before
  int64_t max_sequence_ = INT32_MAX;
  int64_t sequence_tokens_ = 0;
  std::vector<int64_t> loss_borders_;  ///< where counting begins and ends, in turn
  int64_t num_tokens_ = 0, num_counted_tokens_ = 0, num_documents_ = 0;
  int64_t max_id_ = -1;
};

}  // namespace xlstm::data
