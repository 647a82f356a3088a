#include "csrc/data/token_file.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <mutex>
#include <set>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/sidecar.h"
#include "csrc/data/token_format.h"

namespace xlstm::data {
namespace {

/// Files up to this size are scanned for ids beyond the vocabulary at the start (a fraction of a second); larger ones
/// rely on the sidecar's largest id, which read() enforces.
constexpr size_t kScanBytes = size_t{256} << 20;
constexpr int64_t kScanChunk = 1 << 16;

[[noreturn]] void refuse(const std::string& path, const std::string& what, const std::string& fix) {
  throw Error(ExitCode::kData, path + ": " + what + "; " + fix);
}

MappedFile open_part(const std::string& prefix, const char* suffix) {
  const std::string path = prefix + suffix;
  std::error_code error;
  if (!std::filesystem::exists(path, error))
    refuse(path, "no such file",
           "a token file is a pair " + prefix +
               ".bin and .idx; write it with: xlstm-data prepare TEXT... --output " + prefix);
  return MappedFile(path);
}

void warn_no_sidecar(const std::string& prefix) {
  static std::mutex mutex;
  static std::set<std::string> warned;
  const std::lock_guard<std::mutex> lock(mutex);
  if (warned.insert(prefix).second)
    std::fprintf(
        stderr,
        "warning: %s.meta.json: no such file; sizes and bounds are checked, contents cannot be\n",
        prefix.c_str());
}

struct IndexHeader {
  int dtype_code = 0;
  uint64_t sequences = 0, document_entries = 0;
};

constexpr const char* kIndexFix =
    "the file is damaged or not Megatron's .idx: copy it again or prepare the data again";

IndexHeader read_index_header(const std::string& path, const MappedFile& idx) {
  const std::string size = std::to_string(idx.size());
  if (idx.size() < kIndexHeaderBytes)
    refuse(path, size + " bytes are fewer than the header's 34", kIndexFix);
  if (std::memcmp(idx.data(), kIndexMagic, sizeof kIndexMagic) != 0)
    refuse(path, "does not start with MMIDIDX", kIndexFix);
  const auto version = load_unaligned<uint64_t>(idx.data() + 9);
  if (version != kIndexVersion)
    refuse(path, "version " + std::to_string(version) + ", expected 1", kIndexFix);
  IndexHeader header;
  header.dtype_code = idx.data()[17];
  if (dtype_bytes(header.dtype_code) == 0)
    refuse(
        path, "dtype code " + std::to_string(header.dtype_code) + " is not an integer type",
        "token files hold code 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)");
  header.sequences = load_unaligned<uint64_t>(idx.data() + 18);
  header.document_entries = load_unaligned<uint64_t>(idx.data() + 26);
  const uint64_t body = idx.size() - kIndexHeaderBytes;
  const bool fits = header.sequences <= body / 12 &&
                    header.document_entries <= (body - 12 * header.sequences) / 8 &&
                    12 * header.sequences + 8 * header.document_entries == body;
  if (!fits)
    refuse(path,
           size + " bytes do not fit its header (" + std::to_string(header.sequences) +
               " sequences, " + std::to_string(header.document_entries) + " document entries)",
           "the file is truncated or damaged: copy it again or prepare the data again");
  if (header.document_entries == 0) refuse(path, "the document index is empty", kIndexFix);
  return header;
}

/// First token of each document and the end. Checks lengths, offsets and the document index on the way.
std::vector<int64_t> read_documents(const std::string& path, const MappedFile& idx,
                                    const IndexHeader& header, int64_t* num_tokens) {
  const unsigned char* lengths = idx.data() + kIndexHeaderBytes;
  const unsigned char* offsets = lengths + 4 * header.sequences;
  const unsigned char* index = offsets + 8 * header.sequences;
  const auto sequences = static_cast<int64_t>(header.sequences);
  const auto entries = static_cast<int64_t>(header.document_entries);
  const auto entry = [&](int64_t d) { return load_unaligned<int64_t>(index + 8 * d); };
  if (entry(0) != 0 || entry(entries - 1) != sequences)
    refuse(path,
           "the document index covers sequences " + std::to_string(entry(0)) + " to " +
               std::to_string(entry(entries - 1)) + " of " + std::to_string(sequences),
           kIndexFix);
  const auto item = static_cast<int64_t>(dtype_bytes(header.dtype_code));
  std::vector<int64_t> starts(header.document_entries);
  int64_t tokens = 0, sequence = 0;
  for (int64_t d = 0; d < entries; ++d) {
    const int64_t first_sequence = entry(d);
    if (first_sequence < sequence || first_sequence > sequences)
      refuse(path, "document index " + std::to_string(d) + " is out of order", kIndexFix);
    for (; sequence < first_sequence; ++sequence) {
      const auto length = load_unaligned<int32_t>(lengths + 4 * sequence);
      const auto offset = load_unaligned<int64_t>(offsets + 8 * sequence);
      int64_t expected = 0;
      if (length < 0)
        refuse(path,
               "sequence " + std::to_string(sequence) + " has length " + std::to_string(length),
               kIndexFix);
      if (__builtin_mul_overflow(tokens, item, &expected) || offset != expected)
        refuse(path,
               "sequence " + std::to_string(sequence) + " starts at byte " +
                   std::to_string(offset) + ", expected " + std::to_string(expected),
               kIndexFix);
      if (__builtin_add_overflow(tokens, int64_t{length}, &tokens))
        refuse(path, "sequence lengths overflow", kIndexFix);
    }
    starts[static_cast<size_t>(d)] = tokens;
  }
  *num_tokens = tokens;
  return starts;
}

template <typename T>
uint64_t widen(const unsigned char* data, int64_t count, int64_t* out) {
  uint64_t largest = 0;  // negative ids become huge ones
  for (int64_t i = 0; i < count; ++i) {
    const auto id =
        static_cast<int64_t>(load_unaligned<T>(data + static_cast<size_t>(i) * sizeof(T)));
    out[i] = id;
    largest = std::max(largest, static_cast<uint64_t>(id));
  }
  return largest;
}

/// Copies tokens as int64 and returns the largest id, negative ones counted as larger than any.
uint64_t widen(int dtype_code, const unsigned char* bin, int64_t first, int64_t count,
               int64_t* out) {
  const unsigned char* data = bin + static_cast<size_t>(first) * dtype_bytes(dtype_code);
  switch (static_cast<DtypeCode>(dtype_code)) {
    case DtypeCode::kUint8:
      return widen<uint8_t>(data, count, out);
    case DtypeCode::kInt8:
      return widen<int8_t>(data, count, out);
    case DtypeCode::kInt16:
      return widen<int16_t>(data, count, out);
    case DtypeCode::kUint16:
      return widen<uint16_t>(data, count, out);
    case DtypeCode::kInt32:
      return widen<int32_t>(data, count, out);
    default:
      return widen<int64_t>(data, count, out);
  }
}

/// Index of the first of `count` ids outside [0, limit).
int64_t find_beyond(const int64_t* ids, int64_t count, int64_t limit) {
  return std::find_if(ids, ids + count, [&](int64_t id) { return id < 0 || id >= limit; }) - ids;
}

void compare_with_sidecar(const std::string& path, const char* what, int64_t found,
                          int64_t recorded) {
  if (found != recorded)
    refuse(path,
           std::to_string(found) + " " + what + ", its .meta.json says " + std::to_string(recorded),
           "the files do not belong together: copy all of them again or prepare the data again");
}

void compare_hash(const std::string& path, const std::string& recorded) {
  const std::string found = sha256_file(path);
  if (found != recorded)
    refuse(path,
           "sha256 is " + found.substr(0, 12) + "..., its .meta.json says " +
               recorded.substr(0, 12) + "...",
           "the file is damaged: copy it again or prepare the data again");
}

}  // namespace

std::string token_file_prefix(const std::string& name) {
  const std::string suffix = name.size() > 4 ? name.substr(name.size() - 4) : "";
  return suffix == ".bin" || suffix == ".idx" ? name.substr(0, name.size() - 4) : name;
}

TokenFile::TokenFile(const std::string& prefix, Verify verify)
    : prefix_(token_file_prefix(prefix)) {
  const std::string bin_path = prefix_ + ".bin", idx_path = prefix_ + ".idx";
  idx_ = open_part(prefix_, ".idx");
  bin_ = open_part(prefix_, ".bin");
  const IndexHeader header = read_index_header(idx_path, idx_);
  dtype_code_ = header.dtype_code;
  document_starts_ = read_documents(idx_path, idx_, header, &num_tokens_);
  num_documents_ = static_cast<int64_t>(document_starts_.size()) - 1;
  const size_t item = dtype_bytes(dtype_code_);
  if (static_cast<uint64_t>(num_tokens_) != bin_.size() / item || bin_.size() % item != 0)
    refuse(bin_path,
           std::to_string(bin_.size()) + " bytes, but " + idx_path + " describes " +
               std::to_string(num_tokens_) + " tokens of " + std::to_string(item) +
               (bin_.size() / item < static_cast<uint64_t>(num_tokens_)
                    ? " bytes: the .bin is truncated, or not of this .idx"
                    : " bytes: the two are not a pair"),
           "copy both again or prepare the data again");
  sidecar_ = read_sidecar(prefix_ + ".meta.json");
  if (!sidecar_) {
    if (verify == Verify::kSha256)
      refuse(prefix_ + ".meta.json", "no such file, so there is no sha256 to compare with",
             "prepare the data with xlstm-data, or set verify to sizes");
    warn_no_sidecar(prefix_);
  }
  if (sidecar_ && verify != Verify::kNone) {
    compare_with_sidecar(idx_path, "tokens", num_tokens_, sidecar_->num_tokens);
    compare_with_sidecar(idx_path, "documents", num_documents_, sidecar_->num_documents);
  }
  if (sidecar_ && verify == Verify::kSha256) {
    compare_hash(idx_path, sidecar_->idx_sha256);
    compare_hash(bin_path, sidecar_->bin_sha256);
  }
  open_loss(verify);
}

/// What .loss says, checked: a part of it would count other tokens without a word.
void TokenFile::open_loss(Verify verify) {
  const std::string path = prefix_ + ".loss";
  std::error_code error;
  const bool exists = std::filesystem::exists(path, error);
  num_counted_tokens_ = num_tokens_;
  if (sidecar_ && exists == sidecar_->loss_sha256.empty())
    refuse(path,
           exists ? "its .meta.json knows of no such file: all tokens count"
                  : "no such file, but its .meta.json says that not all tokens count",
           exists ? "delete it, or copy all files of the prefix again"
                  : "copy it beside the .bin, or prepare the data again");
  if (!exists) return;
  loss_ = MappedFile(path);
  loss_borders_ = {reinterpret_cast<const int64_t*>(loss_.data()), loss_.size() / sizeof(int64_t)};
  constexpr const char* kFix = "copy it and the .bin again, or prepare the data again";
  if (loss_borders_.empty() || loss_.size() % sizeof(int64_t) != 0)
    refuse(path, std::to_string(loss_.size()) + " bytes are not one or more positions of 8", kFix);
  if (loss_borders_.back() != num_tokens_)
    refuse(path,
           "ends at token " + std::to_string(loss_borders_.back()) + " of " +
               std::to_string(num_tokens_) + ": it is truncated, or not of this .bin",
           kFix);
  num_counted_tokens_ = 0;
  for (size_t i = 0; i < loss_borders_.size(); ++i) {
    const int64_t before = i == 0 ? -1 : loss_borders_[i - 1];
    if (loss_borders_[i] <= before)
      refuse(path,
             "position " + std::to_string(i) + " is " + std::to_string(loss_borders_[i]) +
                 ", expected more than " + std::to_string(before),
             kFix);
    if (i % 2 == 1) num_counted_tokens_ += loss_borders_[i] - before;
  }
  if (sidecar_ && verify != Verify::kNone)
    compare_with_sidecar(path, "tokens that count", num_counted_tokens_,
                         sidecar_->num_counted_tokens);
  if (sidecar_ && verify == Verify::kSha256) compare_hash(path, sidecar_->loss_sha256);
}

void TokenFile::read(int64_t first, int64_t count, int64_t* out) const {
  if (first < 0 || count < 0 || first > num_tokens_ - count)
    throw Error(ExitCode::kData, prefix_ + ".bin: tokens " + std::to_string(first) + " to " +
                                     std::to_string(first + count) + " of " +
                                     std::to_string(num_tokens_) + " asked for");
  const uint64_t largest = widen(dtype_code_, bin_.data(), first, count, out);
  if (sidecar_ && count > 0 && static_cast<int64_t>(largest) > sidecar_->max_token_id) {
    const int64_t at = find_beyond(out, count, sidecar_->max_token_id + 1);
    refuse(
        prefix_ + ".bin",
        "token id " + std::to_string(out[at]) + " at position " + std::to_string(first + at) +
            " is beyond the largest id of its .meta.json, " +
            std::to_string(sidecar_->max_token_id),
        "the file is damaged: copy it again or prepare the data again (xlstm-data verify tells)");
  }
  if (largest > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    const int64_t at = find_beyond(out, count, std::numeric_limits<int64_t>::max());
    refuse(prefix_ + ".bin",
           "token id " + std::to_string(out[at]) + " at position " + std::to_string(first + at) +
               " is negative",
           "the file does not hold token ids of its dtype: prepare the data again");
  }
}

void TokenFile::read_document_starts(int64_t first, int64_t count, uint8_t* out) const {
  std::fill_n(out, static_cast<size_t>(count), uint8_t{0});
  const auto end = document_starts_.end() - 1;  // the last entry is the end, not a start
  auto start = std::lower_bound(document_starts_.begin(), end, first);
  for (; start != end && *start < first + count; ++start) out[*start - first] = 1;
}

void TokenFile::read_counted(int64_t first, int64_t count, uint8_t* out) const {
  std::fill_n(out, static_cast<size_t>(count), uint8_t{1});
  if (loss_borders_.empty()) return;
  const auto begin = loss_borders_.begin(), end = loss_borders_.end();
  auto next = std::upper_bound(begin, end, first);
  for (int64_t i = 0; i < count; ++i) {
    if (next != end && *next == first + i) ++next;
    out[i] = static_cast<uint8_t>((next - begin) % 2);
  }
}

void TokenFile::check_vocab(int64_t vocab_size) const {
  const bool recorded = sidecar_ && sidecar_->max_token_id < vocab_size;
  if (recorded && bin_.size() > kScanBytes) return;  // read() holds the file to that id
  std::vector<int64_t> ids(static_cast<size_t>(std::min(kScanChunk, num_tokens_)));
  for (int64_t first = 0; first < num_tokens_; first += kScanChunk) {
    const int64_t count = std::min(kScanChunk, num_tokens_ - first);
    const uint64_t largest = widen(dtype_code_, bin_.data(), first, count, ids.data());
    if (largest < static_cast<uint64_t>(vocab_size)) continue;
    const int64_t at = find_beyond(ids.data(), count, vocab_size);
    refuse(prefix_ + ".bin",
           "token id " + std::to_string(ids[static_cast<size_t>(at)]) + " at position " +
               std::to_string(first + at) + " is beyond the vocabulary of " +
               std::to_string(vocab_size),
           "set model.vocab_size to the tokenizer's size" +
               (sidecar_ ? " (" + std::to_string(sidecar_->vocab_size) + ")" : std::string()) +
               " or prepare the data with the model's tokenizer");
  }
}

std::string TokenFile::fingerprint() const {
  if (sidecar_)
    return "sha256:" +
           sha256_hex(sidecar_->bin_sha256 + sidecar_->idx_sha256 + sidecar_->loss_sha256);
  const std::string loss = loss_borders_.empty() ? ""
                                                 : ":" + std::to_string(loss_.size()) + ":" +
                                                       std::to_string(num_counted_tokens_);
  return "sizes:" + std::to_string(bin_.size()) + ":" + std::to_string(idx_.size()) + ":" +
         std::to_string(num_documents_) + loss;
}

}  // namespace xlstm::data
