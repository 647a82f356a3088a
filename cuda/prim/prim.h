#pragma once
// One-instruction primitives of the CUDA kernels: inline PTX on the device, the emulator of tests/simt on the host.
// A kernel includes this header alone, contains no asm, and takes shared memory from dynamic_shared().
//
//   KERNEL_FUNCTION(128) name(Params p) {...}   __global__ with launch bounds, a plain function on the host
//   KERNEL_FUNCTION(384, 1) name(...)           the same with a minimum of blocks per multiprocessor; set_max_registers
//                                               is ignored without it
//   DEVICE_FUNCTION T name(...)                 inlined helper
//   PRIM_HAS_SM90A   1 where wgmma and set_max_registers exist: the emulator and device code for sm_90a. They trap
//                    in device code for other targets, so that one source compiles for all.
//   const GRID_CONSTANT Params p                a kernel parameter that is read in place, never copied; TensorMaps must
//                                               lie in one
#if defined(__CUDACC__)
#include "cuda/prim/device_sm80.cuh"
#include "cuda/prim/device_sm90.cuh"
#include "cuda/prim/device_tma.cuh"
#include "cuda/prim/device_wgmma.cuh"
#define DEVICE_FUNCTION __device__ __forceinline__
#define KERNEL_FUNCTION(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define GRID_CONSTANT __grid_constant__
#else
#include "cuda/prim/host.h"
#define DEVICE_FUNCTION inline
#define KERNEL_FUNCTION(...) void
#define GRID_CONSTANT
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PRIM_HAS_SM90A 1
#else
#define PRIM_HAS_SM90A 0
#endif

namespace prim {

/// For racecheck of compute-sanitizer (XLSTM_RACECHECK in CMake), which does not see all that orders accesses: an arrival at
/// an mbarrier orders for it what its own thread did, not what a sync_warp had ordered before; an asynchronous remote store
/// and the wait for its bytes nothing at all. Built so, kernels order the same accesses by means that it knows.
#if defined(PRIM_RACECHECK)
inline constexpr bool kRacecheck = true;
#else
inline constexpr bool kRacecheck = false;
#endif

// A warp's arrival at an mbarrier: after a sync_warp one lane arrives for all.
inline constexpr u32 kArrivalsPerWarp = kRacecheck ? 32 : 1;
DEVICE_FUNCTION void mbar_init_warps(u64* bar, u32 warps) {
  mbar_init(bar, warps * kArrivalsPerWarp);
}
DEVICE_FUNCTION void mbar_arrive_warp(u64* bar) {
  if (kRacecheck || thread_idx().x % 32 == 0) mbar_arrive(bar);
}

/// All blocks of the grid meet; they must be resident together. `counter` starts at 0, `round` counts from 1.
DEVICE_FUNCTION void grid_barrier(u32* counter, u32 round) {
  sync_block();
  if (thread_idx().x == 0) {
    red_release_add(counter, 1);
    while (static_cast<int>(ld_acquire(counter) - round * grid_dim().x) < 0) backoff();
  }
  sync_block();
}

}  // namespace prim
