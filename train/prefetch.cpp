#include "train/prefetch.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace xlstm::train {

TrainBatch::TrainBatch(data::Batch&& source, bool pinned, int64_t segment, int64_t segments)
    : host(std::move(source)) {
  const std::vector<int64_t> shape{host.batch_size, host.seq_len};
  if (host.num_features > 0) {
    ids = at::from_blob(host.features.data(), {host.batch_size, host.seq_len, host.num_features},
                        at::kFloat);
  } else {
    ids = at::from_blob(host.input.data(), shape, at::kLong);
  }
  targets = host.values.empty() ? at::from_blob(host.target.data(), shape, at::kLong)
                                : at::from_blob(host.values.data(), shape, at::kFloat);
  if (std::find(host.reset.begin(), host.reset.end(), 1) != host.reset.end()) {
    reset = at::from_blob(host.reset.data(), shape, at::kBool);
  }
  if (segments > 1) {
    const int64_t length = host.seq_len / segments;
    const auto cut = [&](at::Tensor& tensor) {
      if (tensor.defined()) tensor = tensor.narrow(1, segment * length, length).contiguous();
    };
    cut(ids), cut(targets), cut(reset);
    const at::Tensor counted =
        host.values.empty() ? targets.ne(data::kIgnored) : targets.isfinite();
    host.num_targets = counted.sum().item<int64_t>();
  }
  if (!pinned) return;
  ids = ids.pin_memory(), targets = targets.pin_memory();
  if (reset.defined()) reset = reset.pin_memory();
}

Prefetcher::Prefetcher(const data::SampleSource& source, int64_t first_sample, int64_t batch_size,
                       bool pinned, int64_t stride, int64_t segment, int64_t segments)
    : source_(source),
      next_sample_(first_sample),
      batch_size_(batch_size),
      stride_(stride > 0 ? stride : batch_size),
      segment_(segment),
      segments_(segments),
      pinned_(pinned),
      thread_([this] { work(); }) {}

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

std::unique_ptr<TrainBatch> Prefetcher::next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return ready_ != nullptr || error_ != nullptr; });
  if (error_ != nullptr) std::rethrow_exception(error_);
  std::unique_ptr<TrainBatch> batch = std::move(ready_);
  lock.unlock();
  changed_.notify_all();
  return batch;
}

void Prefetcher::work() {
  try {
    while (true) {
      auto batch = std::make_unique<TrainBatch>(source_.batch(next_sample_, batch_size_), pinned_,
                                                segment_, segments_);
      next_sample_ += stride_;
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stop_ || ready_ == nullptr; });
      if (stop_) return;
      ready_ = std::move(batch);
      lock.unlock();
      changed_.notify_all();
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    error_ = std::current_exception();
    changed_.notify_all();
  }
}

}  // namespace xlstm::train
