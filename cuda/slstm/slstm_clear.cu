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

#if defined(__CUDACC__)

const char* slstm_code_error() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, slstm_clear);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here, or by the first launch
  const bool no_code = status == cudaErrorNoKernelImageForDevice ||
                       status == cudaErrorInvalidDeviceFunction ||
                       status == cudaErrorUnsupportedPtxVersion;
  return no_code ? cudaGetErrorString(status) : nullptr;
}

int slstm_largest_cluster(size_t shared_bytes) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kSlstmThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const auto runs = [&](u32 blocks) {
    config.gridDim = dim3(blocks);
    cluster.val.clusterDim = {blocks, 1, 1};
    int count = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, slstm_clear, &config);
    if (status != cudaSuccess) cudaGetLastError();
    return status != cudaSuccess || count > 0;  // no answer is no reason to do without clusters
  };
  int blocks = DeviceLimits{}.largest_cluster;
  if (prim::allow_shared(reinterpret_cast<const void*>(slstm_clear), shared_bytes) != cudaSuccess) {
    cudaGetLastError();
    return blocks;
  }
  while (blocks > 1 && !runs(static_cast<u32>(blocks))) --blocks;
  return blocks;
}

#endif

}  // namespace xlstm::cuda
