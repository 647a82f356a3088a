#include "csrc/data/token_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <optional>
#include <system_error>

#include "csrc/core/error.h"
#include "csrc/data/sidecar.h"
#include "csrc/data/token_format.h"

namespace xlstm::data {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr int64_t kUint16Ids = 65536;
/// In the order in which they appear: a .loss before the .idx without which nothing is read, the sidecar last.
constexpr const char* kSuffixes[] = {".bin", ".loss", ".idx", ".meta.json"};

std::string parent_folder(const std::string& prefix) {
  const auto parent = std::filesystem::path(prefix).parent_path();
  return parent.empty() ? "." : parent.string();
}

void rename_file(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    throw std::system_error(errno, std::generic_category(), to);
}

/// The sidecar of what is there, or that which was to come last where the renames of finish() were interrupted; none where
/// there is no readable one.
std::optional<Sidecar> sidecar_there(const std::string& prefix) try {
  const std::string path = prefix + ".meta.json";
  const std::optional<Sidecar> sidecar = read_sidecar(path);
  return sidecar ? sidecar : read_sidecar(path + ".tmp");
} catch (const Error&) {
  return std::nullopt;
}

/// What a sidecar says of the file, beside what is to be made; "" where that is the same.
std::string difference(const std::optional<Sidecar>& there, const Sidecar& next) {
  if (!there) return "by what is not known (no sidecar .meta.json that can be read)";
  const std::string counts = " (" + std::to_string(there->num_documents) + " documents, " +
                             std::to_string(there->num_tokens) + " tokens)";
  if (there->command != next.command || next.command.empty())
    return "by another command" + counts + ": " + there->command;
  if (there->inputs_sha256.empty() || next.inputs_sha256.empty())
    return "by this command" + counts + ", but whether of the same input cannot be told";
  if (there->inputs_sha256 != next.inputs_sha256)
    return "by this command" + counts + ", but of other input, or of input that has changed since";
  if (there->tokenizer_sha256 != next.tokenizer_sha256)
    return "by this command" + counts + ", but with another tokenizer";
  return "";
}

/// Buffered, hashed output of small integers.
class IndexStream {
 public:
  explicit IndexStream(const std::string& path) : file_(path) {}
  template <typename T>
  void put(T value) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
    buffer_.insert(buffer_.end(), bytes, bytes + sizeof value);
    if (buffer_.size() >= kBufferBytes) flush();
  }
  std::string close() {
    flush();
    file_.sync_and_close();
    return hash_.hex_digest();
  }

