#pragma once
// What xlstm-eval prints and writes.
#include <cstdint>
#include <string>
#include <vector>

#include "train/evaluation.h"

namespace xlstm::train {

struct EvalReport {
  std::string checkpoint, data;
  int64_t seq_len = 0, trained_seq_len = 0;
  EvaluationResult result;
  std::vector<JudgedSet> sources;     ///< the parts of `result`, where it has parts
  std::vector<int64_t> bucket_edges;  ///< first counts of the result's groups, where it has groups
  double seconds = 0;
};

/// A line for every source, then one for all, then the buckets.
void print_report(const EvalReport& report);
void write_report(const std::string& path, const EvalReport& report);

}  // namespace xlstm::train
