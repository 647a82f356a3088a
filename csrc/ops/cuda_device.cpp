#include "csrc/ops/cuda_device.h"

#include <c10/util/Exception.h>
#include <c10/util/Logging.h>

#include <cstdlib>
#include <mutex>
#include <set>

#ifdef XLSTM_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "cuda/slstm/slstm.h"
#endif

namespace xlstm::ops {

void log_once(const std::string& text) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(text).second) LOG(INFO) << text;
}

bool takes_kernels(std::string_view op, const std::string& lack) {
  const std::string path = lack.empty() ? ": kernels for CUDA" : ": generic path on CUDA: " + lack;
  log_once(std::string(op) + path);
  return lack.empty();
}

#ifdef XLSTM_CUDA

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
  TORCH_CHECK(status == cudaSuccess, "device ", device, ": ", cudaGetErrorString(status));
  return value;
}

struct Device {
  cuda::DeviceLimits limits;
  std::string lack;  ///< why no kernel can run on it, or empty
};

Device query(int device) {
  const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
  Device result;
  cuda::DeviceLimits& limits = result.limits;
  limits.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                              attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_bytes =
      static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
#ifdef XLSTM_SM90A
  const char* hopper = std::getenv("XLSTM_HOPPER");
  limits.hopper =
      limits.compute_capability == 90 && (hopper == nullptr || std::string(hopper) != "0");
#endif
  const std::string capability = "compute capability " +
                                 std::to_string(limits.compute_capability / 10) + "." +
                                 std::to_string(limits.compute_capability % 10);
  if (limits.compute_capability < 80) {
    result.lack = "no kernels for " + capability;
  } else if (const char* error = cuda::slstm_code_error()) {
    result.lack = "no code for " + capability + " in this build: " + error;
  } else if (limits.hopper) {
    limits.largest_cluster = cuda::slstm_largest_cluster(limits.shared_bytes);
  }
  return result;
}

const Device& device_of(at::Device device) {
  constexpr int kMostDevices = 128;
  static std::once_flag flags[kMostDevices];
  static Device devices[kMostDevices];
  const int index = device.index();
  TORCH_CHECK(index >= 0 && index < kMostDevices, "device ", device, ": expected at most ",
              kMostDevices, " devices");
  std::call_once(flags[index], [index] { devices[index] = query(index); });
  return devices[index];
}

}  // namespace

std::string cuda_kernels_lack(at::Device device) {
  const char* choice = std::getenv("XLSTM_CUDA_KERNELS");
  if (choice != nullptr && std::string(choice) == "off") return "XLSTM_CUDA_KERNELS=off";
  return device_of(device).lack;
}

const cuda::DeviceLimits& device_limits(at::Device device) { return device_of(device).limits; }

cuda::Stream current_stream(at::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

#else

std::string cuda_kernels_lack(at::Device) { return "built without nvcc"; }

const cuda::DeviceLimits& device_limits(at::Device) {
  TORCH_CHECK(false, "device limits: built without nvcc");
}

cuda::Stream current_stream(at::Device) { TORCH_CHECK(false, "stream: built without nvcc"); }

#endif

}  // namespace xlstm::ops