 private:
  void flush() {
    file_.write(buffer_.data(), buffer_.size());
    hash_.update(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
  OutputFile file_;
  Sha256 hash_;
  std::vector<unsigned char> buffer_;
};

}  // namespace

std::string output_prefix(const std::string& name) {
  std::string prefix = token_file_prefix(name);
  if (std::filesystem::path(prefix).filename().empty())
    throw Error(ExitCode::kConfig, "the output \"" + prefix +
                                       "\" names a folder, expected a prefix: " + prefix + "NAME");
  return prefix;
}

void check_replaceable(const std::string& prefix, const Sidecar& next) {
  for (const char* suffix : kSuffixes) {
    std::error_code ignored;
    if (!std::filesystem::exists(prefix + suffix, ignored)) continue;
    const std::string made = difference(sidecar_there(prefix), next);
    if (made.empty()) return;
    throw Error(ExitCode::kConfig, prefix + suffix + " is there already, made " + made +
                                       "; choose another name, or replace it (--overwrite of "
                                       "xlstm-data, overwrite=True in Python)");
  }
}

TokenWriter::TokenWriter(const std::string& prefix, int64_t vocab_size)
    : prefix_(prefix),
      vocab_size_(vocab_size),
      dtype_code_(
          static_cast<int>(vocab_size <= kUint16Ids ? DtypeCode::kUint16 : DtypeCode::kInt32)) {
  if (vocab_size < 1 || vocab_size > int64_t{std::numeric_limits<int32_t>::max()} + 1)
    throw Error(ExitCode::kData,
                "vocabulary of " + std::to_string(vocab_size) +
                    " ids: token files hold ids of 0 to 2^31-1; use another tokenizer");
  std::error_code error;
  std::filesystem::create_directories(parent_folder(prefix), error);
  if (error)
    throw Error(ExitCode::kData, parent_folder(prefix) + ": cannot create: " + error.message() +
                                     "; choose an output folder that can be written");
  lock_ = std::make_unique<FileLock>(prefix_ + ".bin.tmp", prefix_);
  bin_ = std::make_unique<OutputFile>(prefix_ + ".bin.tmp");
  buffer_.reserve(kBufferBytes);
}

TokenWriter::~TokenWriter() {
  if (bin_ == nullptr) return;
  for (const char* suffix : kSuffixes) ::unlink((prefix_ + suffix + ".tmp").c_str());
}

void TokenWriter::append(const int64_t* ids, int64_t count, bool counted) {
  if (count > 0 && counted != (loss_borders_.size() % 2 == 1)) loss_borders_.push_back(num_tokens_);
  if (counted) num_counted_tokens_ += count;
  while (count > 0) {
    const int64_t part = std::min(count, max_sequence_ - sequence_tokens_);
    if (part == 0) {  // the index counts a sequence's tokens in 32 bits
      end_sequence();
      continuations_.push_back(static_cast<int64_t>(lengths_.size()));
      continue;
    }
    if (dtype_code_ == static_cast<int>(DtypeCode::kUint16)) {
      store<uint16_t>(ids, part);
    } else {
      store<int32_t>(ids, part);
    }
    ids += part;
    count -= part;
    sequence_tokens_ += part;
    num_tokens_ += part;
  }
}

template <typename T>
void TokenWriter::store(const int64_t* ids, int64_t count) {
  int64_t smallest = 0, largest = max_id_;
  for (int64_t i = 0; i < count; ++i) {
    smallest = std::min(smallest, ids[i]);
    largest = std::max(largest, ids[i]);
  }
  if (smallest < 0 || largest >= vocab_size_) {
    const int64_t bad =
        *std::find_if(ids, ids + count, [&](int64_t id) { return id < 0 || id >= vocab_size_; });
    throw Error(ExitCode::kData,
                "token id " + std::to_string(bad) + " is beyond the tokenizer's vocabulary of " +
                    std::to_string(vocab_size_) +
                    "; the ids are of another one, or its files do not belong together");
  }
  max_id_ = largest;
  while (count > 0) {
    const size_t used = buffer_.size();
    const auto part = static_cast<size_t>(
        std::min<int64_t>(count, static_cast<int64_t>((kBufferBytes - used) / sizeof(T))));
    buffer_.resize(used + part * sizeof(T));
    T* out = reinterpret_cast<T*>(buffer_.data() + used);
    for (size_t i = 0; i < part; ++i) out[i] = static_cast<T>(ids[i]);
    ids += part;
    count -= static_cast<int64_t>(part);
    if (buffer_.size() == kBufferBytes) {
      write_bin(buffer_.data(), buffer_.size());
      buffer_.clear();
    }
  }
}

void TokenWriter::write_bin(const void* data, size_t size_bytes) {
  bin_->write(data, size_bytes);
  bin_hash_.update(data, size_bytes);
}

void TokenWriter::end_sequence() {
  lengths_.push_back(static_cast<int32_t>(sequence_tokens_));
  sequence_tokens_ = 0;
}

void TokenWriter::end_document() {
  end_sequence();
  ++num_documents_;
}

std::string TokenWriter::write_index() {
  IndexStream index(prefix_ + ".idx.tmp");
  for (const char byte : kIndexMagic) index.put(byte);
  index.put(kIndexVersion);
  index.put(static_cast<uint8_t>(dtype_code_));
  index.put(static_cast<uint64_t>(lengths_.size()));
  index.put(static_cast<uint64_t>(num_documents_) + 1);
  for (const int32_t length : lengths_) index.put(length);
  int64_t offset = 0;
  for (const int32_t length : lengths_) {
    index.put(offset);
    offset += int64_t{length} * static_cast<int64_t>(dtype_bytes(dtype_code_));
  }
  auto continuation = continuations_.begin();
  for (int64_t sequence = 0; sequence <= static_cast<int64_t>(lengths_.size()); ++sequence) {
    if (continuation != continuations_.end() && *continuation == sequence) {
      ++continuation;
    } else {
      index.put(sequence);
    }
  }
  return index.close();
}

std::string TokenWriter::write_loss() {
  if (num_counted_tokens_ == num_tokens_) return "";
  if (loss_borders_.empty() || loss_borders_.back() != num_tokens_)
    loss_borders_.push_back(num_tokens_);
  IndexStream positions(prefix_ + ".loss.tmp");
  for (const int64_t position : loss_borders_) positions.put(position);
  return positions.close();
}

void TokenWriter::finish(Sidecar sidecar) {
  write_bin(buffer_.data(), buffer_.size());
  bin_->sync_and_close();
  sidecar.bin_sha256 = bin_hash_.hex_digest();
  sidecar.idx_sha256 = write_index();
  sidecar.loss_sha256 = write_loss();
  sidecar.vocab_size = vocab_size_;
  sidecar.num_tokens = num_tokens_;
  sidecar.num_counted_tokens = num_counted_tokens_;
  sidecar.num_documents = num_documents_;
  sidecar.max_token_id = max_id_;
  OutputFile meta(prefix_ + ".meta.json.tmp");
  meta.write(format_sidecar(sidecar));
  meta.sync_and_close();
  // The old sidecar goes first and the new one comes last: whatever happens between, no sidecar describes other files.
  const std::string folder = parent_folder(prefix_);
  ::unlink((prefix_ + ".meta.json").c_str());
  ::unlink((prefix_ + ".idx").c_str());
  ::unlink((prefix_ + ".loss").c_str());
  sync_directory(folder);
  for (const std::string suffix : kSuffixes) {
    if (suffix == ".loss" && sidecar.loss_sha256.empty()) continue;
    rename_file(prefix_ + suffix + ".tmp", prefix_ + suffix);
    sync_directory(folder);
  }
  bin_.reset();
  lock_.reset();
}

}  // namespace xlstm::data
