// segment scan: from the segments' own sums to the states that enter them. A thread has sixteen numbers, four by four: all
// threads want the same gammas, and one load of them must serve many numbers.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/pieces.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kVectors = 4;
constexpr int64_t kBlockNumbers = int64_t{kThreads} * 4 * kVectors;

/// Four neighbouring numbers of an item from `i` on, those beyond its size 0.
DEVICE_FUNCTION void load_four(const SegmentScanParams& p, const float* item, int64_t i,
                               float (&x)[4]) {
  if (p.vector && i < p.size) {
    Piece<float> four;
    four.load(item, i);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = four[k];
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = i + k < p.size ? item[i + k] : 0.0F;
}
DEVICE_FUNCTION void store_four(const SegmentScanParams& p, float* item, int64_t i,
                                const float (&x)[4]) {
  if (p.vector && i < p.size) {
    Piece<float> four;
    four.set(x);
    four.store(item, i);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (i + k < p.size) item[i + k] = x[k];
}

KERNEL_FUNCTION(kThreads, 4)
mlstm_segment_scan(const GRID_CONSTANT SegmentScanParams p) {
  const int64_t blocks_per_item = (p.size + kBlockNumbers - 1) / kBlockNumbers;
  const int64_t item = prim::block_idx().x / blocks_per_item;
  const int64_t first =
      prim::block_idx().x % blocks_per_item * kBlockNumbers + 4 * int64_t{prim::thread_idx().x};
  float entering[kVectors][4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (p.start != nullptr)
      load_four(p, p.start + item * p.size, first + v * 4 * kThreads, entering[v]);
#pragma unroll 1
  for (int step = 0; step < p.segments; ++step) {
    const int64_t segment = item * p.segments + (p.reverse ? p.segments - 1 - step : step);
    float* const sums = p.sums + segment * p.size;
    const float gamma = p.gamma[segment];
    float sum[kVectors][4];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) load_four(p, sums, first + v * 4 * kThreads, sum[v]);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      store_four(p, sums, first + v * 4 * kThreads, entering[v]);
#pragma unroll
      for (int k = 0; k < 4; ++k) entering[v][k] = gamma * entering[v][k] + sum[v][k];
    }
  }
}

}  // namespace

void launch_segment_scan(const SegmentScanParams& params, Stream stream) {
  const auto aligned = [](const float* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  SegmentScanParams p = params;
  p.vector = p.size % 4 == 0 && aligned(p.sums) && aligned(p.start);
  const int64_t blocks = p.items * ((p.size + kBlockNumbers - 1) / kBlockNumbers);
  prim::launch("mlstm_segment_scan", mlstm_segment_scan, {static_cast<prim::u32>(blocks), kThreads},
               p, stream);
}

}  // namespace xlstm::cuda
