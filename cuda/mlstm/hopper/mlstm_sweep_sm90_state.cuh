#pragma once
// What a consuming warpgroup of the sm_90a sweep keeps from chunk to chunk: its rows of the state S and of the vector n, in
// the float32 accumulators of wgmma, and how they are read, published and left behind.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_block.cuh"

namespace xlstm::cuda {

/// kConsumer: which of the two; nothing where consumers have columns of their own and otherwise do the same.
template <class Block, int kConsumer = 0>
class SweepSm90State : public Block {
 public:
  using Block::kDA;
  using Block::kDX;
  using Block::kHasN;
  using Block::kOfUse;
  using Block::kOwnColumns;
  using Block::kReverse;
  using Block::kTransposed;

  DEVICE_FUNCTION SweepSm90State(const SweepSm90Params& params, typename Block::Shared& shared)
      : Block(params, shared),
        consumer(kOwnColumns ? warpgroup_here() - 1 : kConsumer),
        thread(static_cast<int>(prim::thread_idx().x % 128)),
        warp(thread / 32),
        group(thread % 32 / 4),
        quad(thread % 4) {}

 protected:
  using Block::item;
  using Block::p;
  using Block::place;
  using Block::s;
  using Block::segment;
  using Block::sequence_head;

  // Consumers with columns of their own have all rows of S. Of those that share the columns the late one's tokens see both
  // halves of the chunk, the early one's only their own: it has time for a state of 64 rows, and for an n of 64 numbers,
  // alone.
  static constexpr bool kLate = !kOwnColumns && kConsumer == (kReverse ? 0 : 1);
  static constexpr int kNWidth = kTransposed ? kDX : kDA;  ///< n has a number per column of X or B
  static constexpr bool kStateShared = !kOwnColumns && kDA == 128;
  static constexpr bool kNShared = !kOwnColumns && kNWidth == 128;
  static constexpr bool kOwnsState = kStateShared || !kLate;
  static constexpr bool kOwnsN = kHasN && (kNShared || !kLate);
  static constexpr int kStateRow = kStateShared ? 64 * kConsumer : 0;  ///< its first row of S
  static constexpr int kStateBlocks = kOwnColumns ? kDA / 64 : 1;      ///< of 64 rows
  static constexpr int kNRow = kNShared ? 64 * kConsumer : 0;          ///< its first number of n
  static constexpr int kBlockCount = kDX / 2;  ///< registers per thread of a block of S
  static_assert(!kOwnsN || kNWidth <= 64 || kNShared, "n takes one block of 64 numbers");

  static DEVICE_FUNCTION float outer(const GateRecord& r) { return kReverse ? r.u : r.w; }
  static DEVICE_FUNCTION float inner(const GateRecord& r) { return kReverse ? r.w : r.u; }
  static DEVICE_FUNCTION float quad_sum(float x) { return plus_lane(plus_lane(x, 1), 2); }

  /// First column of X, in tiles and in columns; columns from there on, of which there may be none.
  DEVICE_FUNCTION int column() const { return place.column + (kOwnColumns ? kDX * consumer : 0); }
  DEVICE_FUNCTION int tile() const { return column() / kDX; }
  DEVICE_FUNCTION int columns() const { return p.x.width - column(); }
  /// Row of this thread in the 64 rows of a warpgroup.
  DEVICE_FUNCTION int own_row(int half) const { return 16 * warp + 8 * half + group; }
  /// This thread's row in the chunk.
  DEVICE_FUNCTION int row_of(int half) const {
    return (kOwnColumns ? 0 : 64 * kConsumer) + own_row(half);
  }
  /// n at kNRow + own_row(half): the sum of three columns of the accumulator.
  DEVICE_FUNCTION float n_at(int half) const { return quad_sum(n[2 * half] + n[2 * half + 1]); }

  /// Makes the compiler work out addresses anew from here on: those of all chunks would stay in registers.
  DEVICE_FUNCTION void forget_addresses() {
    u32 own[] = {static_cast<u32>(128 * (kOwnColumns ? consumer : 0) + thread)};
    prim::fence_registers(own);
    thread = static_cast<int>(own[0] % 128);
    if constexpr (kOwnColumns) consumer = static_cast<int>(own[0] / 128);
    warp = thread / 32;
    group = thread % 32 / 4;
    quad = thread % 4;
  }

