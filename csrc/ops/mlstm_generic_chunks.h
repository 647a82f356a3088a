#pragma once
// Tokens of all sequences as one batch of equally long chunks, for mlstm_generic.cpp.
//
// Chunks never cross a sequence or a reset; shorter ones are padded. They are ordered by their place in their sequence:
// chunk `j` of all sequences that have one, longest sequence first, then chunk j + 1 of those that have one, and so on.
// A step of the recurrence over chunks is thus a run of chunks, and it goes on from the first ones of the step before.
#include <vector>

#include "csrc/ops/mlstm_arguments.h"

namespace xlstm::ops {

struct MlstmChunks {
  int64_t batch = 0, time = 0;
  int64_t length = 1, count = 0;     ///< L, NC
  std::vector<int64_t> step_counts;  ///< chunks of every step, never rising
  at::Tensor order;                  ///< (N) sequences, longest first; undefined: as they are
  at::Tensor tokens;                 ///< (NC * L) rows of (B * T), 0 where padded
  at::Tensor slots;                  ///< (B * T) rows of (NC * L)
  at::Tensor padding;                ///< (NC,1,L) bool; undefined: none
  at::Tensor fresh;                  ///< (NC) bool: no state enters; undefined: none
  at::Tensor previous;  ///< (NC) what enters a chunk: row of [initial states; chunks' final states]

  /// The sequences of a step, and how many of them, the first ones, have a chunk in the next step too.
  struct StepRange {
    int64_t going_on, count;
  };
  StepRange step_range(size_t step) const {
    return {step + 1 < step_counts.size() ? step_counts[step + 1] : 0, step_counts[step]};
  }

  /// (B,T,NH,...) -> (NC,NH,L,...) of the given type, `fill` where padded
  at::Tensor gather(const at::Tensor& x, at::ScalarType type, double fill = 0) const;
  /// (NC,NH,L,...) -> (B,T,NH,...) of the given type
  at::Tensor scatter(const at::Tensor& x, at::ScalarType type) const;
  /// (N,...) in the order of the first step, and back
  at::Tensor to_order(const at::Tensor& states) const;
  at::Tensor from_order(const at::Tensor& states) const;
};

MlstmChunks make_mlstm_chunks(const MlstmArguments& a, const MlstmSizes& sizes);

}  // namespace xlstm::ops
