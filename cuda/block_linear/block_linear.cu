// A thread owns the blocks of 16 bytes of channels (32 for the largest) and a strip of rows: its weights, or the sums that
// become their gradients, stay in registers.
#include "cuda/block_linear/block_linear.h"

#include <algorithm>

#include "cuda/column_sums.h"
#include "cuda/prim/launch.h"
#include "cuda/rows.cuh"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostStrips = 256;         // of partial sums
constexpr int64_t kWantedThreads = 1 << 18;  // a GPU's worth

template <class T, int kSize>
struct Piece {
  static constexpr int kLoads = 16 / static_cast<int>(sizeof(T)) >= kSize ? 1 : 2;
  static constexpr int kChannels = kLoads * 16 / static_cast<int>(sizeof(T));
  static constexpr int kBlocks = kChannels / kSize;

  static DEVICE_FUNCTION void load(const void* data, int64_t at, float (&x)[kChannels]) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const Bytes16 bytes = reinterpret_cast<const Bytes16*>(static_cast<const T*>(data) + at)[l];
#pragma unroll
      for (int i = 0; i < kChannels / kLoads; ++i)
        x[l * (kChannels / kLoads) + i] = number(bytes, i);
    }
  }
  static DEVICE_FUNCTION void store(void* data, int64_t at, const float (&x)[kChannels]) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      Bytes16 bytes;
#pragma unroll
      for (int w = 0; w < 4; ++w) bytes.words[w] = word(&x[l * (kChannels / kLoads)], w);
      reinterpret_cast<Bytes16*>(static_cast<T*>(data) + at)[l] = bytes;
    }
  }

 private:
  static DEVICE_FUNCTION float number(const Bytes16& bytes, int i) {
    if constexpr (sizeof(T) == 4) {
      return prim::float_of(bytes.words[i]);
    } else {
      T x;
      x.bits = static_cast<u16>(bytes.words[i / 2] >> (16 * (i % 2)));
      return to_float(x);
    }
  }
  static DEVICE_FUNCTION u32 word(const float* x, int w) {
    if constexpr (sizeof(T) == 4) {
      return prim::bits_of(x[w]);
    } else {
      T low, high;
      from_float(low, x[2 * w]);
      from_float(high, x[2 * w + 1]);
      return low.bits | static_cast<u32>(high.bits) << 16;
    }
  }
};

template <class T>
DEVICE_FUNCTION float at(const void* data, int64_t index) {
  return to_float(static_cast<const T*>(data)[index]);
}

template <class T, int kSize>
KERNEL_FUNCTION(kThreads, kSize == 8 ? 3 : 6)
block_linear_rows(const GRID_CONSTANT BlockLinearParams p) {
  using P = Piece<T, kSize>;
  const int32_t pieces = p.blocks / P::kBlocks;
  const int64_t item = int64_t{prim::block_idx().x} * kThreads + prim::thread_idx().x;
  const int64_t first = item / pieces * p.strip;
  const int32_t block = static_cast<int32_t>(item % pieces) * P::kBlocks;
  const int64_t channel = int64_t{block} * kSize;
  if (first >= p.rows) return;
  float weight[P::kBlocks][kSize][kSize], bias[P::kChannels];
#pragma unroll
  for (int b = 0; b < P::kBlocks; ++b)
#pragma unroll
    for (int o = 0; o < kSize; ++o)
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        weight[b][o][i] = at<T>(p.weight, (channel + b * kSize + (p.transposed ? i : o)) * kSize +
                                              (p.transposed ? o : i));
#pragma unroll
  for (int c = 0; c < P::kChannels; ++c)
    bias[c] = p.bias == nullptr ? 0.0F : at<T>(p.bias, channel + c);
  const int64_t end = first + p.strip < p.rows ? first + p.strip : p.rows;
#pragma unroll 1
  for (int64_t row = first; row < end; ++row) {
    float x[P::kChannels], y[P::kChannels];
    P::load(p.x.data, row_offset(p.x, row) + channel, x);
#pragma unroll
    for (int c = 0; c < P::kChannels; ++c) {
      float sum = bias[c];
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        sum += weight[c / kSize][c % kSize][i] * x[c / kSize * kSize + i];
      y[c] = sum;
    }
    P::store(p.y.data, row_offset(p.y, row) + channel, y);
  }
}

