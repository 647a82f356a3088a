#pragma once
#include "csrc/ops/cpu/capability.h"
#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu {

/// block_linear and its backward: `blocks` maps of `in` to `out` channels on each row. "Acc" is the
/// dtype of accumulation.
struct BlockLinearParams {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0, blocks = 0, in = 0, out = 0;
  Rows x;
  const void* weight = nullptr;  // Acc (blocks, out, in)
  const void* bias = nullptr;    // Acc (blocks * out) or null
  void* y = nullptr;             // packed rows, forward only

  Rows dy;                                  // from here on backward only
  void* dx = nullptr;                       // packed rows
  int64_t block_count = 0, block_rows = 1;  // row blocks of the sums over rows
  int64_t partial_size = 0;  // Acc elements of one row block, see block_linear_partial_size
  void* partials = nullptr;  // Acc (block_count, partial_size)
  void* dweight = nullptr;   // Acc (blocks, out, in)
  void* dbias = nullptr;     // Acc (blocks * out) or null
};

/// Blocks up to this size (in and out) run vectorised in one pass over the rows, larger ones as
/// GEMMs.
constexpr int64_t kSmallBlock = 16;

/// Elements of one row block's sums: weights (padded so that any vector layout fits) and biases for
/// small blocks, biases alone for large ones.
inline int64_t block_linear_partial_size(int64_t blocks, int64_t in, int64_t out) {
  const int64_t bias = blocks * out;
  return in <= kSmallBlock && out <= kSmallBlock ? blocks * in * kSmallBlock + bias : bias;
}

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(block_linear, BlockLinearParams)
XLSTM_CPU_KERNEL(block_linear_backward, BlockLinearParams)
