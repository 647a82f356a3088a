#pragma once
// A model of three blocks for tests of what processes divide among them.
#include <string>

#include "csrc/models/model_options.h"

namespace xlstm::train {

constexpr int64_t kSmallVocabulary = 23;

inline models::ModelOptions small_options(const std::string& kind = "xlstm") {
  models::ModelOptions options;
  options.kind = kind;
  options.vocab_size = kSmallVocabulary;
  options.embedding_dim = 24;  // parts end inside parameters
  options.num_blocks = 3;
  options.num_heads = 2;
  if (kind == "xlstm") options.slstm_at = {1};
  return options;
}

}  // namespace xlstm::train
