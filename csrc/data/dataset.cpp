#include "csrc/data/dataset.h"

#include <algorithm>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/sampling.h"

namespace xlstm::data {
namespace {

void check_seq_len(int64_t seq_len) {
  if (seq_len < 1)
    throw Error(ExitCode::kConfig,
                "data.seq_len is " + std::to_string(seq_len) + ", expected at least 1");
}

/// Of a window, reused.
struct Buffers {
  std::vector<int64_t> tokens;
  std::vector<uint8_t> starts, counted;
};

/// Fills row `row` with tokens [first, first+count] of the file: `count` inputs, each with the next token as target.
/// begins: the state is empty before it. before: targets at its beginning that do not count.
void fill_row(const TokenFile& file, const DatasetOptions& options, int64_t first, int64_t count,
              bool begins, int64_t before, int64_t row, Buffers& buffers, Batch& batch) {
  auto& [tokens, starts, counted] = buffers;
  tokens.resize(static_cast<size_t>(count) + 1);
  starts.resize(static_cast<size_t>(count) + 1);
  counted.resize(static_cast<size_t>(count) + 1);
  file.read(first, count + 1, tokens.data());
  file.read_document_starts(first, count + 1, starts.data());
  file.read_counted(first, count + 1, counted.data());
  const auto offset = static_cast<size_t>(row * batch.seq_len);
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
    const bool masked = counted[t + 1] == 0 || t < static_cast<size_t>(before) ||
                        (options.mask_loss_across_documents && starts[t + 1] != 0);
    batch.input[offset + t] = tokens[t];
    batch.target[offset + t] = masked ? kIgnored : tokens[t + 1];
    batch.num_targets += masked ? 0 : 1;
    const bool document = options.reset_state_at_document && starts[t] != 0;
    batch.reset[offset + t] = (t == 0 && begins) || document ? 1 : 0;
  }
}

}  // namespace

struct Dataset::Source {
  std::shared_ptr<const TokenFile> file;
  double weight = 1;
  int64_t windows = 0;  ///< per epoch
  int64_t parts = 0;    ///< of an epoch, one for each of its streams; 0: there are none
  int64_t slack = 0;    ///< tokens that the windows leave over
  uint64_t seed = 0;
};

struct Dataset::Schedule {
  Mixture mixture;
};

Dataset::Dataset(std::vector<WeightedFile> files, const DatasetOptions& options)
    : options_(options) {
  check_seq_len(options.seq_len);
  std::vector<double> weights;
  for (auto& [file, weight] : files) {
    const int64_t needed = options.seq_len + 1;
    if (file->num_tokens() < needed)
      throw Error(ExitCode::kData,
                  file->prefix() + ".bin: " + std::to_string(file->num_tokens()) +
                      " tokens, but a window of data.seq_len=" + std::to_string(options.seq_len) +
                      " needs " + std::to_string(needed) +
                      "; set a smaller data.seq_len or give more text");
    if (file->num_counted_tokens() == 0)
      throw Error(ExitCode::kData,
                  file->prefix() +
                      ".loss: none of the tokens counts, so that nothing would be learned; prepare "
                      "texts of which a part counts");
    auto source = std::make_shared<Source>();
    source->weight = weight;
    source->windows = (file->num_tokens() - 1) / options.seq_len;
    source->slack = (file->num_tokens() - 1) % options.seq_len;
    source->seed = mix64(options.seed) + sources_.size();
    source->file = std::move(file);
    weights.push_back(weight);
    sources_.push_back(std::move(source));
  }
  schedule_ = std::make_shared<const Schedule>(Schedule{Mixture(weights)});
  if (options.streams > 0) share_streams();
}

