#pragma once
// 16 bytes of neighbouring numbers, as they are moved. They begin at a multiple of 16 bytes.
#include "cuda/numbers.cuh"

namespace xlstm::cuda {

/// 4 numbers of float32, 8 of the other types.
template <class T>
struct Piece {
  static constexpr int kNumbers = 16 / static_cast<int>(sizeof(T));
  Bytes16 bytes;

  /// From number `at` on; zeros where it is not wanted.
  DEVICE_FUNCTION void load(const void* data, int64_t at, bool wanted = true) {
    bytes =
        wanted ? *reinterpret_cast<const Bytes16*>(static_cast<const T*>(data) + at) : Bytes16{};
  }
  DEVICE_FUNCTION void store(void* data, int64_t at) const {
    *reinterpret_cast<Bytes16*>(static_cast<T*>(data) + at) = bytes;
  }

  DEVICE_FUNCTION float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return prim::float_of(bytes.words[i]);
    } else {
      return half_to_float(half_bits(bytes.words, i), kDtypeOf<T>);
    }
  }
  /// Number i, where those before it have been set.
  DEVICE_FUNCTION void set(int i, float value) {
    if constexpr (sizeof(T) == 4) {
      bytes.words[i] = prim::bits_of(value);
    } else {
      T x;
      from_float(x, value);
      const u32 word = i % 2 == 0 ? 0 : bytes.words[i / 2];
      bytes.words[i / 2] = word | static_cast<u32>(x.bits) << (16 * (i % 2));
    }
  }
  /// All of them, x[0], x[1], ..
  DEVICE_FUNCTION void set(const float* x) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 4) {
        bytes.words[w] = prim::bits_of(x[w]);
      } else {
        bytes.words[w] = pack_halves(x[2 * w], x[2 * w + 1], kDtypeOf<T>);
      }
    }
  }
};

/// x[i] = data[at + i]
DEVICE_FUNCTION void load_eight(const void* data, int64_t at, Dtype dtype, float (&x)[8]) {
  if (dtype == Dtype::kFloat32) {
    Piece<float> first, second;
    first.load(data, at), second.load(data, at + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = first[i], x[4 + i] = second[i];
  } else {
    const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(static_cast<const u16*>(data) + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = half_to_float(half_bits(bytes.words, i), dtype);
  }
}
/// data[at + i] = x[i]
DEVICE_FUNCTION void store_eight(void* data, int64_t at, Dtype dtype, const float (&x)[8]) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      Piece<float> four;
      four.set(x + i);
      four.store(data, at + i);
    }
  } else {
    Bytes16 bytes;
#pragma unroll
    for (int w = 0; w < 4; ++w) bytes.words[w] = pack_halves(x[2 * w], x[2 * w + 1], dtype);
    *reinterpret_cast<Bytes16*>(static_cast<u16*>(data) + at) = bytes;
  }
}

}  // namespace xlstm::cuda
