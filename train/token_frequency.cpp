#include "train/token_frequency.h"

#include <algorithm>

#include "csrc/core/progress.h"

namespace xlstm::train {
namespace {

constexpr int64_t kPiece = 1 << 20;  ///< tokens read at once

}  // namespace

std::vector<int64_t> count_tokens(const std::vector<std::shared_ptr<const data::TokenFile>>& files,
                                  int64_t vocab_size) {
  int64_t total = 0, done = 0;
  for (const auto& file : files) total += file->num_tokens();
  Progress progress("counting tokens", total, "tokens");
  std::vector<int64_t> counts(static_cast<size_t>(vocab_size), 0), ids;
  for (const auto& file : files) {
    file->check_vocab(vocab_size);
    for (int64_t first = 0; first < file->num_tokens(); first += kPiece) {
      ids.resize(static_cast<size_t>(std::min(kPiece, file->num_tokens() - first)));
      file->read(first, static_cast<int64_t>(ids.size()), ids.data());
      for (const int64_t id : ids) ++counts[static_cast<size_t>(id)];
      progress.update(done += static_cast<int64_t>(ids.size()));
    }
  }
  progress.finish();
  return counts;
}

TokenGroups frequency_buckets(const std::vector<int64_t>& counts,
                              const std::vector<int64_t>& edges) {
  TokenGroups groups;
  groups.count = static_cast<int64_t>(edges.size());
  for (const int64_t count : counts)
    groups.of_token.push_back(std::upper_bound(edges.begin(), edges.end(), count) - edges.begin() -
                              1);
  return groups;
}

}  // namespace xlstm::train
