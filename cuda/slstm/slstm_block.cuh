#pragma once
// What the persistent kernels of both directions share: the sequences of a block, numbers in memory, products with the
// stationary weights, and the way from a warp's results to rows of the exchange.
#include "cuda/numbers.cuh"
#include "cuda/slstm/slstm_params.h"

namespace xlstm::cuda {

/// A row of a block's tile of sequences.
struct alignas(16) SlstmRow {
  int32_t batch, begin, length;
  int32_t sequence;  ///< -1: none
};

DEVICE_FUNCTION SlstmRow slstm_row(const SlstmShape& p, int32_t sequence) {
  if (sequence >= p.num_sequences) return {0, 0, 0, -1};
  if (p.in.cu_seqlens == nullptr) return {sequence, 0, p.time, sequence};
  const int32_t begin = p.in.cu_seqlens[sequence];
  return {0, begin, p.in.cu_seqlens[sequence + 1] - begin, sequence};
}
/// The sequences of a block's tile into `rows`, which the caller publishes by a barrier. `group`: of this launch.
DEVICE_FUNCTION void slstm_read_rows(const SlstmShape& p, int group, SlstmRow (&rows)[kSlstmRows]) {
  const SlstmDivision& d = p.division;
  const int thread = static_cast<int>(prim::thread_idx().x);
  const int first = (group + d.first_group) % d.sequence_tiles * kSlstmRows;
  if (thread < kSlstmRows) rows[thread] = slstm_row(p, first + thread);
}
DEVICE_FUNCTION int slstm_longest(const SlstmRow (&rows)[kSlstmRows]) {
  int longest = 0;
  for (int i = 0; i < kSlstmRows; ++i)
    longest = rows[i].length > longest ? rows[i].length : longest;
  return longest;
}
/// Row of the tile of a thread's sequence j.
DEVICE_FUNCTION int slstm_row_of(int j) {
  return 2 * static_cast<int>(prim::thread_idx().x % 4) + j;
}
/// The first of the sequence's checkpoints.
DEVICE_FUNCTION int64_t slstm_first_slot(const SlstmShape& p, const SlstmRow& row) {
  constexpr int kTokens = static_cast<int>(kSlstmCheckpointTokens);
  if (p.in.cu_seqlens == nullptr) return int64_t{row.sequence} * divide_up(p.time, kTokens);
  return row.begin / kTokens + row.sequence;
}
/// Offset of a unit in the states of a checkpoint, of `states` each.
DEVICE_FUNCTION int64_t slstm_checkpoint(const SlstmShape& p, const SlstmRow& row, int t, int head,
                                         int unit, int states) {
  const int64_t slot = slstm_first_slot(p, row) + t / static_cast<int>(kSlstmCheckpointTokens);
  return (slot * p.num_heads + head) * states * p.dh + unit;
}
DEVICE_FUNCTION bool slstm_reset(const SlstmShape& p, const SlstmRow& row, int t) {
  return p.in.reset != nullptr &&
         p.in.reset[row.batch * p.in.reset_batch + (row.begin + t) * p.in.reset_time];
}
DEVICE_FUNCTION int64_t slstm_offset(const GateView& x, const SlstmRow& row, int t, int head,
                                     int unit) {
  return row.batch * x.batch + (row.begin + t) * x.time + head * x.head + unit * x.unit;
}
DEVICE_FUNCTION int64_t slstm_offset(const View& x, const SlstmRow& row, int t, int head,
                                     int unit) {
  return row.batch * x.batch + (row.begin + t) * x.time + head * x.head + unit * x.inner;
}

/// Bytes of a number, as a shift.
DEVICE_FUNCTION int size_shift(bool wide) { return wide ? 2 : 1; }

/// Numbers of a problem are float32 (wide) or else bfloat16 where one plane holds them, float16 where two do.
/// The bits of a number, and the number later, so that nothing waits for the load.
DEVICE_FUNCTION u32 load_bits(const void* data, int64_t index, bool wide) {
  return wide ? static_cast<const u32*>(data)[index] : static_cast<const u16*>(data)[index];
}
/// Where a number stands, and the distance of two, in bytes.
DEVICE_FUNCTION unsigned char* byte_of(void* data, int64_t index, bool wide) {
  return static_cast<unsigned char*>(data) + (index << size_shift(wide));
}
template <int kPlanes>
DEVICE_FUNCTION float number_of(u32 bits, bool wide) {
  if (wide) return prim::float_of(bits);
  return kPlanes == 1 ? prim::float_of(bits << 16) : prim::f16_to_float(static_cast<u16>(bits));
}
template <int kPlanes>
DEVICE_FUNCTION void store_rounded(void* data, int64_t index, bool wide, float value) {
  if (wide) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<u16*>(data)[index] =
        kPlanes == 1 ? prim::float_to_bf16(value) : prim::float_to_f16(value);
  }
}

