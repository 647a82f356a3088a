#pragma once
// What the kernels of every operator are told about tensors and devices. No torch, no CUDA header.
#include <cstddef>
#include <cstdint>

namespace xlstm::cuda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

/// A strided (B,T,NH,D) tensor; gates of the mLSTM are (B,T,NH) with inner = 1. Strides in elements, any sign but negative.
struct View {
  void* data = nullptr;
  int64_t batch = 0, time = 0, head = 0, inner = 1;
};

/// What a device offers; decides tiles and kernels.
struct DeviceLimits {
  int compute_capability = 80;  ///< 10 * major + minor
  int num_multiprocessors = 108;
  size_t shared_bytes = 163 * 1024;  ///< dynamic shared memory that a block may opt into
  /// Compute capability 9.0: take the kernels for sm_90a where they are faster.
  bool hopper = false;
  bool cooperative = true;  ///< launches whose blocks are resident together
  int largest_cluster = 8;  ///< blocks of a cluster, each with all of shared_bytes, at most
};

/// A cudaStream_t; ignored by the emulator.
using Stream = void*;

}  // namespace xlstm::cuda
