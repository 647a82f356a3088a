#include "cuda/prim/launch.h"
#include "cuda/slstm/slstm_launch.h"

namespace xlstm::cuda {
namespace {

struct ClearParams {
  u32* counters;
  int32_t count;
};

KERNEL_FUNCTION(kSlstmThreads)
slstm_clear(const GRID_CONSTANT ClearParams p) {
  const int i = static_cast<int>(prim::block_idx().x * kSlstmThreads + prim::thread_idx().x);
  if (i < p.count) p.counters[i] = 0;
}

}  // namespace

void launch_slstm_clear(u32* counters, int32_t count, Stream stream) {
  prim::launch("slstm_clear", slstm_clear,
               {static_cast<u32>((count + kSlstmThreads - 1) / kSlstmThreads), kSlstmThreads, 0},
               ClearParams{counters, count}, stream);
}

}  // namespace xlstm::cuda
