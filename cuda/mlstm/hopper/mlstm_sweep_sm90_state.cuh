#pragma once
// What a consuming warpgroup of the sm_90a sweep keeps from chunk to chunk: its 64 rows of the state S and of the vector n,
// in the float32 accumulators of wgmma, and how they are read, published and left behind.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_block.cuh"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX, int kConsumer>
class SweepSm90State : public SweepSm90Block<kUse, kDA, kDX> {
 public:
  using Base = SweepSm90Block<kUse, kDA, kDX>;
  using Base::kHasN;
  using Base::kLength;
  using Base::kReverse;
  using Base::kTransposed;

  DEVICE_FUNCTION SweepSm90State(const SweepSm90Params& params, typename Base::Shared& shared)
      : Base(params, shared),
        thread(static_cast<int>(prim::thread_idx().x % 128)),
        warp(thread / 32),
        group(thread % 32 / 4),
        quad(thread % 4) {}

 protected:
  using Base::item;
  using Base::p;
  using Base::place;
  using Base::s;
  using Base::segment;
  using Base::sequence_head;

  // The late consumer's rows see both halves of the chunk, the early one's only their own: it has time for a state of 64
  // rows, and for an n of 64 numbers, alone.
  static constexpr bool kLate = kConsumer == (kReverse ? 0 : 1);
  static constexpr int kNWidth = kTransposed ? kDX : kDA;  ///< n has a number per column of X or B
  static constexpr bool kOwnsState = kDA == 128 || !kLate;
  static constexpr bool kOwnsN = kHasN && (kNWidth == 128 || !kLate);
  static constexpr int kStateRow = kDA == 128 ? 64 * kConsumer : 0;  ///< its first row of S
  static constexpr int kNRow = kNWidth == 128 ? 64 * kConsumer : 0;  ///< its first number of n
  static constexpr int kStateCount = kDX / 2;                        ///< registers of S per thread

  static DEVICE_FUNCTION float outer(const GateRecord& r) { return kReverse ? r.u : r.w; }
  static DEVICE_FUNCTION float inner(const GateRecord& r) { return kReverse ? r.w : r.u; }
  static DEVICE_FUNCTION float quad_sum(float x) { return plus_lane(plus_lane(x, 1), 2); }

  /// Row of this thread in the 64 rows of a warpgroup.
  DEVICE_FUNCTION int own_row(int half) const { return 16 * warp + 8 * half + group; }
  /// n at kNRow + own_row(half): the sum of three columns of the accumulator.
  DEVICE_FUNCTION float n_at(int half) const { return quad_sum(n[2 * half] + n[2 * half + 1]); }

  // Begin and end -------------------------------------------------------------------------------------------------------
  /// Calls f(number, offset in a (DQK,DV) matrix) for the numbers of S that exist.
  template <class F>
  DEVICE_FUNCTION void for_state(F f) {
#pragma unroll
    for (int v = 0; v < kStateCount; ++v) {
      const int row = kStateRow + own_row(v / 2 % 2), col = v / 4 * 8 + 2 * quad + v % 2;
      if (row >= p.a.width || col >= place.columns) continue;
      const int x = place.tile * kDX + col;
      f(state[v],
        kTransposed ? static_cast<int64_t>(x) * p.dv + row : static_cast<int64_t>(row) * p.dv + x);
    }
  }
  /// Whether n has a number for that row of the thread; where it lies in a (DQK) vector.
  DEVICE_FUNCTION bool has_n(int half) const {
    return kNRow + own_row(half) < (kTransposed ? place.columns : p.a.width);
  }
  DEVICE_FUNCTION int n_offset(int half) const {
    return kTransposed * place.tile * kDX + kNRow + own_row(half);
  }

  DEVICE_FUNCTION void load_state() {
#pragma unroll
    for (int v = 0; v < kStateCount; ++v) state[v] = 0;
#pragma unroll
    for (int v = 0; v < 4; ++v) n[v] = 0;
    if constexpr (kOwnsState) {
      if (p.start_c != nullptr) {
        const float* start = p.start_c + static_cast<int64_t>(item()) * p.dqk * p.dv;
        for_state([start](float& x, int64_t offset) { x = start[offset]; });
      }
    }
    if constexpr (kOwnsN) {
      if (p.start_n == nullptr || quad != 0) return;
      const float* start = p.start_n + static_cast<int64_t>(item()) * p.dqk;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (has_n(half)) n[2 * half] = start[n_offset(half)];
    }
  }