/// Two neighbours as packed planes: the nearest bfloat16 numbers and, with two planes, the rest.
template <int kPlanes>
DEVICE_FUNCTION void slstm_split(float low, float high, u32 (&planes)[kPlanes]) {
  planes[0] = prim::pack_bf16x2(low, high);
  if constexpr (kPlanes == 2)
    planes[1] = prim::pack_bf16x2(low - prim::float_of(planes[0] << 16),
                                  high - prim::float_of(planes[0] & 0xffff0000U));
}

/// d += a b for the B fragment at b[.][first], b[.][first + 1]; small terms first.
template <int kPlanes>
DEVICE_FUNCTION void slstm_multiply(float (&d)[4], const u32 (&a)[kPlanes][4],
                                    const u32 (&b)[kPlanes][4], int first) {
  if constexpr (kPlanes == 2) {
    prim::mma_bf16(d, a[0], b[1][first], b[1][first + 1]);
    prim::mma_bf16(d, a[1], b[0][first], b[0][first + 1]);
  }
  prim::mma_bf16(d, a[0], b[0][first], b[0][first + 1]);
}

/// A thread's place in a buffer of the exchange, from column k on: for two k16 steps together, and for one, whose columns
/// are the last there are to read.
struct SlstmColumns {
  const bf16 *pair, *single;

  DEVICE_FUNCTION SlstmColumns(const bf16* buffer, int pitch, int k) {
    const int l = static_cast<int>(prim::thread_idx().x % 32);
    const bf16* row = buffer + l % 8 * pitch + k;
    pair = row + 8 * (l / 8), single = row + 8 * (l / 8 % 2);
  }
};
/// Columns of 8 sequences: the B fragments of a step in b[.][0..1], of the one after it in b[.][2..3].
template <int kPlanes>
DEVICE_FUNCTION void slstm_columns(u32 (&b)[kPlanes][4], const bf16* from, int pitch) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) prim::ldmatrix_x4(b[p], from + p * kSlstmRows * pitch);
}
/// Calls multiply(i, b, first) for steps 0 .. count - 1, at most kSteps of them: their B fragments are b[.][first] and
/// b[.][first + 1]. Loads go ahead of products.
template <int kPlanes, int kSteps, class Multiply>
DEVICE_FUNCTION void slstm_for_steps(const SlstmColumns& from, int pitch, int count,
                                     const Multiply& multiply) {
  constexpr int kPairs = 4 / kPlanes;
#pragma unroll
  for (int first = 0; first < kSteps; first += 2 * kPairs) {
    if (first >= count) break;
    u32 b[kPairs][kPlanes][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int i = first + 2 * pair;
      if (i < kSteps && i < count)
        slstm_columns(b[pair], (i + 1 < count ? from.pair : from.single) + 16 * i, pitch);
    }
#pragma unroll
    for (int i = first; i < first + 2 * kPairs; ++i)
      if (i < kSteps && i < count) multiply(i, b[(i - first) / 2], i % 2 * 2);
  }
}

/// Fragments in shared memory: [fragment][plane][lane] pieces of 16 bytes.
template <int kPlanes>
DEVICE_FUNCTION void load_fragment(u32 (&a)[kPlanes][4], const Bytes16* fragments, int index) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    const Bytes16 piece =
        fragments[(index * kPlanes + p) * 32 + static_cast<int>(prim::thread_idx().x % 32)];
#pragma unroll
    for (int r = 0; r < 4; ++r) a[p][r] = piece.words[r];
  }
}
template <int kPlanes>
DEVICE_FUNCTION void store_fragment(Bytes16* fragments, int index, const u32 (&a)[kPlanes][4]) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p)
    fragments[(index * kPlanes + p) * 32 + static_cast<int>(prim::thread_idx().x % 32)] = {
        {a[p][0], a[p][1], a[p][2], a[p][3]}};
}

/// What the threads of a warp hold of its 8 units becomes rows of the exchange. values[channel][sequence of a thread]: unit
/// lane / 4, sequences 2 (lane % 4) + {0, 1}. Calls put(channel, plane, row, unit, words) for 2 kWords neighbouring units.
template <int kPlanes, int kWords, int kChannels, class Put>
DEVICE_FUNCTION void slstm_rows_of(const float (&values)[kChannels][2], const Put& put) {
  constexpr int kPieces = kChannels * kPlanes;
  const int lane = static_cast<int>(prim::thread_idx().x % 32);
  u32 words[kPieces < 4 ? 4 : kPieces] = {};
#pragma unroll
  for (int channel = 0; channel < kChannels; ++channel) {
    u32 planes[kPlanes];
    slstm_split(values[channel][0], values[channel][1], planes);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
      words[channel * kPlanes + p] = prim::movmatrix_trans(planes[p]);
  }
  if constexpr (kWords == 1) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      put(piece / kPlanes, piece % kPlanes, lane / 4, 2 * (lane % 4), {words[piece]});
  } else {
#pragma unroll
    for (int first = 0; first < kPieces; first += 4) {
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = words[first + i];
      transpose_quad(w);
      const int piece = first + lane % 4;
      if (piece < kPieces) put(piece / kPlanes, piece % kPlanes, lane / 4, 0, w);
    }
  }
}

}  // namespace xlstm::cuda