  // Begin and end -------------------------------------------------------------------------------------------------------
  /// Calls f(number, whether it exists, offset from first_of_state) for the numbers of S.
  template <class F>
  DEVICE_FUNCTION void for_state(F f) {
    const int row0 = kStateRow + own_row(0), col0 = 2 * quad;
#pragma unroll
    for (int block = 0; block < kStateBlocks; ++block)
#pragma unroll
      for (int v = 0; v < kBlockCount; ++v) {
        const int row = 64 * block + 8 * (v / 2 % 2), col = v / 4 * 8 + v % 2;
        if (v % 8 == 0)
          prim::sync_warp();  // keeps the compiler from working out all addresses at once
        f(state[block][v], row0 + row < p.a.width && col0 + col < columns(),
          kTransposed ? col * p.dv + row : row * p.dv + col);
      }
  }
  /// The thread's first number of S in one of several (DQK,DV) matrices.
  template <class T>
  DEVICE_FUNCTION T* first_of_state(T* matrices, int index) const {
    const int64_t row = kStateRow + own_row(0), x = column() + 2 * quad;
    return matrices + static_cast<int64_t>(index) * p.dqk * p.dv +
           (kTransposed ? x * p.dv + row : row * p.dv + x);
  }
  /// Whether n has a number for that row of the thread; where it lies in a (DQK) vector.
  DEVICE_FUNCTION bool has_n(int half) const {
    return kNRow + own_row(half) < (kTransposed ? columns() : p.a.width);
  }
  DEVICE_FUNCTION int n_offset(int half) const {
    return (kTransposed ? column() : 0) + kNRow + own_row(half);
  }

  DEVICE_FUNCTION void load_state() {
    if constexpr (kOwnColumns) {
      // Without branches: every number has one origin, else the compiler does not keep all of them in registers.
      const bool wanted = p.start_c != nullptr;
      const float* start = first_of_state(p.start_c, item());
      for_state([start, wanted](float& x, bool exists, int offset) {
        x = prim::load_if(start + offset, wanted && exists);
      });
    } else {
#pragma unroll
      for (int v = 0; v < kBlockCount; ++v) state[0][v] = 0;
    }
    if constexpr (kOwnsState && !kOwnColumns) {
      if (p.start_c != nullptr) {
        const float* start = first_of_state(p.start_c, item());
        for_state([start](float& x, bool exists, int offset) {
          if (exists) x = start[offset];
        });
      }
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) n[v] = 0;
    if constexpr (kOwnsN) {
      if (p.start_n == nullptr || quad != 0) return;
      const float* start = p.start_n + static_cast<int64_t>(item()) * p.dqk;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (has_n(half)) n[2 * half] = start[n_offset(half)];
    }
  }

  DEVICE_FUNCTION void store_state() {
    if constexpr (kTransposed) forget_addresses();
    if (segment() != (kReverse ? 0 : p.chunks.segments - 1)) return;
    if constexpr (kOwnsState) {
      if (p.end_c != nullptr) {
        float* end = first_of_state(p.end_c, sequence_head());
        for_state([end](float x, bool exists, int offset) {
          if (exists) end[offset] = x;
        });
      }
    }
    if constexpr (kOwnsN) {
      if (p.end_n == nullptr || (!kTransposed && column() != 0))
        return;  // with kH all tiles have all of n
      float* end = p.end_n + static_cast<int64_t>(sequence_head()) * p.dqk;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = n_at(half);
        if (quad == 0 && has_n(half)) end[n_offset(half)] = x;
      }
    }
  }

  // Anchors -------------------------------------------------------------------------------------------------------------
  // The registers of S and n, by owning thread: kDk's consumers may own what kDq's other ones do.
  static constexpr int kAnchorNumbers = sweep_sm90_anchor_numbers(SweepSm90Tile{kDA, kDX});
  DEVICE_FUNCTION int state_place(int v) const {
    return v * (kStateShared ? 256 : 128) + 2 * kStateRow + thread;
  }
  DEVICE_FUNCTION int n_place(int half) const {
    return kDA * kDX + half * (kNShared ? 256 : 128) + 2 * kNRow + thread;
  }

