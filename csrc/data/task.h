#pragma once
// Tasks of the paper's experiments: generators whose samples are pure functions of (settings, seed, index), and readers of
// data sets that users have.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "csrc/data/random.h"
#include "csrc/data/task_options.h"

namespace xlstm::data {

struct TaskSample {
  std::vector<int64_t> input;        ///< token ids; token 0 is padding
  std::vector<int64_t> target;       ///< of the same length; kIgnored where nothing is asked
  std::vector<float> features = {};  ///< instead of the tokens, where features() > 0: (T,F)
  std::vector<float> values = {};    ///< instead of the targets, where predicts_numbers(); or NaN
};

/// Samples of [min_len, max_len] tokens, answers included (those of a task that does not vary: all of max_len).
struct TaskLengths {
  int64_t min_len = 3, max_len = 40;
};

/// Their numbers are the streams that samples are drawn from.
enum class Part : uint64_t { kTrain = 0, kHeldOut = 1, kValidation = 2 };
/// What data.task.held_out names: kHeldOut of "test", kValidation of "validation". Throws Error(kConfig) for another name.
Part held_out_part(const TaskOptions& options);

class Task {
 public:
  virtual ~Task() = default;
  /// A sample of at most `length` tokens, answers included. length >= shortest().
  virtual TaskSample sample(Random& random, int64_t length) const = 0;
  /// A sample of a length that is drawn evenly, unless the task has lengths of its own.
  virtual TaskSample sample_between(Random& random, const TaskLengths& lengths) const {
    return sample(random,
                  varies() ? random.between(lengths.min_len, lengths.max_len) : lengths.max_len);
  }
  /// Sample `index` of a part, a pure function of the arguments: one of the files of a task that reads some, else drawn.
  virtual TaskSample at(Part part, uint64_t seed, int64_t index, const TaskLengths& lengths) const;
  /// Samples that the files of a task hold; absent where they are drawn. Of what is held out they hold one part alone, as
  /// data.task.held_out says, whichever is named here.
  virtual std::optional<int64_t> num_recorded(Part) const { return {}; }
  virtual int64_t vocab_size() const = 0;
  /// Width of real input vectors; 0: inputs are tokens.
  virtual int64_t features() const { return 0; }
  /// Whether numbers are asked for, judged by their squared error; else tokens are.
  virtual bool predicts_numbers() const { return false; }
  /// Share of answers that guessing gets right, as the paper counts it.
  virtual double chance() const = 0;
  virtual int64_t shortest() const = 0;
  virtual int64_t longest() const { return std::numeric_limits<int64_t>::max(); }
  /// What data.task.min_len 0 stands for.
  virtual int64_t usual_min_len() const { return std::max<int64_t>(3, shortest()); }
  /// Whether samples have lengths of their own, or always the longest.
  virtual bool varies() const = 0;
  /// What else samples depend on, for fingerprints: settings of this task alone, the content of its files.
  virtual std::string mark() const { return ""; }
};

/// Throws Error(kConfig) naming the setting that does not fit, Error(kData) naming the file that is missing or wrong.
std::unique_ptr<Task> make_task(const TaskOptions& options);

/// formal_languages.cpp; null where no language has that name.
std::unique_ptr<Task> make_formal_language(const TaskOptions& options);
/// mqar.cpp
std::unique_ptr<Task> make_mqar(const TaskOptions& options);
/// nearest_neighbor.cpp
std::unique_ptr<Task> make_nearest_neighbor();
/// list_operations.cpp
std::unique_ptr<Task> make_list_operations(const TaskOptions& options);
/// cifar10.cpp: image and rgb_image
std::unique_ptr<Task> make_cifar10(const TaskOptions& options);
/// pathfinder.cpp
std::unique_ptr<Task> make_pathfinder(const TaskOptions& options);
/// paper_pairs.cpp
std::unique_ptr<Task> make_paper_pairs(const TaskOptions& options);

}  // namespace xlstm::data
