#pragma once
// state: the matrix memory S (and n) over the chunks of a segment, written down as it enters every chunk.
//
// A block keeps a tile of S, 128 rows (of DQK) by 128 columns (of DV; 64 with two planes), in float32 registers and reads
// 64 tokens at a time: S += (c * B)^T X on tensor cores. n is plain float32 and belongs to the blocks of column tile 0.
#include <cstddef>

#include "cuda/mlstm/mlstm_twophase.cuh"

namespace xlstm::cuda {

/// What a block works on, the same for all of its threads. It lies in shared memory: read again where it is needed it
/// takes no registers from the sums.
struct alignas(16) StatePlace {
  SequenceRange range;
  int item, head;
  int row0, col0;                      // of the tile
  int first_block, blocks, per_chunk;  // of 64 tokens
  bool has_n;
};

template <int kPlanes>
struct StateShape {
  static constexpr int kRows = 128, kColumns = kPlanes == 1 ? 128 : 64;
  // A warp has 32 rows and half the columns.
  static constexpr int kRowTiles = 2, kColumnTiles = kColumns / 16;

  struct Stage {
    Tile<kBlockTokens, kRows, kPlanes> b;
    Tile<kBlockTokens, kColumns, kPlanes> x;
    float weights[kBlockTokens], z[kBlockTokens];
  };
  struct Shared {
    StatePlace place;
    Stage stages[1];  // as many as the launch has
  };
  static constexpr size_t shared_bytes(int stages) {
    return sizeof(Shared) + (stages - 1) * sizeof(Stage);
  }
};

template <int kPlanes>
class StateBlock {
 public:
  using Shape = StateShape<kPlanes>;
  using Stage = typename Shape::Stage;
  using Shared = typename Shape::Shared;

  DEVICE_FUNCTION explicit StateBlock(const StateParams& params)
      : p(params),
        stages(reinterpret_cast<Shared*>(prim::dynamic_shared())->stages),
        place(reinterpret_cast<Shared*>(prim::dynamic_shared())->place) {
    const int thread = static_cast<int>(prim::thread_idx().x);
    if (thread == 0) place = find_place();
    prim::sync_block();
    lane = thread % 32;
    warp_row = thread / 32 / 2 * 32;
    warp_col = thread / 32 % 2 * (Shape::kColumns / 2);
  }

  DEVICE_FUNCTION void run() {
    begin();
    gamma_product = 1;
    int load_stage = 0, stage = 0;
#pragma unroll 1
    for (int i = 1 - p.stages; i < place.blocks; ++i) {
      if (i >= 0) {
        // This block's tile has arrived, and every thread has left the one that is loaded over next.
        if (p.stages == 3) {
          prim::cp_async_wait<1>();
        } else {
          prim::cp_async_wait<0>();
        }
        prim::sync_block();
      }
      if (i + p.stages - 1 < place.blocks) load(stages[load_stage], i + p.stages - 1);
      prim::cp_async_commit();
      load_stage = load_stage + 1 == p.stages ? 0 : load_stage + 1;
      if (i < 0) continue;
      enter(i);
      add_products(stages[stage]);
      if (place.has_n) add_n(stages[stage]);
      stage = stage + 1 == p.stages ? 0 : stage + 1;
    }
    finish();
  }

 private:
  DEVICE_FUNCTION StatePlace find_place() const {
    StatePlace x;
    const int tiles_x = divide_up(p.dv, Shape::kColumns), tiles_b = divide_up(p.dqk, Shape::kRows);
    int index = static_cast<int>(prim::block_idx().x);
    x.col0 = index % tiles_x * Shape::kColumns;
    index /= tiles_x;
    x.row0 = index % tiles_b * Shape::kRows;
    x.item = index / tiles_b;
    const int sequence = x.item / p.chunks.segments / p.chunks.num_heads;
    x.head = x.item / p.chunks.segments % p.chunks.num_heads;
    x.range = sequence_at(p.chunks, sequence);
    const SegmentRange chunks = segment_at(p.chunks, x.range, x.item % p.chunks.segments);
    x.per_chunk = p.chunks.length / kBlockTokens;
    const int end = divide_up(x.range.length, kBlockTokens);
    x.first_block = chunks.begin * x.per_chunk;
    x.blocks = (chunks.end * x.per_chunk < end ? chunks.end * x.per_chunk : end) - x.first_block;
    if (chunks.end == chunks.begin) x.blocks = 0;
    x.has_n = x.col0 == 0 && (p.state_n != nullptr || p.end_n != nullptr || p.segment_n != nullptr);
    return x;
  }