/// Sums over a strip of dy_o x_i and of dy_o: one row of the partial sums, weights first.
template <class T, int kSize>
KERNEL_FUNCTION(kThreads, kSize == 8 ? 3 : 6)
block_linear_weight(const GRID_CONSTANT BlockLinearWeightParams p) {
  using P = Piece<T, kSize>;
  const int32_t pieces = p.blocks / P::kBlocks;
  const int64_t item = int64_t{prim::block_idx().x} * kThreads + prim::thread_idx().x;
  const int64_t strip = item / pieces, first = strip * p.strip;
  const int64_t channel = item % pieces * P::kChannels, channels = int64_t{p.blocks} * kSize;
  if (first >= p.rows) return;
  float weight[P::kChannels][kSize] = {}, bias[P::kChannels] = {};
  const int64_t end = first + p.strip < p.rows ? first + p.strip : p.rows;
#pragma unroll 1
  for (int64_t row = first; row < end; ++row) {
    float x[P::kChannels], dy[P::kChannels];
    P::load(p.x.data, row_offset(p.x, row) + channel, x);
    P::load(p.dy.data, row_offset(p.dy, row) + channel, dy);
#pragma unroll
    for (int c = 0; c < P::kChannels; ++c) {
      bias[c] += dy[c];
#pragma unroll
      for (int i = 0; i < kSize; ++i) weight[c][i] += dy[c] * x[c / kSize * kSize + i];
    }
  }
  float* const out = p.partials + strip * channels * (kSize + 1);
#pragma unroll
  for (int c = 0; c < P::kChannels; ++c) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[(channel + c) * kSize + i] = weight[c][i];
    out[channels * kSize + channel + c] = bias[c];
  }
}

int channels_of_thread(int32_t size, Dtype dtype) {
  const int numbers = dtype == Dtype::kFloat32 ? 4 : 8;
  return numbers >= size ? numbers : size;
}

int64_t pieces_of(int32_t blocks, int32_t size, Dtype dtype) {
  return int64_t{blocks} * size / channels_of_thread(size, dtype);
}

/// Rows per thread so that there are about as many threads as wanted, in at most `most` strips.
int64_t strip_of(int64_t rows, int64_t pieces, int64_t most) {
  const int64_t strips = std::clamp<int64_t>(kWantedThreads / pieces, 1, std::min(most, rows));
  return (rows + strips - 1) / strips;
}

template <class F>
void visit(Dtype dtype, int32_t size, F f) {
  const auto by_size = [&](auto type) {
    using T = decltype(type);
    if (size == 2) return f(type, Piece<T, 2>{});
    if (size == 4) return f(type, Piece<T, 4>{});
    f(type, Piece<T, 8>{});
  };
  if (dtype == Dtype::kFloat32) return by_size(float{});
  if (dtype == Dtype::kBFloat16) return by_size(bf16{});
  by_size(f16{});
}

template <class T, int kSize>
void launch_rows(Piece<T, kSize>, const BlockLinearParams& p, int64_t threads, Stream stream) {
  prim::launch("block_linear_rows", block_linear_rows<T, kSize>,
               {static_cast<u32>((threads + kThreads - 1) / kThreads), kThreads}, p, stream);
}
template <class T, int kSize>
void launch_weight(Piece<T, kSize>, const BlockLinearWeightParams& p, int64_t threads,
                   Stream stream) {
  prim::launch("block_linear_weight", block_linear_weight<T, kSize>,
               {static_cast<u32>((threads + kThreads - 1) / kThreads), kThreads}, p, stream);
}

}  // namespace

bool block_linear_supported(int32_t blocks, int32_t size, Dtype dtype) {
  return (size == 2 || size == 4 || size == 8) && blocks > 0 &&
         int64_t{blocks} * size % channels_of_thread(size, dtype) == 0;
}

bool block_linear_aligned(const RowView& view, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.inner_stride * bytes % 16 == 0 &&
         view.outer_stride * bytes % 16 == 0;
}

void launch_block_linear(BlockLinearParams p, Stream stream) {
  if (p.rows == 0) return;
  const int64_t pieces = pieces_of(p.blocks, p.size, p.dtype);
  p.strip = strip_of(p.rows, pieces, p.rows);
  const int64_t threads = (p.rows + p.strip - 1) / p.strip * pieces;
  visit(p.dtype, p.size, [&](auto, auto piece) { launch_rows(piece, p, threads, stream); });
}

int64_t block_linear_partials(const BlockLinearWeightParams& p) {
  const int64_t strip = strip_of(p.rows, pieces_of(p.blocks, p.size, p.dtype), kMostStrips);
  return (p.rows + strip - 1) / strip * p.blocks * p.size * (p.size + 1);
}

void launch_block_linear_weight(BlockLinearWeightParams p, Stream stream) {
  const int64_t pieces = pieces_of(p.blocks, p.size, p.dtype),
                channels = int64_t{p.blocks} * p.size;
  p.strip = strip_of(p.rows, pieces, kMostStrips);
  const int64_t strips = (p.rows + p.strip - 1) / p.strip;
  visit(p.dtype, p.size,
        [&](auto, auto piece) { launch_weight(piece, p, strips * pieces, stream); });
  ColumnSums sums;
  sums.rows = p.partials, sums.count = strips, sums.pitch = channels * (p.size + 1);
  sums.add({0, channels * p.size, p.dweight, 1, p.dtype});
  if (p.dbias != nullptr) sums.add({channels * p.size, channels, p.dbias, 1, p.dtype});
  launch_column_sums(sums, stream);
}

}  // namespace xlstm::cuda
