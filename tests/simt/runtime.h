#pragma once
// Runs CUDA kernels on the CPU: every CUDA thread is a fiber of one OS thread. This header is all that kernels and
// tests see; the emulator itself (scheduler.cpp, collectives.cpp, ...) is never compiled with a thread sanitizer.
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>

namespace simt {

using Where = std::source_location;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

/// A fault of the kernel: divergence, deadlock, misuse of a primitive. The message names thread and source line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  Dim3 grid = {};
  Dim3 block = {};
  std::size_t shared_bytes = 0;  ///< dynamic shared memory per block, filled with NaN
  unsigned cluster = 1;          ///< blocks that run together; 0: all of them (cooperative launch)
  std::uint64_t seed =
      0;  ///< 0: first come first served; else a random ready thread at every switch
  unsigned registers_per_thread = 168;  ///< at launch, for set_max_registers
  unsigned shared_offset =
      0;  ///< bytes, of 128, from a multiple of 1024 to the shared window's begin
};

/// The seed that prim::launch uses.
inline std::uint64_t launch_seed = 0;

struct Counters {
  std::uint64_t switches = 0, mma = 0, wgmma = 0, ldmatrix = 0, ldmatrix_conflicts = 0;
};

/// Runs `body(argument)` once per CUDA thread of the grid and returns the counts. Throws Error.
Counters launch_raw(const Launch& shape, void (*body)(void*), void* argument);

template <class Kernel>
Counters launch(const Launch& shape, Kernel kernel) {
  return launch_raw(
      shape, [](void* argument) { (*static_cast<Kernel*>(argument))(); }, &kernel);
}

/// Reports the sanitizer of this build has made so far (races, overruns); 0 in a plain build.
int sanitizer_reports();

enum class Build { kPlain, kAddress, kThread };
Build build_kind();

}  // namespace simt
