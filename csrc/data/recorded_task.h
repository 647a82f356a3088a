#pragma once
// Tasks whose samples are those of data sets that users have, read from the folder data.task.path.
#include <string>

#include "csrc/core/file.h"
#include "csrc/data/task.h"

namespace xlstm::data {

class RecordedTask : public Task {
 public:
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

  /// Opens a file of data.task.path. Throws Error(kData) that says what the task reads and how to get it, `how_to_get`.
  MappedFile open(const std::string& path, const std::string& how_to_get);
  [[noreturn]] static void refuse(const std::string& path, const std::string& what,
                                  const std::string& how_to_get);

 private:
  std::string mark_;  ///< sizes and hashes of the ends of all files opened
};

}  // namespace xlstm::data
