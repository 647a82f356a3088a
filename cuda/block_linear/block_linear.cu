// A thread owns the blocks of 16 bytes of channels (32 for the largest) and a strip of rows: its weights, and the sums that
// become their gradients, stay in registers, and the loads of several rows are on their way at once.
#include "cuda/block_linear/block_linear.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/column_sums.h"
#include "cuda/pieces.cuh"
#include "cuda/prim/launch.h"
#include "cuda/prim/store16.h"
#include "cuda/rows.cuh"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 128, kRows = 4;  // so many rows at once
constexpr int kMostPieces = 32;           // side by side in a block of the gradients
// One wave of blocks on a GPU of 128 multiprocessors.
constexpr int64_t kWantedThreads = 128 * 5 * kThreads, kWantedBlocks = 128 * 3;

/// The channels of a thread in one row: whole blocks.
template <class T, int kSize>
struct Channels {
  static constexpr int kOf = Piece<T>::kNumbers, kPieces = kOf >= kSize ? 1 : kSize / kOf;
  static constexpr int kNumbers = kPieces * kOf;
  Piece<T> pieces[kPieces];

  DEVICE_FUNCTION void load(const void* data, int64_t at) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i].load(data, at + i * kOf);
  }
  DEVICE_FUNCTION void store(void* data, int64_t at) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      prim::store16(static_cast<T*>(data) + at + i * kOf, pieces[i].bytes.words);
  }
  DEVICE_FUNCTION float operator[](int i) const { return pieces[i / kOf][i % kOf]; }
  DEVICE_FUNCTION void set(const float* x) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i].set(x + i * kOf);
  }
};

/// weight[c][i]: from input i of its block to channel `first` + c.
template <class T, int kSize>
DEVICE_FUNCTION void load_weights(const void* data, int64_t first,
                                  float (&weight)[Channels<T, kSize>::kNumbers][kSize]) {
  using Own = Channels<T, kSize>;
#pragma unroll
  for (int part = 0; part < kSize; ++part) {
    Own packed;
    packed.load(data, first * kSize + part * Own::kNumbers);
#pragma unroll
    for (int i = 0; i < Own::kNumbers; ++i) {
      const int at = part * Own::kNumbers + i;
      weight[at / kSize][at % kSize] = packed[i];
    }
  }
}

/// Calls f with how many rows it is to take, and where they begin in every view, for the rows [first, end).
template <int kViews, class F>
DEVICE_FUNCTION void by_batches(const RowView* const (&views)[kViews], int64_t first, int64_t end,
                                const F& f) {
  while (first < end) {
    int64_t at[kViews], rows = end - first;
#pragma unroll
    for (int v = 0; v < kViews; ++v) {
      const RowRun run = row_run(*views[v], first);
      at[v] = run.at, rows = run.rows < rows ? run.rows : rows;
    }
    first += rows;
    const auto take = [&](auto batch) {
      f(batch, at);
#pragma unroll
      for (int v = 0; v < kViews; ++v) at[v] += decltype(batch)::value * views[v]->inner_stride;
      rows -= decltype(batch)::value;
    };
#pragma unroll 1
    while (rows >= kRows) take(std::integral_constant<int, kRows>{});
#pragma unroll 1
    while (rows > 0) take(std::integral_constant<int, 1>{});
  }
}

template <class T, int kSize>
KERNEL_FUNCTION(kThreads, kSize == 8 ? 3 : 5)
block_linear_rows(const GRID_CONSTANT BlockLinearParams p) {
  using Own = Channels<T, kSize>;
  const int32_t pieces = p.blocks * kSize / Own::kNumbers;
  const int64_t item = int64_t{prim::block_idx().x} * kThreads + prim::thread_idx().x;
  const int64_t first = item / pieces * p.strip, channel = item % pieces * Own::kNumbers;
  if (first >= p.rows) return;
  float weight[Own::kNumbers][kSize];
  load_weights<T, kSize>(p.weight, channel, weight);
  Own bias = {};  // 0 in every type
  if (p.bias != nullptr) bias.load(p.bias, channel);
  const int64_t end = first + p.strip < p.rows ? first + p.strip : p.rows;
  by_batches({&p.x, &p.y}, first, end, [&](auto batch, const int64_t(&at)[2]) {
    constexpr int kBatch = decltype(batch)::value;
    Own x[kBatch];
#pragma unroll
    for (int r = 0; r < kBatch; ++r) x[r].load(p.x.data, at[0] + r * p.x.inner_stride + channel);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      float y[Own::kNumbers];
#pragma unroll
      for (int c = 0; c < Own::kNumbers; ++c) {
        y[c] = bias[c];
#pragma unroll
        for (int i = 0; i < kSize; ++i) y[c] += weight[c][i] * x[r][c / kSize * kSize + i];
      }
      x[r].set(y);
    }
#pragma unroll
    for (int r = 0; r < kBatch; ++r) x[r].store(p.y.data, at[1] + r * p.y.inner_stride + channel);
  });
}