  /// Block of 64 tokens of the sequence that is i-th in this direction.
  DEVICE_FUNCTION int block_at(int i) const {
    return place.first_block + (p.reverse ? place.blocks - 1 - i : i);
  }

  DEVICE_FUNCTION void load(Stage& stage, int i) const {
    const int block = block_at(i), thread = thread_here();
    const int token = block * kBlockTokens;
    const int64_t from = place.range.begin + token;
    load_tile<kTwoPhaseThreads>(stage.b, p.b,
                                token_offset(p.b, place.range.batch, from, place.head),
                                place.range.length - token, place.row0);
    load_tile<kTwoPhaseThreads>(stage.x, p.x,
                                token_offset(p.x, place.range.batch, from, place.head),
                                place.range.length - token, place.col0);
    // The slots of a sequence lie side by side, and so do the positions of all its chunks.
    const int64_t position =
        (int64_t{place.head} * p.chunks.slots + place.range.first_slot) * p.chunks.length + token;
    if (thread < kBlockTokens) {
      const GateRecord* record = p.records + position + thread;
      prim::cp_async4(&stage.weights[thread], p.reverse ? &record->w : &record->u);
    } else if (thread < 2 * kBlockTokens && p.reverse && p.z != nullptr && place.has_n) {
      const int t = thread - kBlockTokens;
      prim::cp_async4(&stage.z[t], p.z + position + t);
    }
  }

