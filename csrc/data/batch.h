#pragma once
// What training and evaluation read, wherever it comes from: token files (dataset.h) or tasks (task_source.h).
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace xlstm::data {

/// A target that does not count.
constexpr int64_t kIgnored = -100;

struct Batch {
  Batch() = default;
  /// All inputs 0, all targets ignored, no resets.
  Batch(int64_t count, int64_t length)
      : batch_size(count),
        seq_len(length),
        input(static_cast<size_t>(count * length), 0),
        target(static_cast<size_t>(count * length), kIgnored),
        reset(static_cast<size_t>(count * length), 0) {}
  int64_t batch_size = 0, seq_len = 0;
  std::vector<int64_t> input;    ///< (B,T) token ids
  std::vector<int64_t> target;   ///< (B,T) what is to be predicted there; kIgnored where nothing is
  std::vector<uint8_t> reset;    ///< (B,T) 1 where a document starts
  int64_t num_targets = 0;       ///< targets that count
  int64_t num_text_targets = 0;  ///< of them, those of a held-out file that do not end a document
  int64_t num_features = 0;      ///< F
  /// (B,T,F) real vectors instead of `input`, where F > 0
  std::vector<float> features;
  /// (B,T) numbers instead of `target`, NaN where nothing is to be predicted; empty where tokens are
  std::vector<float> values;
};

/// The present version of the order of samples (csrc/data/sampling.h, permute).
constexpr int kOrderVersion = 2;

/// What a run trains on: sample i is a pure function of the settings and i, the same for every number of processes,
/// batches and restarts.
class SampleSource {
 public:
  virtual ~SampleSource() = default;
  /// 0: no sample ever comes twice.
  virtual int64_t samples_per_epoch() const = 0;
  /// Samples [first, first+count).
  virtual Batch batch(int64_t first_sample, int64_t count) const = 0;
  /// Changes whenever the settings or the version of the order or of the generators do, and where files do so as far as
  /// their marks tell: the hash in a token file's sidecar (TokenFile::fingerprint; without one their sizes), for tasks
  /// the hash of parts of large files (recorded_task.cpp).
  std::string fingerprint() const { return fingerprint_in(order_); }
  /// Goes on in the order of the version in which this data has the fingerprint `recorded`, so that a run keeps the one it
  /// began with. False, and nothing changes, where there is no such version: it is the fingerprint of something else.
  bool take_order_of(const std::string& recorded) {
    for (int order = kOrderVersion; order >= 1; --order) {
      if (fingerprint_in(order) != recorded) continue;
      order_ = order;
      return true;
    }
    return false;
  }

 protected:
  virtual std::string fingerprint_in(int order) const = 0;
  int order_ = kOrderVersion;
};

/// What a model is judged by: a fixed set of windows, each scored once.
class HeldOutSet {
 public:
  virtual ~HeldOutSet() = default;
  virtual int64_t num_windows() const = 0;
  virtual Batch batch(int64_t first_window, int64_t count) const = 0;
  /// For messages.
  virtual std::string name() const = 0;
  /// Changes where files do (TokenFile::fingerprint); "" for samples that are made.
  virtual std::string fingerprint() const { return ""; }
  /// UTF-8 bytes of the text that the batch's targets stand for, for bits per byte; 0 where that is not known.
  virtual double text_bytes(const Batch&) const { return 0; }
  /// Share of answers that guessing gets right; absent where accuracy is not what counts.
  virtual std::optional<double> chance() const { return {}; }
};

}  // namespace xlstm::data
