#pragma once
#include <ATen/core/Tensor.h>

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "csrc/data/batch.h"

namespace xlstm::train {

/// A batch of global samples as tensors that share its memory, or in pinned memory of their own that a GPU reads while
/// the host goes on.
struct TrainBatch {
  /// segment: which of so many equal ones of each sequence; the targets that count are those of the segment.
  explicit TrainBatch(data::Batch&& source, bool pinned = false, int64_t segment = 0,
                      int64_t segments = 1);
  TrainBatch(const TrainBatch&) = delete;
  TrainBatch& operator=(const TrainBatch&) = delete;
  data::Batch host;
  at::Tensor ids, targets;  ///< (B,T) int64; with real inputs (B,T,F) and (B,T) float32
  at::Tensor reset;         ///< (B,T) bool; undefined where no document starts inside
};

/// Reads one batch ahead on a thread of its own while the step before runs.
class Prefetcher {
 public:
  /// Batches of `batch_size` samples from first_sample on; `stride`: from one's first sample to the next one's, where
  /// other processes read what is between (0: none). segment, segments: as TrainBatch has them.
  Prefetcher(const data::SampleSource& source, int64_t first_sample, int64_t batch_size,
             bool pinned = false, int64_t stride = 0, int64_t segment = 0, int64_t segments = 1);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;
  /// The next batch in order; waits for it. Rethrows what reading it threw.
  std::unique_ptr<TrainBatch> next();

 private:
  void work();
  const data::SampleSource& source_;
  int64_t next_sample_, batch_size_, stride_, segment_, segments_;
  bool pinned_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unique_ptr<TrainBatch> ready_;
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace xlstm::train
