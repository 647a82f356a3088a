#pragma once
// Conformance cases: kernels that exercise one primitive each, compiled by nvcc for a GPU and by g++ for the emulator.
// Both programs write the same lines, one per case; compare_conformance.py compares them. The lines:
//
//   CASE <name> exact <count> <hexadecimal words>
//   CASE <name> near <absolute> <relative> <count> <decimal numbers>      |a - b| <= absolute + relative |b|
//   INFO <name> <text>       an observation that nothing depends on
//   SKIP <name> <reason>     this device has not what the case needs
//   ERROR <name> <reason>    it threw, crashed or hung
//   END <number of cases>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/prim/launch.h"
#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"

namespace conformance {

using prim::Swizzle;
using prim::TensorMap;
using prim::u16;
using prim::u32;
using prim::u64;

#if defined(__CUDACC__)
inline constexpr bool kOnDevice = true;
#else
inline constexpr bool kOnDevice = false;
#endif

inline void check(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}
#if defined(__CUDACC__)
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#endif

/// Numbers on the host with a copy for the kernels, both aligned for tensor copies and zero at first.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count)
      : count_(count), host_(static_cast<T*>(::operator new(bytes(), std::align_val_t(128)))) {
    std::memset(static_cast<void*>(host_), 0, bytes());
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(__CUDACC__)
    cudaFree(device_);
#endif
    ::operator delete(static_cast<void*>(host_), std::align_val_t(128));
  }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return host_[i]; }
  const T& operator[](std::size_t i) const { return host_[i]; }

  /// What kernels are given; holds what the host has written so far.
  T* upload() {
#if defined(__CUDACC__)
    if (device_ == nullptr) check(cudaMalloc(&device_, bytes()), "cudaMalloc");
    check(cudaMemcpy(device_, host_, bytes(), cudaMemcpyHostToDevice), "copy to the device");
    return device_;
#else
    return host_;
#endif
  }
  /// After the kernels: what they wrote, for the host.
  Buffer& fetch() {
#if defined(__CUDACC__)
    check(cudaMemcpy(host_, device_, bytes(), cudaMemcpyDeviceToHost), "copy from the device");
#endif
    return *this;
  }

 private:
  std::size_t bytes() const { return count_ * sizeof(T); }
  std::size_t count_;
  T* host_;
#if defined(__CUDACC__)
  T* device_ = nullptr;
#endif
};

/// Launches a kernel and waits for its end.
template <class Params>
void run(void (*kernel)(Params), const prim::LaunchShape& shape, const Params& params) {
  prim::launch("conformance kernel", kernel, shape, params, nullptr);
#if defined(__CUDACC__)
  check(cudaDeviceSynchronize(), "kernel");
#endif
}

/// What one case writes.
class Dump {
 public:
  Dump(std::FILE* file, const std::string& name) : file_(file), name_(name) {}
  Dump(const Dump&) = delete;
  Dump& operator=(const Dump&) = delete;

  void exact(const Buffer<u32>& words) {
    begin();
    std::fprintf(file_, "CASE %s exact %zu", name_.c_str(), words.size());
    for (std::size_t i = 0; i < words.size(); ++i) std::fprintf(file_, " %x", words[i]);
    std::fprintf(file_, "\n");
  }
  void exact(const Buffer<u16>& words) {
    begin();
    std::fprintf(file_, "CASE %s exact %zu", name_.c_str(), words.size());
    for (std::size_t i = 0; i < words.size(); ++i) std::fprintf(file_, " %x", words[i]);
    std::fprintf(file_, "\n");
  }
  void near(const Buffer<float>& numbers, double absolute, double relative) {
    begin();
    std::fprintf(file_, "CASE %s near %g %g %zu", name_.c_str(), absolute, relative,
                 numbers.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) std::fprintf(file_, " %.9g", numbers[i]);
    std::fprintf(file_, "\n");
  }
  void info(const std::string& text) {
    std::fprintf(file_, "INFO %s %s\n", name_.c_str(), text.c_str());
  }

 private:
  /// The comparison knows results by the names of their cases.
  void begin() {
    if (std::exchange(has_result_, true)) throw std::logic_error(name_ + " has a second result");
  }

  std::FILE* file_;
  std::string name_;
  bool has_result_ = false;
};

enum class Needs {
  kSm80,
  kSm90a,  ///< kernels have empty bodies elsewhere
  kProbe,  ///< sm_90a hardware alone: asks what the emulator forbids; writes INFO lines only
};

struct Case {
  std::string name;
  Needs needs;
  std::function<void(Dump&)> run;
};
using Cases = std::vector<Case>;

void add_warp_cases(Cases& cases);
void add_numeric_cases(Cases& cases);
void add_memory_cases(Cases& cases);
void add_cluster_cases(Cases& cases);
void add_tensor_cases(Cases& cases);
void add_wgmma_cases(Cases& cases);
void add_product_cases(Cases& cases);
void add_probes(Cases& cases);

// Inputs ----------------------------------------------------------------------------------------------------------------

inline u32 mixed(u32 i) {
  i = (i ^ (i >> 16)) * 0x7feb352dU;
  i = (i ^ (i >> 15)) * 0x846ca68bU;
  return i ^ (i >> 16);
}
/// -8 .. 8: products and their sums are exact in every format.
inline float whole(u32 i) { return static_cast<float>(static_cast<int>(mixed(i) % 17) - 8); }
/// In [-1, 1), 24 bits.
inline float fraction(u32 i) {
  return static_cast<float>(static_cast<int>(mixed(i) >> 7) - (1 << 24)) / (1 << 24);
}
inline u32 float_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
/// Of a number that bfloat16 holds exactly; else towards zero.
inline u16 bf16_bits(float value) { return static_cast<u16>(float_bits(value) >> 16); }
/// Of a number from -2048 to 2048 that is whole.
inline u16 f16_bits(float value) {
  if (value == 0) return 0;
  const u32 bits = float_bits(value);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
  return static_cast<u16>((bits >> 16 & 0x8000U) | static_cast<u32>(exponent) << 10 |
                          (bits >> 13 & 0x3ffU));
}

/// Rows of 16-bit numbers, `pitch` apart; boxes of `box_width` x `box_height`.
inline TensorMap matrix_map(void* base, u32 width, u32 height, u32 pitch, u32 box_width,
                            u32 box_height, Swizzle mode) {
  return prim::make_tensor_map(
      {base, 2, {width, height}, {2, u64{2} * pitch}, {box_width, box_height}, 2, mode});
}
inline const char* mode_name(Swizzle mode) {
  return mode == Swizzle::kNone  ? "none"
         : mode == Swizzle::k128 ? "128B"
         : mode == Swizzle::k64  ? "64B"
                                 : "32B";
}
inline constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

// In kernels --------------------------------------------------------------------------------------------------------------

/// Bytes of shared memory before the first tile: mbarriers live there.
inline constexpr u32 kTile = 1024;
DEVICE_FUNCTION u64* barriers() { return reinterpret_cast<u64*>(prim::dynamic_shared()); }
DEVICE_FUNCTION unsigned char* tiles() { return prim::dynamic_shared() + kTile; }

struct Words {
  const u32* in;
  u32* out;
};

}  // namespace conformance