/// The sums that become the gradients of a thread's weights and biases.
template <class T, int kSize>
struct Sums {
  using Own = Channels<T, kSize>;
  static constexpr int kRound = 4;  // channels that meet in shared memory at once
  static constexpr int kNumbers = kRound * (kSize + 1);  // of a thread
  static constexpr int kPitch = kThreads + 1;            // a number of all threads
  static constexpr size_t kSharedBytes = sizeof(float) * kNumbers * kPitch;

  float weight[Own::kNumbers][kSize] = {}, bias[Own::kNumbers] = {};

  /// One row of the partial sums, weights first: those of the block's threads that own the same channels, in order.
  DEVICE_FUNCTION void leave(const BlockLinearGradientParams& p, float* out, int64_t first_piece) {
    float* const s = reinterpret_cast<float*>(prim::dynamic_shared());
    const int thread = static_cast<int>(prim::thread_idx().x), groups = kThreads / p.width;
    const int64_t channels = int64_t{p.blocks} * kSize;
#pragma unroll
    for (int round = 0; round < Own::kNumbers; round += kRound) {
      if (round > 0) prim::sync_block();
#pragma unroll
      for (int c = 0; c < kRound; ++c) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) s[(c * kSize + i) * kPitch + thread] = weight[round + c][i];
        s[(kRound * kSize + c) * kPitch + thread] = bias[round + c];
      }
      prim::sync_block();
#pragma unroll 1
      for (int at = thread; at < p.width * kNumbers; at += kThreads) {
        const int piece = at / kNumbers, number = at % kNumbers;
        const int64_t channel = (first_piece + piece) * Own::kNumbers + round;
        if (channel >= channels) break;
        const float* const own = s + number * kPitch + piece;
        float sum = own[0];
#pragma unroll 4
        for (int group = 1; group < groups; ++group) sum += own[group * p.width];
        out[number < kRound * kSize ? channel * kSize + number
                                    : channels * kSize + channel + number - kRound * kSize] = sum;
      }
    }
  }
};

/// dx of a strip and sums over it of dy_o x_i and of dy_o.
template <class T, int kSize>
KERNEL_FUNCTION(kThreads, kSize == 8 ? 2 : 3)
block_linear_gradients(const GRID_CONSTANT BlockLinearGradientParams p) {
  using Own = Channels<T, kSize>;
  const int32_t pieces = p.blocks * kSize / Own::kNumbers, tiles = divide_up(pieces, p.width);
  const int32_t block = static_cast<int32_t>(prim::block_idx().x), row_of_sums = block / tiles,
                thread = static_cast<int32_t>(prim::thread_idx().x), groups = kThreads / p.width,
                group = thread / p.width, first_piece = block % tiles * p.width,
                piece = first_piece + thread % p.width;
  const int64_t channel = int64_t{piece} * Own::kNumbers,
                first = (int64_t{row_of_sums} * groups + group) * p.strip;
  Sums<T, kSize> sums;
  if (group < groups && piece < pieces && first < p.rows) {
    float weight[Own::kNumbers][kSize];
    load_weights<T, kSize>(p.weight, channel, weight);
    const int64_t end = first + p.strip < p.rows ? first + p.strip : p.rows;
    by_batches({&p.x, &p.dy, &p.dx}, first, end, [&](auto batch, const int64_t(&at)[3]) {
      constexpr int kBatch = decltype(batch)::value;
      Own x[kBatch], dy[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        dy[r].load(p.dy.data, at[1] + r * p.dy.inner_stride + channel);
        x[r].load(p.x.data, at[0] + r * p.x.inner_stride + channel);
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        float dx[Own::kNumbers] = {};
#pragma unroll
        for (int c = 0; c < Own::kNumbers; ++c) {
          const float slope = dy[r][c];
          sums.bias[c] += slope;
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const int from = c / kSize * kSize + i;
            sums.weight[c][i] += slope * x[r][from];
            dx[from] += slope * weight[c][i];
          }
        }
        dy[r].set(dx);
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r)
        dy[r].store(p.dx.data, at[2] + r * p.dx.inner_stride + channel);
    });
  }
  sums.leave(p, p.partials + row_of_sums * int64_t{p.blocks} * kSize * (kSize + 1), first_piece);
}

