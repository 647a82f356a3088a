#include "csrc/data/task_source.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/dataset.h"

namespace xlstm::data {
namespace {

/// Changes whenever a generator gives other samples, so that a run is not resumed on other data.
std::string version_of(const std::string& task) {
  return task == "stack_manipulation" || task == "set" ? "task-2" : "task-1";
}

void check_lengths(const Task& task, const TaskLengths& lengths, const std::string& min_name,
                   const std::string& max_name) {
  const auto fail = [](const std::string& name, int64_t value, const std::string& expected) {
    throw Error(ExitCode::kConfig,
                name + " is " + std::to_string(value) + ", expected " + expected);
  };
  if (task.varies() && lengths.min_len < task.shortest())
    fail(min_name, lengths.min_len,
         "at least " + std::to_string(task.shortest()) + " for this task");
  if (lengths.max_len < task.shortest())
    fail(max_name, lengths.max_len,
         "at least " + std::to_string(task.shortest()) + " for this task");
  if (task.varies() && lengths.max_len < lengths.min_len)
    fail(max_name, lengths.max_len,
         "at least " + min_name + ", " + std::to_string(lengths.min_len));
  if (task.varies() && lengths.min_len > task.longest())
    fail(min_name, lengths.min_len, "at most " + std::to_string(task.longest()) + " for this task");
}

/// How many samples of files count; `wanted` 0: all.
int64_t recorded_samples(int64_t there_are, int64_t wanted) {
  if (wanted > there_are)
    throw Error(ExitCode::kConfig, "data.task.train_samples is " + std::to_string(wanted) +
                                       ", expected at most " + std::to_string(there_are) +
                                       ", all that the files hold");
  return wanted > 0 ? wanted : there_are;
}

Batch empty_batch(const Task& task, int64_t count, int64_t length) {
  Batch batch(count, length);
  if (task.features() == 0) return batch;
  batch.num_features = task.features();
  batch.features.assign(static_cast<size_t>(count * length * task.features()), 0);
  if (task.predicts_numbers())
    batch.values.assign(static_cast<size_t>(count * length),
                        std::numeric_limits<float>::quiet_NaN());
  return batch;
}

void fill_row(const TaskSample& sample, int64_t row, Batch& batch) {
  const auto offset = row * batch.seq_len;
  std::copy(sample.features.begin(), sample.features.end(),
            batch.features.begin() + offset * batch.num_features);
  if (!batch.values.empty()) {
    std::copy(sample.values.begin(), sample.values.end(), batch.values.begin() + offset);
    batch.num_targets += std::count_if(sample.values.begin(), sample.values.end(),
                                       [](float x) { return !std::isnan(x); });
    return;
  }
  std::copy(sample.input.begin(), sample.input.end(), batch.input.begin() + offset);
  std::copy(sample.target.begin(), sample.target.end(), batch.target.begin() + offset);
  batch.num_targets += std::count_if(sample.target.begin(), sample.target.end(),
                                     [](int64_t t) { return t != kIgnored; });
}

}  // namespace

Part held_out_part(const TaskOptions& options) {
  if (options.held_out == "test") return Part::kHeldOut;
  if (options.held_out == "validation") return Part::kValidation;
  throw Error(ExitCode::kConfig,
              "data.task.held_out is " + options.held_out + ", expected test or validation");
}

TaskSample Task::at(Part part, uint64_t seed, int64_t index, const TaskLengths& lengths) const {
  Random random(seed, static_cast<uint64_t>(part), static_cast<uint64_t>(index));
  return sample_between(random, lengths);
}

TaskSource::TaskSource(std::shared_ptr<const Task> task, const TaskOptions& options,
                       TaskLengths lengths, uint64_t seed, bool shuffle)
    : task_(std::move(task)),
      options_(options),
      lengths_(lengths),
      seed_(seed),
      shuffle_(shuffle) {}

Batch TaskSource::batch(int64_t first_sample, int64_t count) const {
  Batch batch = empty_batch(*task_, count, lengths_.max_len);
  for (int64_t row = 0; row < count; ++row) {
    auto index = static_cast<uint64_t>(first_sample + row);
    if (const auto epoch = static_cast<uint64_t>(options_.train_samples); epoch > 0)
      index = is_permuted() ? permute(index % epoch, epoch, seed_, index / epoch, order_)
                            : index % epoch;
    fill_row(task_->at(Part::kTrain, seed_, static_cast<int64_t>(index), lengths_), row, batch);
  }
  return batch;
}

std::string TaskSource::fingerprint_in(int order) const {
  std::string text = version_of(options_.name);
  if (is_permuted() && order > 1) text += " order-" + std::to_string(order);
  text += " " + options_.name + " vocab=" + std::to_string(task_->vocab_size()) +
          " pairs=" + std::to_string(options_.key_values) +
          (options_.random_non_queries ? " random" : "") +
          " lengths=" + std::to_string(lengths_.min_len) + "-" + std::to_string(lengths_.max_len) +
          " samples=" + std::to_string(options_.train_samples) +
          " shuffle=" + std::to_string(shuffle_) + " seed=" + std::to_string(seed_) + task_->mark();
  return sha256_hex(text);
}

TaskSet::TaskSet(std::shared_ptr<const Task> task, const TaskOptions& options, TaskLengths lengths,
                 uint64_t seed)
    : task_(std::move(task)),
      options_(options),
      part_(held_out_part(options)),
      lengths_(lengths),
      seed_(seed) {}

Batch TaskSet::batch(int64_t first_window, int64_t count) const {
  Batch batch = empty_batch(*task_, count, lengths_.max_len);
  for (int64_t row = 0; row < count; ++row)
    fill_row(task_->at(part_, seed_, first_window + row, lengths_), row, batch);
  return batch;
}

std::unique_ptr<Task> make_task(const TaskOptions& options) {
  if (reads_files(options) && options.path.empty())
    throw Error(ExitCode::kConfig, "data.task.path is empty, expected the folder of the files of " +
                                       options.name + " (see the README)");
  if (!reads_files(options) && !options.path.empty())
    throw Error(ExitCode::kConfig, "data.task.path is " + options.path + ", but data.task " +
                                       options.name + " reads no files; remove it");
  if (options.name == "mqar") return make_mqar(options);
  if (options.name == "nns") return make_nearest_neighbor();
  if (options.name == "listops") return make_list_operations(options);
  if (options.name == "image" || options.name == "rgb_image") return make_cifar10(options);
  if (options.name == "retrieval") return make_paper_pairs(options);
  if (options.name == "pathfinder") return make_pathfinder(options);
  if (auto language = make_formal_language(options)) return language;
  throw Error(ExitCode::kConfig, "data.task.name: no task is called " + options.name);
}

TaskData make_task_data(const TaskOptions& given, int64_t seq_len, uint64_t seed, bool shuffle,
                        int64_t model_vocab_size, int64_t model_features) {
  const std::shared_ptr<const Task> task = make_task(given);
  TaskOptions options = given;
  if (const auto recorded = task->num_recorded(Part::kTrain))
    options.train_samples = recorded_samples(*recorded, given.train_samples);
  if (const auto recorded = task->num_recorded(Part::kHeldOut))
    options.eval_samples = std::min(*recorded, given.eval_samples);
  if (task->features() != model_features)
    throw Error(ExitCode::kConfig, "model.input_features is " + std::to_string(model_features) +
                                       ", expected " + std::to_string(task->features()) +
                                       " for data.task " + options.name);
  if (task->vocab_size() > model_vocab_size)
    throw Error(ExitCode::kConfig, "model.vocab_size is " + std::to_string(model_vocab_size) +
                                       ", expected at least " + std::to_string(task->vocab_size()) +
                                       ", the vocabulary of data.task " + options.name);
  if (task->predicts_numbers() && model_vocab_size != 1)
    throw Error(ExitCode::kConfig, "model.vocab_size is " + std::to_string(model_vocab_size) +
                                       ", expected 1 for data.task " + options.name +
                                       ": one number is predicted");
  const int64_t min_len = options.min_len > 0 ? options.min_len : task->usual_min_len();
  const TaskLengths train{min_len, seq_len};
  const TaskLengths held_out{options.eval_min_len > 0 ? options.eval_min_len : min_len,
                             options.eval_len > 0 ? options.eval_len : seq_len};
  check_lengths(*task, train, "data.task.min_len", "data.seq_len");
  check_lengths(*task, held_out, "data.task.eval_min_len", "data.task.eval_len");
  return {std::make_unique<TaskSource>(task, options, train, seed, shuffle),
          std::make_unique<TaskSet>(task, options, held_out, seed)};
}

}  // namespace xlstm::data
