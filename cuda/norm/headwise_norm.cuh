#pragma once
// What both directions of the head-wise norm do alike. A block owns one head and a strip of rows; a group of its threads,
// eight channels each, owns a row at a time.
#include "cuda/norm/headwise_norm.h"
#include "cuda/prim/launch.h"
#include "cuda/rows.cuh"

namespace xlstm::cuda {

constexpr int kNormFew = 256,
              kNormMany = 512;  ///< threads of a block, for narrow rows and wide ones

struct NormLaunch {
  HeadwiseNormInputs in;
  int32_t group = 1;  ///< threads that share a row, a power of two
  int64_t strip = 1;  ///< rows of a block
  bool x_vector = false, skip_vector = false, gate_vector = false;  ///< loaded 16 bytes at a time
  bool weight_vector = false, bias_vector = false, skip_weight_vector = false;
};

DEVICE_FUNCTION float sigmoid(float x) { return prim::rcp(1.0F + prim::ex2(x * -1.44269504F)); }

/// kWide: rows of more than eight channels per thread, which are read again from memory instead of kept in registers.
template <int kThreads, bool kWide>
class NormBlock {
 public:
  struct Shared {
    float parts[2][kThreads / 32][2];
  };

  DEVICE_FUNCTION NormBlock(const NormLaunch& launch, Shared& shared)
      : l(launch),
        in(launch.in),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        head(static_cast<int>(prim::block_idx().x) % launch.in.heads),
        strip(static_cast<int>(prim::block_idx().x) / launch.in.heads),
        first(strip * launch.strip),
        end(first + launch.strip < launch.in.rows ? first + launch.strip : launch.in.rows),
        groups(kThreads / launch.group),
        pieces(kWide ? divide_up(launch.in.dim, 8 * launch.group) : 1) {}

 protected:
  struct Statistics {
    float mean, rstd;
  };

  /// The first channel of a piece within the head.
  DEVICE_FUNCTION int channel(int piece) const { return (piece * l.group + thread % l.group) * 8; }
  /// How many channels it has; not positive past the end.
  DEVICE_FUNCTION int width(int piece) const { return in.dim - channel(piece); }
  DEVICE_FUNCTION int64_t channels() const { return int64_t{in.heads} * in.dim; }
  /// Of a piece in parameters, skip, gate and packed rows.
  DEVICE_FUNCTION int64_t place(int piece) const { return int64_t{head} * in.dim + channel(piece); }

  DEVICE_FUNCTION void load_x(int64_t row, int piece, float (&x)[8]) const {
    load_eight(in.x.data, row_offset(in.x, row) + head * in.x_head + channel(piece), in.dtype,
               l.x_vector, width(piece), x);
  }
  DEVICE_FUNCTION void load_row(const RowView& rows, bool vector, int64_t row, int piece,
                                float (&x)[8]) const {
    load_eight(rows.data, row_offset(rows, row) + place(piece), in.dtype, vector, width(piece), x);
  }
  DEVICE_FUNCTION void load_parameter(const NormParameter& parameter, bool vector, int piece,
                                      float (&x)[8]) const {
    load_eight(parameter.data, place(piece), parameter.dtype, vector, width(piece), x);
  }

  /// The row's numbers where they are kept.
  DEVICE_FUNCTION void keep(int64_t row, float (&x)[8]) const {
    if (!kWide && row < end && width(0) > 0) load_x(row, 0, x);
  }

  /// Two passes: no cancellation for a mean far from zero. All threads of the block call it.
  DEVICE_FUNCTION Statistics statistics(int64_t row, float (&x)[8]) {
    const float count = static_cast<float>(in.dim);
    float mean = 0, squares = 0, unused = 0;
    if (!in.rms) {
      each_number(row, x, [&](float number) { mean += number; });
      add_up(mean, unused);
      mean /= count;
    }
    each_number(row, x, [&](float number) { squares += (number - mean) * (number - mean); });
    add_up(squares, unused);
    return {mean, 1.0F / sqrtf(squares / count + in.eps)};
  }

