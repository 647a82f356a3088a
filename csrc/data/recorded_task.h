#pragma once
// Tasks whose samples are those of data sets that users have, read from the folder data.task.path.
#include <string>
#include <utility>

#include "csrc/core/file.h"
#include "csrc/data/task.h"

namespace xlstm::data {

class RecordedTask : public Task {
 public:
  /// `how_to_get`: which files the task reads and where they come from, the end of every message about them.
  explicit RecordedTask(std::string how_to_get) : how_to_get_(std::move(how_to_get)) {}
  TaskSample at(Part part, uint64_t /*seed*/, int64_t index,
                const TaskLengths& lengths) const final {
    return record(part, index, lengths.max_len);
  }
  /// One of those that train.
  TaskSample sample(Random& random, int64_t length) const final {
    return record(Part::kTrain, random.below(*num_recorded(Part::kTrain)), length);
  }
  bool varies() const final { return false; }
  std::string mark() const final { return mark_; }

 protected:
  /// Sample `index` of the files, of at most `length` tokens.
  virtual TaskSample record(Part part, int64_t index, int64_t length) const = 0;

  /// Opens a file of data.task.path, which then counts for the mark. Throws Error(kData).
  MappedFile open(const std::string& path);
  /// Throws Error(kData).
  [[noreturn]] void refuse(const std::string& path, const std::string& what) const;

 private:
  std::string how_to_get_;
  std::string mark_;  ///< sizes of all files opened and hashes of parts of them
};

}  // namespace xlstm::data
