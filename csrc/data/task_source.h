#pragma once
// A task as training data and as a held-out set. Samples are padded to one length with token 0 and ignored
// targets; each is a document of its own.
#include <memory>

#include "csrc/data/batch.h"
#include "csrc/data/task.h"

namespace xlstm::data {

/// Fresh samples for ever, or `train_samples` of them in a new order each epoch; of a task that reads files the first
/// `train_samples`, or all.
class TaskSource final : public SampleSource {
 public:
  TaskSource(std::shared_ptr<const Task> task, const TaskOptions& options, TaskLengths lengths,
             uint64_t seed, bool shuffle);
  int64_t samples_per_epoch() const override { return options_.train_samples; }
  Batch batch(int64_t first_sample, int64_t count) const override;

 private:
  std::string fingerprint_in(int order) const override;
  bool is_permuted() const { return shuffle_ && options_.train_samples > 0; }
  std::shared_ptr<const Task> task_;
  TaskOptions options_;
  TaskLengths lengths_;
  uint64_t seed_;
  bool shuffle_;
};

/// `eval_samples` samples that training never draws but by chance; of a task that reads files at most those there are.
class TaskSet final : public HeldOutSet {
 public:
  TaskSet(std::shared_ptr<const Task> task, const TaskOptions& options, TaskLengths lengths,
          uint64_t seed);
  int64_t num_windows() const override { return options_.eval_samples; }
  Batch batch(int64_t first_window, int64_t count) const override;
  std::string name() const override {
    return "data.task " + options_.name + (part_ == Part::kValidation ? ", validation" : "");
  }
  std::optional<double> chance() const override {
    return task_->predicts_numbers() ? std::nullopt : std::optional(task_->chance());
  }

 private:
  std::shared_ptr<const Task> task_;
  TaskOptions options_;
  Part part_;
  TaskLengths lengths_;
  uint64_t seed_;
};

struct TaskData {
  std::unique_ptr<TaskSource> train;
  std::unique_ptr<TaskSet> held_out;
};

/// Both, from the settings. Throws Error(kConfig) naming the setting that does not fit.
TaskData make_task_data(const TaskOptions& options, int64_t seq_len, uint64_t seed, bool shuffle,
                        int64_t model_vocab_size, int64_t model_features = 0);

}  // namespace xlstm::data