  /// kDq, before a chunk: leaves the state there if an anchor lies at its start.
  DEVICE_FUNCTION void leave_anchor(int chunk) {
    const int64_t anchor = anchor_of(chunk);
    if (anchor < 0) return;
    float* to = p.anchors.states + anchor * kAnchorNumbers;
    if constexpr (kOwnsState) {
#pragma unroll
      for (int block = 0; block < kStateBlocks; ++block)
#pragma unroll
        for (int v = 0; v < kBlockCount; ++v)
          to[state_place(block * kBlockCount + v)] = state[block][v];
    }
    if constexpr (kOwnsN) {
#pragma unroll
      for (int half = 0; half < 2; ++half) to[n_place(half)] = n_at(half);
    }
  }
  /// kDk, after the same chunk: <C, dC> + <n, dn>.
  DEVICE_FUNCTION void dot_anchor(int chunk) {
    const int64_t anchor = anchor_of(chunk);
    if (anchor < 0) return;
    const float* from = p.anchors.states + anchor * kAnchorNumbers;
    float sum = 0;
    if constexpr (kOwnsState) {
#pragma unroll
      for (int block = 0; block < kStateBlocks; ++block)
#pragma unroll
        for (int v = 0; v < kBlockCount; ++v)
          sum += state[block][v] * from[state_place(block * kBlockCount + v)];
    }
    if constexpr (kOwnsN) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float own = n_at(half);
        if (quad == 0) sum += own * from[n_place(half)];  // the other lanes hold copies
      }
    }
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) sum = plus_lane(sum, lanes);
    if (thread % 32 != 0) return;
    float* to = p.anchors.dots + anchor * kAnchorWarps + warp;
    if constexpr (kOwnColumns) {
      to[0] = sum;
      to[4] = 0;
    } else {
      to[4 * kConsumer] = sum;
    }
  }
  /// Number of the anchor among all tiles' ones; -1: none.
  DEVICE_FUNCTION int64_t anchor_of(int chunk) const {
    if (p.anchors.states == nullptr || (kOwnColumns && columns() <= 0)) return -1;
    const int anchor = anchor_at(p.chunks, place.range, chunk);
    if (anchor < 0) return -1;
    return (int64_t{tile()} * p.chunks.num_heads + place.head) * p.anchors.count + anchor;
  }

  // Once per chunk ------------------------------------------------------------------------------------------------------
  /// S and n as they enter the chunk, to shared memory.
  DEVICE_FUNCTION void publish_state() {
    if constexpr (kOwnsState) {
#pragma unroll
      for (int block = 0; block < kStateBlocks; ++block)
        store_rounded(this->published_state(consumer), kStateRow + 64 * block + 16 * warp, 0,
                      state[block]);
    }
    if constexpr (kOwnsN) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = kNRow + own_row(half);
        const float x = n_at(half);
        if (quad != 0) continue;
        if constexpr (kTransposed) {
          this->published_n(consumer)[row] = x;
        } else {
          s.n_parts.set(row, x);
        }
      }
    }
  }
  /// What a token with that inner weight adds to n with.
  static DEVICE_FUNCTION float n_weight(float weight, float z) {
    return kOfUse == Use::kDk ? weight * z : weight;
  }

  DEVICE_FUNCTION void decay_state(float gamma) {
#pragma unroll
    for (int block = 0; block < kStateBlocks; ++block)
#pragma unroll
      for (int v = 0; v < kBlockCount; ++v) state[block][v] *= gamma;
#pragma unroll
    for (int v = 0; v < 4; ++v) n[v] *= gamma;
  }

  int consumer;
  int thread, warp, group, quad;  ///< of the warpgroup; group and quad as in mlstm_sweep_block.cuh
  float state[kStateBlocks][kBlockCount];
  float n[4];
};

}  // namespace xlstm::cuda
