#pragma once
// Makes TensorMaps on the host: one validation for both builds, then the driver's encoding (nvcc) or the emulator's.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/prim/types.h"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#endif

namespace prim {

/// A tensor in global memory and the box of it that one copy moves. Dimension 0 is contiguous and comes first
/// everywhere; `strides` are bytes between elements of dimension i (strides[0] is implied).
struct TensorMapSpec {
  void* base = nullptr;
  u32 rank = 0;
  u64 dims[5] = {};
  u64 strides[5] = {};
  u32 box[5] = {};
  u32 element_bytes = 2;
  Swizzle swizzle = Swizzle::k128;
};

/// Throws std::invalid_argument that names the first field against the rules of cuTensorMapEncodeTiled, and of this
/// project: a swizzled box is exactly as wide as its swizzle, because nothing defines the pitch of a narrower one.
inline void check_tensor_map(const TensorMapSpec& spec) {
  const auto require = [](bool condition, const std::string& field, const char* rule) {
    if (!condition) throw std::invalid_argument("tensor map: " + field + " must be " + rule);
  };
  require(spec.rank >= 1 && spec.rank <= 5, "rank", "1 to 5");
  require(spec.element_bytes == 2 || spec.element_bytes == 4, "element_bytes", "2 or 4");
  require(spec.base != nullptr && reinterpret_cast<std::uintptr_t>(spec.base) % 16 == 0, "base",
          "16-byte aligned and not null");
  u64 box_bytes = spec.element_bytes;
  for (u32 i = 0; i < 5 && i < spec.rank; ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    require(spec.dims[i] >= 1 && spec.dims[i] <= u64{1} << 32, "dims" + index, "1 to 2^32");
    require(spec.box[i] >= 1 && spec.box[i] <= 256, "box" + index, "1 to 256");
    box_bytes *= spec.box[i];
    if (i == 0) {
      require(spec.strides[0] == 0 || spec.strides[0] == spec.element_bytes, "strides[0]",
              "0 or the element size");
      continue;
    }
    require(spec.strides[i] > 0 && spec.strides[i] % 16 == 0, "strides" + index,
            "a positive multiple of 16");
    require(spec.strides[i] < u64{1} << 40, "strides" + index, "less than 2^40");
  }
  const u32 inner = spec.box[0] * spec.element_bytes;
  require(inner % 16 == 0, "box[0]", "a multiple of 16 bytes");
  require(spec.swizzle == Swizzle::kNone || inner == swizzle_bytes(spec.swizzle), "box[0]",
          "as wide as the swizzle");
  require(box_bytes <= 227 * 1024, "box", "no larger than a block's shared memory");
}

#if defined(__CUDACC__)

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr)
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled (it needs 12.0)");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

inline CUtensorMapSwizzle driver_swizzle(Swizzle mode) {
  switch (mode) {
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

/// Without the checks.
inline TensorMap encode_tensor_map(const TensorMapSpec& spec) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap), "TensorMap holds a CUtensorMap");
  // The copy engine moves bits: unsigned integers stand for the floating-point types of their size.
  const CUtensorMapDataType type =
      spec.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  cuuint64_t dims[5], strides[5];
  cuuint32_t box[5], element_strides[5];
  for (u32 i = 0; i < 5 && i < spec.rank; ++i) {
    dims[i] = spec.dims[i];
    box[i] = spec.box[i];
    element_strides[i] = 1;
    if (i > 0) strides[i - 1] = spec.strides[i];
  }
  CUtensorMap encoded;
  const CUresult status =
      encode(&encoded, type, spec.rank, spec.base, dims, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, driver_swizzle(spec.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with code " +
                             std::to_string(static_cast<int>(status)));
  }
  TensorMap map;
  std::memcpy(&map, &encoded, sizeof map);
  return map;
}

inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  check_tensor_map(spec);
  return encode_tensor_map(spec);
}

#else

/// What the emulator keeps inside a TensorMap.
struct EmulatedTensorMap {
  static constexpr u64 kMagic = 0x50414d524f534e54;
  u64 magic;
  char* base;
  u64 strides[4];  // of dimensions 1..4
  u32 last[5];     // size - 1 of every dimension
  u16 box[5];
  u16 rank, element_bytes, swizzle;
};
static_assert(sizeof(EmulatedTensorMap) <= sizeof(TensorMap), "fits");

inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  check_tensor_map(spec);
  EmulatedTensorMap description{};
  description.magic = EmulatedTensorMap::kMagic;
  description.base = static_cast<char*>(spec.base);
  for (u32 i = 0; i < 5 && i < spec.rank; ++i) {
    description.last[i] = static_cast<u32>(spec.dims[i] - 1);
    description.box[i] = static_cast<u16>(spec.box[i]);
    if (i > 0) description.strides[i - 1] = spec.strides[i];
  }
  description.rank = static_cast<u16>(spec.rank);
  description.element_bytes = static_cast<u16>(spec.element_bytes);
  description.swizzle = static_cast<u16>(spec.swizzle);
  TensorMap map{};
  std::memcpy(&map, &description, sizeof description);
  return map;
}

#endif

}  // namespace prim