int channels_of_thread(int32_t size, Dtype dtype) {
  const int numbers = dtype == Dtype::kFloat32 ? 4 : 8;
  return numbers >= size ? numbers : size;
}

int64_t pieces_of(int32_t blocks, int32_t size, Dtype dtype) {
  return int64_t{blocks} * size / channels_of_thread(size, dtype);
}

int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Rows per thread so that there are about as many strips as wanted.
int64_t strip_of(int64_t rows, int64_t wanted) {
  const int64_t strip = ratio_up(rows, std::clamp<int64_t>(wanted, 1, rows));
  return strip < kRows ? strip : ratio_up(strip, kRows) * kRows;
}

/// How the gradients are cut into blocks: `tiles` side by side for each row of partial sums.
struct GradientShape {
  int64_t tiles, width, strip, sums;
};
GradientShape gradient_shape(const BlockLinearGradientParams& p) {
  GradientShape shape;
  const int64_t pieces = pieces_of(p.blocks, p.size, p.dtype);
  shape.tiles = ratio_up(pieces, kMostPieces);
  shape.width = ratio_up(pieces, shape.tiles);
  const int64_t groups = kThreads / shape.width;
  shape.strip = strip_of(p.rows, kWantedBlocks / shape.tiles * groups);
  shape.sums = ratio_up(ratio_up(p.rows, shape.strip), groups);
  return shape;
}

template <class F>
void visit(Dtype dtype, int32_t size, F f) {
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (size == 2) return f(Channels<T, 2>{});
    if (size == 4) return f(Channels<T, 4>{});
    f(Channels<T, 8>{});
  });
}

template <class T, int kSize>
void launch_rows(Channels<T, kSize>, const BlockLinearParams& p, int64_t threads, Stream stream) {
  prim::launch("block_linear_rows", block_linear_rows<T, kSize>,
               {static_cast<u32>(ratio_up(threads, kThreads)), kThreads}, p, stream);
}
template <class T, int kSize>
void launch_gradients(Channels<T, kSize>, const BlockLinearGradientParams& p, int64_t blocks,
                      Stream stream) {
  prim::launch("block_linear_gradients", block_linear_gradients<T, kSize>,
               {static_cast<u32>(blocks), kThreads, Sums<T, kSize>::kSharedBytes}, p, stream);
}

}  // namespace

bool block_linear_supported(int64_t blocks, int64_t size, Dtype dtype) {
  return (size == 2 || size == 4 || size == 8) && blocks > 0 &&
         blocks <= std::numeric_limits<int32_t>::max() / size &&
         blocks * size % channels_of_thread(static_cast<int32_t>(size), dtype) == 0;
}

bool block_linear_aligned(const RowView& view, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.inner_stride * bytes % 16 == 0 &&
         view.outer_stride * bytes % 16 == 0;
}

void launch_block_linear(BlockLinearParams p, Stream stream) {
  if (p.rows == 0) return;
  const int64_t pieces = pieces_of(p.blocks, p.size, p.dtype);
  p.strip = strip_of(p.rows, kWantedThreads / pieces);
  const int64_t threads = ratio_up(p.rows, p.strip) * pieces;
  visit(p.dtype, p.size, [&](auto piece) { launch_rows(piece, p, threads, stream); });
}

int64_t block_linear_partials(const BlockLinearGradientParams& p) {
  return gradient_shape(p).sums * p.blocks * p.size * (p.size + 1);
}

void launch_block_linear_gradients(BlockLinearGradientParams p, Stream stream) {
  const GradientShape shape = gradient_shape(p);
  const int64_t channels = int64_t{p.blocks} * p.size;
  p.strip = shape.strip, p.width = static_cast<int32_t>(shape.width);
  visit(p.dtype, p.size,
        [&](auto piece) { launch_gradients(piece, p, shape.sums * shape.tiles, stream); });
  ColumnSums sums;
  sums.rows = p.partials, sums.count = shape.sums, sums.pitch = channels * (p.size + 1);
  sums.add({0, channels * p.size, p.dweight, 1, p.dtype});
  if (p.dbias != nullptr) sums.add({channels * p.size, channels, p.dbias, 1, p.dtype});
  launch_column_sums(sums, stream);
}

}  // namespace xlstm::cuda
