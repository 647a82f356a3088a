// One block per 32 columns: a warp takes every 16th row, eight loads under way, then the 16 sums are added in order.
#include "cuda/column_sums.h"

#include "cuda/numbers.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 512, kColumns = 32, kGroups = kThreads / kColumns;

PRIM_FUNCTION constexpr int64_t blocks_of(int64_t columns) {
  return (columns + kColumns - 1) / kColumns;
}

KERNEL_FUNCTION(kThreads, 2)
column_sums(const GRID_CONSTANT ColumnSums p) {
  float* sums = reinterpret_cast<float*>(prim::dynamic_shared());
  const int thread = static_cast<int>(prim::thread_idx().x);
  int64_t block = prim::block_idx().x;
  int part = 0;
  while (block >= blocks_of(p.parts[part].size)) block -= blocks_of(p.parts[part++].size);
  const ColumnSums::Part& out = p.parts[part];
  const int64_t column = block * kColumns + thread % kColumns;
  float sum = 0;
  if (column < out.size) {
    const float* from = p.rows + out.first + column;
#pragma unroll 8
    for (int64_t row = thread / kColumns; row < p.count; row += kGroups) sum += from[row * p.pitch];
  }
  sums[thread] = sum;
  prim::sync_block();
  if (thread >= kColumns || column >= out.size) return;
#pragma unroll
  for (int group = 1; group < kGroups; ++group) sum += sums[group * kColumns + thread];
  store_number(out.out, column * out.stride, out.dtype, sum);
}

}  // namespace

void launch_column_sums(const ColumnSums& params, Stream stream) {
  int64_t blocks = 0;
  for (int part = 0; part < params.num_parts; ++part) blocks += blocks_of(params.parts[part].size);
  prim::launch("column_sums", column_sums,
               {static_cast<u32>(blocks), kThreads, kThreads * sizeof(float)}, params, stream);
}

}  // namespace xlstm::cuda
