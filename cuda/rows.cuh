#pragma once
// Rows of channels, eight numbers at a time.
#include "cuda/numbers.cuh"
#include "cuda/rows.h"

namespace xlstm::cuda {

/// Where a row begins, in numbers.
DEVICE_FUNCTION int64_t row_offset(const RowView& view, int64_t row) {
  if (row < view.inner_rows) return row * view.inner_stride;
  return row / view.inner_rows * view.outer_stride + row % view.inner_rows * view.inner_stride;
}

/// A row and those behind it at the inner stride: where it begins, in numbers, and how many they are, itself included.
struct RowRun {
  int64_t at, rows;
};
DEVICE_FUNCTION RowRun row_run(const RowView& view, int64_t row) {
  const int64_t outer = row < view.inner_rows ? 0 : row / view.inner_rows,
                inner = row - outer * view.inner_rows;
  return {outer * view.outer_stride + inner * view.inner_stride, view.inner_rows - inner};
}

/// x[i] = data[at + i], which begin at a multiple of 16 bytes.
DEVICE_FUNCTION void load_eight(const void* data, int64_t at, Dtype dtype, float (&x)[8]) {
  if (dtype == Dtype::kFloat32) {
    const Bytes16* const from =
        reinterpret_cast<const Bytes16*>(static_cast<const float*>(data) + at);
    const Bytes16 low = from[0], high = from[1];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = prim::float_of(low.words[i]), x[i + 4] = prim::float_of(high.words[i]);
  } else {
    const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(static_cast<const u16*>(data) + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u16 bits = static_cast<u16>(bytes.words[i / 2] >> (16 * (i % 2)));
      x[i] = dtype == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
    }
  }
}

/// data[at + i] = x[i], likewise.
DEVICE_FUNCTION void store_eight(void* data, int64_t at, Dtype dtype, const float (&x)[8]) {
  Bytes16* const to = reinterpret_cast<Bytes16*>(static_cast<unsigned char*>(data) +
                                                 at * (dtype == Dtype::kFloat32 ? 4 : 2));
  Bytes16 first, second = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == Dtype::kFloat32) {
      first.words[i] = prim::bits_of(x[i]), second.words[i] = prim::bits_of(x[4 + i]);
    } else {
      first.words[i] = dtype == Dtype::kBFloat16 ? prim::pack_bf16x2(x[2 * i], x[2 * i + 1])
                                                 : prim::pack_f16x2(x[2 * i], x[2 * i + 1]);
    }
  }
  *to = first;
  if (dtype == Dtype::kFloat32) to[1] = second;
}

}  // namespace xlstm::cuda
