#pragma once
// Numbers in memory, of any of the three types, as float32; sums over a warp.
#include "cuda/prim/prim.h"
#include "cuda/tensors.h"

namespace xlstm::cuda {

using prim::bf16;
using prim::f16;
using prim::u16;
using prim::u32;

PRIM_FUNCTION constexpr int32_t divide_up(int32_t a, int32_t b) { return (a + b - 1) / b; }

struct alignas(16) Bytes16 {
  u32 words[4];
};

DEVICE_FUNCTION float to_float(float x) { return x; }
DEVICE_FUNCTION float to_float(bf16 x) { return prim::bf16_to_float(x.bits); }
DEVICE_FUNCTION float to_float(f16 x) { return prim::f16_to_float(x.bits); }
DEVICE_FUNCTION void from_float(float& x, float value) { x = value; }
DEVICE_FUNCTION void from_float(bf16& x, float value) { x.bits = prim::float_to_bf16(value); }
DEVICE_FUNCTION void from_float(f16& x, float value) { x.bits = prim::float_to_f16(value); }

DEVICE_FUNCTION float load_number(const void* data, int64_t index, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
  const u16 bits = static_cast<const u16*>(data)[index];
  return dtype == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
}
DEVICE_FUNCTION void store_number(void* data, int64_t index, Dtype dtype, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<u16*>(data)[index] =
        dtype == Dtype::kBFloat16 ? prim::float_to_bf16(value) : prim::float_to_f16(value);
  }
}
/// The nearest number of the type.
DEVICE_FUNCTION float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return x;
  return dtype == Dtype::kBFloat16 ? prim::bf16_to_float(prim::float_to_bf16(x))
                                   : prim::f16_to_float(prim::float_to_f16(x));
}

/// Sum over the warp, the same in all lanes.
DEVICE_FUNCTION float warp_sum(float x) {
#pragma unroll
  for (u32 lanes = 16; lanes > 0; lanes /= 2)
    x += prim::float_of(prim::shfl_xor(prim::bits_of(x), lanes));
  return x;
}

}  // namespace xlstm::cuda
