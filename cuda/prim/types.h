#pragma once
// Types and address arithmetic shared by the device and the host bodies of the primitives.
#include <cstdint>

#if defined(__CUDACC__)
#define PRIM_FUNCTION __host__ __device__ __forceinline__
#else
#define PRIM_FUNCTION inline
#endif

namespace prim {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

/// Sixteen-bit numbers as stored in memory and in matrix fragments.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

/// Codes of the swizzle in a wgmma descriptor. The driver's tensor maps number them otherwise (CU_TENSOR_MAP_SWIZZLE).
enum class Swizzle : u32 { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

PRIM_FUNCTION constexpr u32 swizzle_bytes(Swizzle mode) {
  return mode == Swizzle::kNone ? 16 : mode == Swizzle::k128 ? 128 : mode == Swizzle::k64 ? 64 : 32;
}

/// Where the byte at logical shared address `a` lies: bits 4-6 (5, 4) ^= bits 7-9 (8, 7) of the absolute address.
PRIM_FUNCTION constexpr u32 swizzled(u32 a, Swizzle mode) {
  return a ^ ((a >> 3) & (mode == Swizzle::kNone ? 0U : swizzle_bytes(mode) - 16));
}

/// Describes a tensor in global memory to the copy engine; made by make_tensor_map (tensor_map.h). The bits of a
/// CUtensorMap on the device, the emulator's own description on the host. A kernel takes it inside a
/// `const GRID_CONSTANT` parameter.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

/// 64-bit matrix descriptor of wgmma (PTX "Matrix Descriptor Format"); address and offsets in bytes, base offset 0.
PRIM_FUNCTION constexpr u64 wgmma_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes,
                                             Swizzle mode) {
  return static_cast<u64>((address & 0x3ffffU) >> 4) |
         static_cast<u64>((leading_bytes & 0x3ffffU) >> 4) << 16 |
         static_cast<u64>((stride_bytes & 0x3ffffU) >> 4) << 32 | static_cast<u64>(mode) << 62;
}

}  // namespace prim
