#pragma once
// How an mLSTM call on the CPU is cut into chunks and parts.
#include <vector>

#include "csrc/ops/cpu/mlstm_params.h"
#include "csrc/ops/mlstm_arguments.h"

namespace xlstm::ops {

struct MlstmPlan {
  std::vector<cpu::MlstmChunk> chunks;  // of all sequences, in order
  std::vector<cpu::MlstmPart>
      parts;  // of all sequences, in order; a sequence without tokens has one empty part
  int64_t max_length = 0;  // of a chunk
  int64_t max_part_chunks = 0;
  int64_t span_chunks = 1;  // chunks whose states the backward pass keeps at a time
};

/// Cuts every sequence at its resets and into chunks of equal size, and into parts where sequences and heads alone would
/// leave threads idle. Reads reset and cu_seqlens.
MlstmPlan plan_mlstm(const MlstmArguments& a, const MlstmSizes& sizes, int64_t num_threads);

}  // namespace xlstm::ops
