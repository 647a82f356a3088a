#pragma once
// Launches a kernel: on the device through the CUDA runtime, on the host in the emulator. A kernel takes one params struct.
#include <stdexcept>
#include <string>

#include "cuda/prim/prim.h"
#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace prim {

struct LaunchShape {
  u32 blocks = 1;
  u32 threads = 1;
  std::size_t shared_bytes = 0;  ///< dynamic
  u32 cluster = 1;  ///< blocks per cluster; 0: all blocks are resident together (cooperative)
};

#if defined(__CUDACC__)

inline void check_launch(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // told here: whoever asks next, torch after its own launches, would take it for its own
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

/// Allows a kernel so much dynamic shared memory on the current device. The limit is the kernel's, not a launch's: it only
/// rises, or a launch of another host thread could find less than that thread has asked for. What a launch takes, and with
/// it how many blocks share a multiprocessor, is its own number.
inline cudaError_t allow_shared(const void* kernel, std::size_t bytes) {
  constexpr std::size_t kAlways = 48 * 1024;
  if (bytes <= kAlways) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::size_t> allowed;
  int device = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) return found;
  const std::lock_guard<std::mutex> lock(mutex);
  std::size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) most = bytes;
  return status;
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape,
            const Params& params, void* stream) {
  if (shape.blocks == 0) return;
  check_launch(allow_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  if (shape.cluster == 0) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
  }
  config.attrs = &attribute;
  config.numAttrs = shape.cluster == 1 ? 0 : 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, params), name);
}

#else

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape,
            const Params& params, void*) {
  if (shape.blocks == 0) return;
  simt::Launch launch_shape;
  launch_shape.grid = {shape.blocks, 1, 1};
  launch_shape.block = {shape.threads, 1, 1};
  launch_shape.shared_bytes = shape.shared_bytes;
  launch_shape.cluster = shape.cluster;
  launch_shape.seed = simt::launch_seed;
  try {
    simt::launch(launch_shape, [&] { kernel(params); });
  } catch (const simt::Error& error) {
    throw simt::Error(std::string(name) + ": " + error.what());
  }
}

#endif

}  // namespace prim