  /// Sums over the group, the same in all its threads. All threads of the block call it.
  DEVICE_FUNCTION void add_up(float& a, float& b) {
    for (u32 lanes = l.group < 32 ? static_cast<u32>(l.group) / 2 : 16; lanes > 0; lanes /= 2) {
      a += prim::float_of(prim::shfl_xor(prim::bits_of(a), lanes));
      b += prim::float_of(prim::shfl_xor(prim::bits_of(b), lanes));
    }
    if (l.group <= 32) return;
    float(&parts)[kThreads / 32][2] = s.parts[turn];
    if (thread % 32 == 0) parts[thread / 32][0] = a, parts[thread / 32][1] = b;
    prim::sync_block();
    const int warp = thread / l.group * (l.group / 32);
    a = b = 0;
    for (int i = warp; i < warp + l.group / 32; ++i) a += parts[i][0], b += parts[i][1];
    turn ^= 1;  // the next sums' barrier comes before these places are written again
  }

  /// norm(x) * weight + bias + skip_weight * skip, of what is normalised already.
  DEVICE_FUNCTION void before_gate(int64_t row, int piece, float (&v)[8]) const {
    float a[8], b[8];
    if (in.weight.data != nullptr) {
      load_parameter(in.weight, l.weight_vector, piece, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= a[i];
    }
    if (in.bias.data != nullptr) {
      load_parameter(in.bias, l.bias_vector, piece, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += a[i];
    }
    if (in.skip.data != nullptr) {
      load_parameter(in.skip_weight, l.skip_weight_vector, piece, a);
      load_row(in.skip, l.skip_vector, row, piece, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += a[i] * b[i];
    }
  }

  const NormLaunch& l;
  const HeadwiseNormInputs& in;
  Shared& s;
  const int thread, head;
  const int64_t strip, first, end;
  const int groups, pieces;

 private:
  template <class F>
  DEVICE_FUNCTION void each_number(int64_t row, float (&x)[8], F f) const {
    for (int piece = 0; piece < (kWide ? pieces : 1); ++piece) {
      if (row >= end || width(piece) <= 0) continue;
      if constexpr (kWide) load_x(row, piece, x);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < width(piece)) f(x[i]);
    }
  }

  int turn = 0;
};

/// Whether rows of heads may be loaded 16 bytes at a time. Pieces are eight numbers, whatever their type.
inline bool norm_vector(const void* data, int32_t dim, Dtype dtype, int64_t stride = 0,
                        int64_t outer_stride = 0, int64_t head = 0) {
  const int64_t numbers = dtype == Dtype::kFloat32 ? 4 : 8;
  return dim % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % numbers == 0 &&
         outer_stride % numbers == 0 && head % numbers == 0;
}
inline bool norm_vector(const RowView& rows, int32_t dim, Dtype dtype, int64_t head = 0) {
  return norm_vector(rows.data, dim, dtype, rows.inner_stride, rows.outer_stride, head);
}

inline int32_t norm_threads(int32_t dim) { return dim <= 8 * kNormFew ? kNormFew : kNormMany; }

/// Strips of at least a row per group, `most` or fewer.
inline NormLaunch norm_launch(const HeadwiseNormInputs& in, int64_t most) {
  NormLaunch l;
  l.in = in;
  const int32_t threads = norm_threads(in.dim);
  while (l.group < threads && 8 * l.group < in.dim) l.group *= 2;
  const int64_t groups = threads / l.group, steps = (in.rows + groups - 1) / groups;
  l.strip = groups * (steps <= most ? 1 : (steps + most - 1) / most);
  l.x_vector = norm_vector(in.x, in.dim, in.dtype, in.x_head);
  l.skip_vector = norm_vector(in.skip, in.dim, in.dtype);
  l.gate_vector = norm_vector(in.gate, in.dim, in.dtype);
  l.weight_vector = norm_vector(in.weight.data, in.dim, in.weight.dtype);
  l.bias_vector = norm_vector(in.bias.data, in.dim, in.bias.dtype);
  l.skip_weight_vector = norm_vector(in.skip_weight.data, in.dim, in.skip_weight.dtype);
  return l;
}
inline int64_t norm_strips(const NormLaunch& l) { return (l.in.rows + l.strip - 1) / l.strip; }

}  // namespace xlstm::cuda
