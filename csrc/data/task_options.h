#pragma once
// Settings of a synthetic task: plain values (the configuration layer reads them).
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::data {

struct TaskOptions {
  std::string name = "none";  ///< one of task_names()
  int64_t vocab_size = 0;     ///< 0: the paper's
  /// Formal languages: tokens of the shortest sample, answers included; 0: 3, or what the task needs.
  int64_t min_len = 0;
  int64_t key_values = 4;           ///< mqar: pairs before the queries
  bool random_non_queries = false;  ///< mqar: random tokens, not 0, where nothing is asked
  int64_t train_samples = 0;        ///< 0: fresh ones for ever
  int64_t eval_samples = 1024;      ///< held out
  int64_t eval_min_len = 0;         ///< 0: as min_len
  int64_t eval_len = 0;             ///< longest held-out sample; 0: data.seq_len
};

inline bool is_given(const TaskOptions& task) { return task.name != "none"; }

/// The formal languages of arXiv 2405.04517, B.1.1, multi-query associative recall, and nearest neighbor search.
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
                                                 "nns"};
  return names;
}

}  // namespace xlstm::data