/// Streams go to the files as samples would.
void Dataset::share_streams() {
  for (int64_t stream = 0; stream < options_.streams; ++stream)
    ++sources_[static_cast<size_t>(schedule_->mixture.pick(stream).source)]->parts;
  for (const auto& source : sources_) {
    const std::string& prefix = source->file->prefix();
    if (source->parts == 0)
      throw Error(ExitCode::kConfig, prefix + ": none of the " + std::to_string(options_.streams) +
                                         " sequences of a batch falls to it by its weight; raise "
                                         "train.global_batch_size or its weight");
    const int64_t length = source->windows / source->parts;
    if (length == 0)
      throw Error(ExitCode::kData,
                  prefix + ".bin: " + std::to_string(source->windows) +
                      " sequences of data.seq_len=" + std::to_string(options_.seq_len) +
                      ", but the " + std::to_string(source->parts) +
                      " sequences of a batch that it gives need one each; set a smaller "
                      "train.global_batch_size or data.seq_len, or give more text");
    source->windows = length * source->parts;
    source->slack = source->file->num_tokens() - 1 - source->windows * options_.seq_len;
  }
}

int64_t Dataset::samples_per_epoch() const {
  int64_t total = 0;
  for (const auto& source : sources_) total += source->windows;
  return total;
}

Batch Dataset::batch(int64_t first_sample, int64_t count) const {
  if (first_sample < 0 || count < 0)
    throw Error(ExitCode::kData, "Dataset::batch: negative sample index or count");
  Batch batch(count, options_.seq_len);
  Buffers buffers;
  for (int64_t row = 0; row < count; ++row) {
    const Place place =
        options_.streams > 0 ? place_in_stream(first_sample + row) : place_of(first_sample + row);
    fill_row(*place.source->file, options_, place.first, options_.seq_len, place.begins, 0, row,
             buffers, batch);
  }
  return batch;
}

/// The `index`th of `count` things of an epoch, in its order.
int64_t Dataset::in_order(const Source& source, int64_t index, int64_t count, int64_t epoch) const {
  if (!options_.shuffle) return index;
  return static_cast<int64_t>(permute(static_cast<uint64_t>(index), static_cast<uint64_t>(count),
                                      source.seed, static_cast<uint64_t>(epoch), order_));
}

/// Tokens before the first window of an epoch.
int64_t Dataset::tokens_before(const Source& source, int64_t epoch) const {
  if (!options_.shuffle) return 0;
  return static_cast<int64_t>(mix64(mix64(source.seed) ^ static_cast<uint64_t>(epoch)) %
                              static_cast<uint64_t>(source.slack + 1));
}

Dataset::Place Dataset::place_of(int64_t sample) const {
  const Mixture::Pick pick = schedule_->mixture.pick(sample);
  const Source& source = *sources_[static_cast<size_t>(pick.source)];
  const int64_t epoch = pick.rank / source.windows;
  const int64_t window = in_order(source, pick.rank % source.windows, source.windows, epoch);
  return {&source, tokens_before(source, epoch) + window * options_.seq_len, true};
}

Dataset::Place Dataset::place_in_stream(int64_t sample) const {
  const Mixture::Pick stream = schedule_->mixture.pick(sample % options_.streams);
  const Source& source = *sources_[static_cast<size_t>(stream.source)];
  const int64_t length = source.windows / source.parts;  // of a part
  const int64_t rank = sample / options_.streams, epoch = rank / length;
  const int64_t part = in_order(source, stream.rank, source.parts, epoch);
  const int64_t window = part * length + rank % length;
  return {&source, tokens_before(source, epoch) + window * options_.seq_len, rank % length == 0};
}

std::string Dataset::fingerprint_in(int order) const {
  std::string text = "order-" + std::to_string(order);
  text += " T=" + std::to_string(options_.seq_len) +
          " shuffle=" + std::to_string(options_.shuffle) +
          " seed=" + std::to_string(options_.seed) +
          " reset=" + std::to_string(options_.reset_state_at_document) +
          " mask=" + std::to_string(options_.mask_loss_across_documents);
  if (options_.streams > 0) text += " streams=" + std::to_string(options_.streams);
  const auto& shares = schedule_->mixture.shares();
  for (size_t s = 0; s < sources_.size(); ++s)
    text += " " + std::to_string(shares[s]) + "*" + sources_[s]->file->fingerprint();
  return sha256_hex(text);
}

