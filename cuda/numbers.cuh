#pragma once
// Numbers in memory, of any of the three types, as float32; what the lanes of a warp do together.
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

/// How a number of the C++ type is stored.
template <class T>
inline constexpr Dtype kDtypeOf = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtypeOf<bf16> = Dtype::kBFloat16;
template <>
inline constexpr Dtype kDtypeOf<f16> = Dtype::kFloat16;

/// Calls f with a number of the C++ type that the dtype names.
template <class F>
void visit_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(bf16{});
    case Dtype::kFloat16:
      return f(f16{});
  }
}

DEVICE_FUNCTION float to_float(float x) { return x; }
DEVICE_FUNCTION float to_float(bf16 x) { return prim::bf16_to_float(x.bits); }
DEVICE_FUNCTION float to_float(f16 x) { return prim::f16_to_float(x.bits); }
DEVICE_FUNCTION void from_float(float& x, float value) { x = value; }
DEVICE_FUNCTION void from_float(bf16& x, float value) { x.bits = prim::float_to_bf16(value); }
DEVICE_FUNCTION void from_float(f16& x, float value) { x.bits = prim::float_to_f16(value); }

// Halves: numbers of the two types of 16 bits. Two of them are a word, the first one low.
DEVICE_FUNCTION u16 half_bits(const u32 (&words)[4], int i) {
  return static_cast<u16>(words[i / 2] >> (16 * (i % 2)));
}
DEVICE_FUNCTION float half_to_float(u16 bits, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
}
DEVICE_FUNCTION u32 pack_halves(float low, float high, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? prim::pack_bf16x2(low, high) : prim::pack_f16x2(low, high);
}

DEVICE_FUNCTION float load_number(const void* data, int64_t index, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
  return half_to_float(static_cast<const u16*>(data)[index], dtype);
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

/// Transposes the 4 x 4 words of four neighbouring lanes: afterwards w[i] is word (lane % 4) of the i-th of them.
DEVICE_FUNCTION void transpose_quad(u32 (&w)[4]) {
  const u32 t = prim::thread_idx().x % 4;
#pragma unroll
  for (u32 step = 1; step <= 2; ++step) {  // 2 x 2 blocks of words, then of such blocks
    const bool upper = (t & step) != 0;
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
      const u32 low = step == 1 ? 2 * k : k, high = low + step;
      const u32 got = prim::shfl_xor(upper ? w[low] : w[high], step);
      (upper ? w[low] : w[high]) = got;
    }
  }
}

}  // namespace xlstm::cuda