  DEVICE_FUNCTION void store_state() {
    if (segment() != (kReverse ? 0 : p.chunks.segments - 1)) return;
    if constexpr (kOwnsState) {
      if (p.end_c != nullptr) {
        float* end = p.end_c + static_cast<int64_t>(sequence_head()) * p.dqk * p.dv;
        for_state([end](float x, int64_t offset) { end[offset] = x; });
      }
    }
    if constexpr (kOwnsN) {
      if (p.end_n == nullptr || (!kTransposed && place.tile != 0))
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
    return v * (kDA == 128 ? 256 : 128) + 2 * kStateRow + thread;
  }
  DEVICE_FUNCTION int n_place(int half) const {
    return kDA * kDX + half * (kNWidth == 128 ? 256 : 128) + 2 * kNRow + thread;
  }

  /// kDq, before a chunk: leaves the state there if an anchor lies at its start.
  DEVICE_FUNCTION void leave_anchor(int chunk) {
    const int64_t anchor = anchor_of(chunk);
    if (anchor < 0) return;
    float* to = p.anchors.states + anchor * kAnchorNumbers;
    if constexpr (kOwnsState) {
#pragma unroll
      for (int v = 0; v < kStateCount; ++v) to[state_place(v)] = state[v];
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
      for (int v = 0; v < kStateCount; ++v) sum += state[v] * from[state_place(v)];
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
    if (thread % 32 == 0) p.anchors.dots[anchor * kAnchorWarps + 4 * kConsumer + warp] = sum;
  }
  /// Number of the anchor among all blocks' ones; -1: none.
  DEVICE_FUNCTION int64_t anchor_of(int chunk) const {
    const int anchor = p.anchors.states == nullptr ? -1 : anchor_at(p.chunks, place.range, chunk);
    if (anchor < 0) return -1;
    return (int64_t{place.tile} * p.chunks.num_heads + place.head) * p.anchors.count + anchor;
  }

  // Once per chunk ------------------------------------------------------------------------------------------------------
  /// S and n as they enter the chunk and the weights of this warpgroup's tokens, to shared memory.
  DEVICE_FUNCTION void publish(int i, const GateRecord* records, const float* z) {
    if constexpr (kOwnsState) store_rounded(s.state, kStateRow + 16 * warp, 0, state);
    if constexpr (kOwnsN) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = kNRow + own_row(half);
        const float x = n_at(half);
        if (quad != 0) continue;
        if constexpr (kTransposed) {
          s.n[row] = x;
        } else {
          s.n_parts.set(row, x);
        }
      }
    }
    if (thread >= 64) return;
    const int token = 64 * kConsumer + thread;
    const float weight = inner(records[token]);
    s.inner[i % 2][token].bits = prim::float_to_bf16(weight);
    if constexpr (kHasN) s.weights.set(token, kUse == Use::kDk ? weight * z[token] : weight);
  }

  DEVICE_FUNCTION void decay_state(float gamma) {
#pragma unroll
    for (int v = 0; v < kStateCount; ++v) state[v] *= gamma;
#pragma unroll
    for (int v = 0; v < 4; ++v) n[v] *= gamma;
  }

  /// (inner * B)^T of half a chunk, at this warp's rows of S.
  DEVICE_FUNCTION void load_fragments(int i, u32 (&fragments)[4][4], StripTile<kBoxRows, kDA>& b,
                                      int half) {
    const u32* weights = reinterpret_cast<const u32*>(s.inner[i % 2]) + 32 * half + quad;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      fragment_a_transposed(fragments[j], b, kStateRow + 16 * warp, 16 * j);
      const u32 near = weights[8 * j], far = weights[8 * j + 4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        fragments[j][r] = prim::mul_bf16x2(fragments[j][r], r < 2 ? near : far);
    }
  }

  const int thread, warp, group,
      quad;  ///< of the warpgroup; group and quad as in mlstm_sweep_block.cuh
  float state[kStateCount];
  float n[4];
};

}  // namespace xlstm::cuda