EvalSet::EvalSet(std::shared_ptr<const TokenFile> file, const DatasetOptions& options)
    : file_(std::move(file)), options_(options) {
  check_seq_len(options.seq_len);
  if (file_->num_tokens() < 2)
    throw Error(ExitCode::kData, file_->prefix() + ".bin: " + std::to_string(file_->num_tokens()) +
                                     " tokens; a held-out set needs at least 2, give more text");
  if (file_->num_counted_tokens() == 0)
    throw Error(ExitCode::kData, file_->prefix() +
                                     ".loss: none of the tokens counts, so that nothing can be "
                                     "judged; prepare texts of which a part counts");
  if (const auto& sidecar = file_->sidecar()) {
    int64_t last = 0;
    file_->read(file_->num_tokens() - 1, 1, &last);
    has_ends_ = last == sidecar->eos_id;  // all documents end so, or none does
    const int64_t ends = has_ends_ ? counted_ends() : 0;
    bytes_per_text_token_ =
        static_cast<double>(sidecar->num_counted_bytes) /
        static_cast<double>(std::max<int64_t>(1, file_->num_counted_tokens() - ends));
  }
  options_.seq_len = std::min(options.seq_len, file_->num_tokens() - 1);
  if (!options.fill_last_window) return;
  int64_t longest = 1;
  for (int64_t d = 0; d < file_->num_documents(); ++d) {
    const int64_t start = file_->document_start(d), last = file_->document_start(d + 1) - 1;
    for (int64_t at = start; at < last; at += options.seq_len) {
      const int64_t count = std::min(options.seq_len, last - at);
      const int64_t before = std::min(at - start, options.seq_len - count);
      windows_.push_back({at - before, before + count, before});
      longest = std::max(longest, before + count);
    }
  }
  options_.seq_len = longest;
}

/// Documents whose last token counts.
int64_t EvalSet::counted_ends() const {
  if (file_->num_counted_tokens() == file_->num_tokens()) return file_->num_documents();
  int64_t ends = 0;
  for (int64_t d = 1; d <= file_->num_documents(); ++d) {
    uint8_t counts = 0;
    file_->read_counted(file_->document_start(d) - 1, 1, &counts);
    ends += counts;
  }
  return ends;
}

int64_t EvalSet::num_windows() const {
  if (options_.fill_last_window) return std::ssize(windows_);
  return (file_->num_tokens() - 1 + options_.seq_len - 1) / options_.seq_len;
}

EvalSet::Window EvalSet::window(int64_t index) const {
  if (options_.fill_last_window) return windows_[static_cast<size_t>(index)];
  const int64_t first = index * options_.seq_len;
  return {first, std::min(options_.seq_len, file_->num_tokens() - 1 - first), 0};
}

Batch EvalSet::batch(int64_t first_window, int64_t count) const {
  if (first_window < 0 || count < 0 || first_window > num_windows() - count)
    throw Error(ExitCode::kData, "EvalSet::batch: windows " + std::to_string(first_window) +
                                     " to " + std::to_string(first_window + count) + " of " +
                                     std::to_string(num_windows()));
  Batch batch(count, options_.seq_len);
  Buffers buffers;
  for (int64_t row = 0; row < count; ++row) {
    const Window cut = window(first_window + row);
    fill_row(*file_, options_, cut.first, cut.count, true, cut.before, row, buffers, batch);
    batch.num_text_targets += text_targets(cut);
  }
  return batch;
}

/// Targets of a window that count and are text. Their place tells ends of documents, not the token, which may stand in a
/// text, too.
int64_t EvalSet::text_targets(const Window& cut) const {
  const int64_t first = cut.first + cut.before + 1, count = cut.count - cut.before;
  std::vector<uint8_t> starts(static_cast<size_t>(count) + 1,
                              1);  // behind the file as a document would
  file_->read_document_starts(first, std::min(count + 1, file_->num_tokens() - first),
                              starts.data());
  std::vector<uint8_t> counted(static_cast<size_t>(count));
  file_->read_counted(first, count, counted.data());
  int64_t targets = 0;
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
    const bool masked = counted[t] == 0 || (options_.mask_loss_across_documents && starts[t] != 0);
    const bool end = has_ends_ && starts[t + 1] != 0;
    targets += masked || end ? 0 : 1;
  }
  return targets;
}

double EvalSet::text_bytes(const Batch& batch) const {
  return bytes_per_text_token_ * static_cast<double>(batch.num_text_targets);
}

}  // namespace xlstm::data
