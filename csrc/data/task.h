#pragma once
// Synthetic tasks of the paper's experiments: generators whose samples are pure functions of (settings, seed, index).
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/data/random.h"
#include "csrc/data/task_options.h"

namespace xlstm::data {

struct TaskSample {
  std::vector<int64_t> input;   ///< token ids; token 0 is padding
  std::vector<int64_t> target;  ///< of the same length; kIgnored where nothing is asked
  /// Instead of both, where features() > 0: (T,F) real inputs and T numbers to predict, NaN where nothing is asked.
  std::vector<float> features = {}, values = {};
};

class Task {
 public:
  virtual ~Task() = default;
  /// A sample of at most `length` tokens, answers included. length >= shortest().
  virtual TaskSample sample(Random& random, int64_t length) const = 0;
  virtual int64_t vocab_size() const = 0;
  /// Width of real input vectors; 0: inputs are tokens.
  virtual int64_t features() const { return 0; }
  /// Share of answers that guessing gets right, as the paper counts it.
  virtual double chance() const = 0;
  virtual int64_t shortest() const = 0;
  /// Whether samples have lengths of their own, or always the longest.
  virtual bool varies() const = 0;
};

/// Throws Error(kConfig) naming the setting where name, vocabulary or number of pairs do not fit.
std::unique_ptr<Task> make_task(const TaskOptions& options);

/// formal_languages.cpp; null where no language has that name.
std::unique_ptr<Task> make_formal_language(const TaskOptions& options);
/// mqar.cpp
std::unique_ptr<Task> make_mqar(const TaskOptions& options);
/// nearest_neighbor.cpp
std::unique_ptr<Task> make_nearest_neighbor();

}  // namespace xlstm::data
