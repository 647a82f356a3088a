// segment scan: from the segments' own sums to the states that enter them. One thread per number.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"
#include "cuda/prim/prim.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256;

KERNEL_FUNCTION(kThreads)
mlstm_segment_scan(const GRID_CONSTANT SegmentScanParams p) {
  const int64_t blocks_per_item = (p.size + kThreads - 1) / kThreads;
  const int64_t item = prim::block_idx().x / blocks_per_item;
  const int64_t i = prim::block_idx().x % blocks_per_item * kThreads + prim::thread_idx().x;
  if (i >= p.size) return;
  float entering = p.start == nullptr ? 0.0F : p.start[item * p.size + i];
  for (int step = 0; step < p.segments; ++step) {
    const int64_t segment = item * p.segments + (p.reverse ? p.segments - 1 - step : step);
    float& sum = p.sums[segment * p.size + i];
    const float next = p.gamma[segment] * entering + sum;
    sum = entering;
    entering = next;
  }
}

}  // namespace

void launch_segment_scan(const SegmentScanParams& params, Stream stream) {
  const int64_t blocks = params.items * ((params.size + kThreads - 1) / kThreads);
  prim::launch("mlstm_segment_scan", mlstm_segment_scan, {static_cast<prim::u32>(blocks), kThreads},
               params, stream);
}

}  // namespace xlstm::cuda
