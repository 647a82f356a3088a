#pragma once
// Block-diagonal linear maps with small square blocks, y[b S + o] = sum_i W[b][o][i] x[b S + i] + bias[b S + o]. Larger
// blocks are batched matrix products of the caller.
#include "cuda/rows.h"

namespace xlstm::cuda {

/// All pointers are multiples of 16 bytes.
struct BlockLinearParams {
  int64_t rows = 0;
  int32_t blocks = 0, size = 0;   ///< size S of a block: 2, 4 or 8
  Dtype dtype = Dtype::kFloat32;  ///< of everything
  RowView x;
  const void* weight = nullptr;  ///< (blocks,S,S) contiguous
  const void* bias = nullptr;    ///< (blocks*S) or null
  RowView y;
  int64_t strip = 1;  ///< rows per thread; set by the launcher
};

/// dx[b S + i] = sum_o W[b][o][i] dy[b S + o], and sums over the rows of dy_o x_i and of dy_o.
struct BlockLinearGradientParams {
  int64_t rows = 0;  ///< at least 1
  int32_t blocks = 0, size = 0;
  Dtype dtype = Dtype::kFloat32;
  RowView x, dy;
  const void* weight = nullptr;  ///< (blocks,S,S) contiguous
  RowView dx;
  void* dweight = nullptr;    ///< (blocks,S,S) contiguous, in dtype
  void* dbias = nullptr;      ///< (blocks*S) or null
  float* partials = nullptr;  ///< block_linear_partials() numbers of scratch memory
  int64_t strip = 1;          ///< rows per thread; set by the launcher, as is
  int32_t width = 1;          ///< how many threads of a block stand side by side along the channels
};

/// Whether the kernels take these: S of 2, 4 or 8 and rows whose channels can be moved 16 bytes at a time and counted in 32
/// bits.
bool block_linear_supported(int64_t blocks, int64_t size, Dtype dtype);
bool block_linear_aligned(const RowView& view, Dtype dtype);

void launch_block_linear(BlockLinearParams params, Stream stream);

int64_t block_linear_partials(const BlockLinearGradientParams& params);
void launch_block_linear_gradients(BlockLinearGradientParams params, Stream stream);

}  // namespace xlstm::cuda