  /// At a chunk's start, in this direction: the state is written down and decays.
  DEVICE_FUNCTION void enter(int i) {
    const int block = block_at(i);
    const bool starts = p.reverse ? i == 0 || block % place.per_chunk == place.per_chunk - 1
                                  : block % place.per_chunk == 0;
    if (!starts) return;
    const int slot = place.range.first_slot + block / place.per_chunk;
    if (p.states != nullptr) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) write_plane(slot, plane);
    }
    if (place.has_n && p.state_n != nullptr)
      write_n(p.state_n + (int64_t{place.head} * p.chunks.slots + slot) * padded(p.dqk),
              padded(p.dqk));
    const float gamma = p.gamma[int64_t{place.head} * p.chunks.slots + slot];
    gamma_product *= gamma;
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Shape::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] *= gamma;
    n_sum[0] *= gamma;
    n_sum[1] *= gamma;
  }

  /// S as bfloat16, 16 bytes per store.
  DEVICE_FUNCTION void write_plane(int slot, int plane) const {
    const int here = lane_here();
    bf16* const to = static_cast<bf16*>(p.states) +
                     state_offset<kPlanes>(p.chunks, place.head, slot, plane, p.dqk, p.dv);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < Shape::kColumnTiles; n += 4) {
          Bytes16 piece;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            u32 planes[kPlanes];
            split(s[m][n + j][2 * half], s[m][n + j][2 * half + 1], planes);
            piece.words[j] = planes[plane];
          }
          transpose_quad(piece.words);
          const int row = place.row0 + warp_row + 16 * m + 8 * half + here / 4;
          const int col = place.col0 + warp_col + 8 * (n + here % 4);
          if (row < padded(p.dqk) && col < padded(p.dv))
            *reinterpret_cast<Bytes16*>(to + int64_t{row} * padded(p.dv) + col) = piece;
        }
  }

  DEVICE_FUNCTION void add_products(Stage& stage) {
#pragma unroll
    for (int k0 = 0; k0 < kBlockTokens; k0 += 16) {
      const float* const weights = stage.weights + k0 + 2 * (lane % 4);
      const float pairs[4] = {weights[0], weights[1], weights[8], weights[9]};
      u32 a[Shape::kRowTiles][kPlanes][4];
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        fragment_a_transposed(a[m], stage.b, warp_row + 16 * m, k0);
        scale_columns(a[m], pairs);
      }
#pragma unroll
      for (int n = 0; n < Shape::kColumnTiles; n += 2) {
        u32 b[kPlanes][4];
        fragment_b_transposed(b, stage.x, warp_col + 8 * n, k0);
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          multiply_add(s[m][n], a[m], b, 0);
          multiply_add(s[m][n + 1], a[m], b, 2);
        }
      }
    }
  }

  // n: a warp has 16 rows, a lane two of them and a quarter of the tokens; the quarters meet in write_n(). Tokens are dealt
  // out so that the eight lanes of a quarter and the four quarters read different banks.
  static DEVICE_FUNCTION int n_row(int thread) { return thread / 32 * 16 + thread % 8 * 2; }

  DEVICE_FUNCTION void add_n(Stage& stage) {
    const int here = thread_here();
#pragma unroll 4
    for (int i = 0; i < kBlockTokens / 4; ++i) {
      const int token = i / 2 * 8 + here % 32 / 8 * 2 + i % 2;
      float weight = stage.weights[token];
      if (p.reverse) weight = p.z == nullptr ? 0.0F : weight * stage.z[token];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const u32 pair = *reinterpret_cast<const u32*>(stage.b.at(plane, token, n_row(here)));
        n_sum[0] += weight * low_half(pair);
        n_sum[1] += weight * high_half(pair);
      }
    }
  }

  /// n of this block's rows, as far as `rows`.
  DEVICE_FUNCTION void write_n(float* to, int rows) const {
    const int here = thread_here();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = n_sum[i];
      sum += prim::float_of(prim::shfl_xor(prim::bits_of(sum), 8));
      sum += prim::float_of(prim::shfl_xor(prim::bits_of(sum), 16));
      const int row = place.row0 + n_row(here) + i;
      if (here % 32 < 8 && row < rows) to[row] = sum;
    }
  }

  /// Calls visit(number, offset) for the thread's numbers of S that lie in a DQK x DV matrix.
  template <class Visit>
  DEVICE_FUNCTION void each_number(Visit visit) {
    const int here = lane_here();
    const int col = place.col0 + warp_col + 2 * (here % 4);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row0 + warp_row + 16 * m + 8 * half + here / 4;
        const int left = row < p.dqk ? p.dv - col : 0;
        const int64_t offset = int64_t{row} * p.dv + col;
#pragma unroll
        for (int n = 0; n < Shape::kColumnTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * n + e < left) visit(s[m][n][2 * half + e], offset + 8 * n + e);
      }
  }

  DEVICE_FUNCTION void begin() {
    const int here = thread_here();
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Shape::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0;
    if (p.start_c != nullptr) {
      const float* const from = p.start_c + int64_t{place.item} * p.dqk * p.dv;
      each_number([from](float& x, int64_t offset) { x = from[offset]; });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = place.row0 + n_row(here) + i;
      n_sum[i] = p.start_n != nullptr && here % 32 < 8 && row < p.dqk
                     ? p.start_n[int64_t{place.item} * p.dqk + row]
                     : 0.0F;
    }
  }

  DEVICE_FUNCTION void write_c(float* to) {
    each_number([to](float x, int64_t offset) { to[offset] = x; });
  }

  DEVICE_FUNCTION void finish() {
    const int64_t owner = place.item / p.chunks.segments;
    const int segment = place.item % p.chunks.segments;
    const bool last = segment == (p.reverse ? 0 : p.chunks.segments - 1);
    if (last && p.end_c != nullptr) write_c(p.end_c + owner * p.dqk * p.dv);
    if (last && p.end_n != nullptr && place.has_n) write_n(p.end_n + owner * p.dqk, p.dqk);
    if (p.segment_c != nullptr) write_c(p.segment_c + int64_t{place.item} * p.dqk * p.dv);
    if (p.segment_n != nullptr && place.has_n)
      write_n(p.segment_n + int64_t{place.item} * p.dqk, p.dqk);
    if (p.segment_gamma != nullptr && place.row0 == 0 && place.col0 == 0 &&
        prim::thread_idx().x == 0)
      p.segment_gamma[place.item] = gamma_product;
  }

  const StateParams& p;
  Stage* const stages;
  StatePlace& place;
  int lane, warp_row, warp_col;
  float s[Shape::kRowTiles][Shape::kColumnTiles][4];
  float n_sum[2];
  float gamma_product;
};

template <int kPlanes>
KERNEL_FUNCTION(kTwoPhaseThreads, 2)
mlstm_state(const GRID_CONSTANT StateParams p) {
  StateBlock<kPlanes>(p).run();
}

}  // namespace xlstm::cuda
