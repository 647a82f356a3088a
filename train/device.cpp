#include "train/device.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/resource.h>

#include <algorithm>
#include <fstream>

#include "csrc/core/error.h"

namespace xlstm::train {
namespace {

/// Number in a one-line file such as a control group's memory.max; -1 for "max" or no such file.
int64_t read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value = -1;
  return file >> value ? value : -1;
}

int64_t available_host_bytes() {
  int64_t available = -1;
  std::ifstream info("/proc/meminfo");
  for (std::string key, rest; info >> key && std::getline(info, rest);) {
    if (key == "MemAvailable:") available = std::stoll(rest) * 1024;
  }
  const int64_t limit = read_number("/sys/fs/cgroup/memory.max");
  const int64_t used = read_number("/sys/fs/cgroup/memory.current");
  if (limit >= 0 && used >= 0) {
    const int64_t left = std::max<int64_t>(0, limit - used);
    available = available < 0 ? left : std::min(available, left);
  }
  return available;
}

}  // namespace

at::Device choose_device(const std::string& name, const std::string& setting) {
  if (name != "auto" && name != "cpu" && name != "cuda")
    throw Error(ExitCode::kConfig, setting + ": expected auto, cpu or cuda, got " + name +
                                       "; CUDA_VISIBLE_DEVICES picks the GPU");
  const bool has_gpu = at::hasCUDA();
  if (name == "cpu" || (name == "auto" && !has_gpu)) return at::kCPU;
  if (!has_gpu)
    throw Error(ExitCode::kConfig,
                setting +
                    ": torch sees no GPU here (no driver, or a build of torch without CUDA); set " +
                    setting + "=cpu or =auto");
  return {at::kCUDA, c10::impl::VirtualGuardImpl(at::kCUDA).getDevice().index()};
}

at::ScalarType choose_weights_dtype(const std::string& name, const std::string& setting,
                                    bool autocast) {
  if (name == "float32" || (autocast && name == "bfloat16")) return at::kFloat;
  if (name == "bfloat16_weights") return at::kBFloat16;
  if (name == "int8_weights") return at::kChar;
  throw Error(ExitCode::kConfig, setting + ": expected float32, " + (autocast ? "bfloat16, " : "") +
                                     "bfloat16_weights or int8_weights, got " + name);
}

void use_own_stream(at::Device device) {
  if (device.is_cpu()) return;
  const c10::impl::VirtualGuardImpl guard(device.type());
  guard.exchangeStream(guard.getStreamFromGlobalPool(device));
}

void wait_for(at::Device device) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
}

void release_reserved_memory(at::Device device) {
  if (!device.is_cpu()) at::getDeviceAllocator(device.type())->emptyCache();
}

double peak_memory_gib(at::Device device) {
  if (device.is_cpu()) {
    struct rusage usage {};
    ::getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_maxrss) / (1 << 20);  // ru_maxrss is in KiB
  }
  const auto stats = at::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  constexpr size_t kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return static_cast<double>(stats.allocated_bytes[kAll].peak) / (int64_t{1} << 30);
}

int64_t available_memory_bytes(at::Device device) {
  if (device.is_cpu()) return available_host_bytes();
  const auto [free_bytes, total] =
      at::getDeviceAllocator(device.type())->getMemoryInfo(device.index());
  return static_cast<int64_t>(free_bytes);
}

std::string describe(at::Device device) {
  return device.is_cpu() ? std::to_string(at::get_num_threads()) + " threads" : device.str();
}

}  // namespace xlstm::train
