#pragma once
// Tokens by how often they occur in the training text.
#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/data/token_file.h"
#include "train/evaluation.h"

namespace xlstm::train {

/// Counts of the ids below vocab_size in the files; a bar on standard error. Throws Error(kData) for larger ids.
std::vector<int64_t> count_tokens(const std::vector<std::shared_ptr<const data::TokenFile>>& files,
                                  int64_t vocab_size);

/// Token id -> its bucket: edges[i] <= count < edges[i+1], the last one without end. The first edge is 0.
TokenGroups frequency_buckets(const std::vector<int64_t>& counts,
                              const std::vector<int64_t>& edges);

}  // namespace xlstm::train
