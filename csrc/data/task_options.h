#pragma once
// Settings of a task: plain values (the configuration layer reads them).
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::data {

struct TaskOptions {
  std::string name = "none";  ///< one of task_names()
  int64_t vocab_size = 0;     ///< 0: the paper's
  /// Formal languages, listops: tokens of the shortest sample, answers included; 0: 3, or what the task needs.
  int64_t min_len = 0;
  int64_t key_values = 4;           ///< mqar: pairs before the queries
  bool random_non_queries = false;  ///< mqar: random tokens, not 0, where nothing is asked
  int64_t max_depth = 10;           ///< listops: nodes from the root down to the deepest one
  int64_t max_args = 10;            ///< listops: arguments of an operator, from 2
  std::string path;                 ///< folder of the files of a task that reads some
  int64_t train_samples = 0;        ///< 0: fresh ones for ever
  /// What is held out: "test", or "validation", samples to choose settings by: of files those that they hold for it, or of
  /// image and rgb_image the last tenth of those that train, which then do not; else drawn apart from the test's.
  std::string held_out = "test";
  int64_t eval_samples = 1024;  ///< held out
  int64_t eval_min_len = 0;     ///< 0: as min_len
  int64_t eval_len = 0;         ///< longest held-out sample; 0: data.seq_len
};

inline bool is_given(const TaskOptions& task) { return task.name != "none"; }
/// Whether samples come from the files of data.task.path.
inline bool reads_files(const TaskOptions& task) {
  return task.name == "image" || task.name == "rgb_image" || task.name == "retrieval" ||
         task.name == "pathfinder";
}

/// The formal languages of arXiv 2405.04517, B.1.1, multi-query associative recall, nearest neighbor search, and of the
/// Long Range Arena ListOps, Image (CIFAR-10, grey and in colour), Retrieval and Pathfinder.
inline const std::vector<std::string>& task_names() {
  static const std::vector<std::string> names = {"parity",
                                                 "even_pairs",
                                                 "cycle_nav",
                                                 "mod_arithmetic",
                                                 "mod_arithmetic_brackets",
                                                 "solve_equation",
                                                 "reverse_string",
                                                 "stack_manipulation",
                                                 "bucket_sort",
                                                 "missing_duplicate",
                                                 "odds_first",
                                                 "repetition",
                                                 "set",
                                                 "majority",
                                                 "majority_count",
                                                 "mqar",
                                                 "nns",
                                                 "listops",
                                                 "image",
                                                 "rgb_image",
                                                 "retrieval",
                                                 "pathfinder"};
  return names;
}

}  // namespace xlstm::data
