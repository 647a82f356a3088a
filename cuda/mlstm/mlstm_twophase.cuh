#pragma once
// Shared by the state and out kernels: the layout of the states in memory, and where chunks lie.
#include "cuda/mlstm/mlstm_tiles.cuh"

namespace xlstm::cuda {

constexpr int kTwoPhaseThreads = 256;
constexpr int kBlockTokens = 64;  // of a chunk that are in shared memory at a time
constexpr int kDotTile = 128;     // columns for which a bfloat16 row's dots have a number

PRIM_FUNCTION constexpr int32_t padded(int32_t width) { return divide_up(width, 64) * 64; }

/// First number of a plane of the state of a slot: rows of padded(dv) numbers.
template <int kPlanes>
DEVICE_FUNCTION int64_t state_offset(const Chunks& c, int head, int slot, int plane, int dqk,
                                     int dv) {
  const int64_t matrix = (int64_t{head} * c.slots + slot) * kPlanes + plane;
  return matrix * padded(dqk) * padded(dv);
}

/// The thread, from an instruction that stays where it is: addresses made of it are not computed before a loop and then
/// kept in registers throughout.
DEVICE_FUNCTION int thread_here() {
  const u32 thread = prim::thread_idx().x;
  return static_cast<int>(prim::shfl(thread, thread % 32));
}
DEVICE_FUNCTION int lane_here() { return thread_here() % 32; }

/// Tiles in flight that give two blocks per multiprocessor, else as many as fit. `bytes(stages)`: of one block.
template <class Bytes>
int choose_stages(int most, Bytes bytes, const DeviceLimits& device) {
  constexpr size_t kReserved = 1024;  // that the device keeps of every block
  for (const size_t blocks : {2, 1}) {
    for (int stages = most; stages >= 2; --stages)
      if (blocks * (bytes(stages) + kReserved) <= device.shared_bytes + kReserved) return stages;
  }
  return 2;
}

}  // namespace xlstm::cuda
