#pragma once
// The fused mLSTM sweep: all chunks of a segment in one block, the state never leaves the chip.
//   Out = [mask(A B^T * D)] X + outer * (A S)        S <- gamma S + (inner * B)^T X
// with A, B of 64 x kDA and a tile of kDX columns of X per block; what A, B, X are: Use in mlstm_params.h.
//
// S is float32 in registers and is published to shared memory as bfloat16 planes once per chunk. Eight warps: 2 x 4 over
// the rows and columns of Out and of A B^T, 4 x 2 over those of S; these grids read the fewest fragments. Per chunk:
//   publish S, wait for the chunk's loads             -- barrier --   (start the next chunk's loads, two stages)
//   A S and A B^T, P to shared memory                 -- barrier --
//   P X, update of S, store Out                       -- barrier --   (start the next chunk's loads, one stage)
#include "cuda/mlstm/mlstm_sweep_config.h"
#include "cuda/mlstm/mlstm_tiles.cuh"

namespace xlstm::cuda {

/// x as three bfloat16 numbers whose sum is x: vectors take part in products without loss.
DEVICE_FUNCTION void split_exactly(float x, bf16 (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i].bits = prim::float_to_bf16(x);
    x -= to_float(parts[i]);
  }
}

/// x plus the value of the lane whose number differs in the bits `lanes`.
DEVICE_FUNCTION float plus_lane(float x, u32 lanes) {
  return x + prim::float_of(prim::shfl_xor(prim::bits_of(x), lanes));
}

struct alignas(16) Vector16 {
  u32 words[4];
};

/// A 4x4 transposition among the four lanes of a quad: lane t's words[i] becomes lane i's words[t].
DEVICE_FUNCTION void exchange_in_quad(u32 (&words)[4]) {
  const u32 t = prim::thread_idx().x % 4;
#pragma unroll
  for (u32 bit = 1; bit < 4; bit *= 2) {
#pragma unroll
    for (u32 low = 0; low < 4; ++low) {
      if ((low & bit) != 0) continue;
      const bool upper = (t & bit) != 0;
      const u32 got = prim::shfl_xor(upper ? words[low] : words[low + bit], bit);
      (upper ? words[low] : words[low + bit]) = got;
    }
  }
}

/// Two neighbouring numbers of an operand, packed bfloat16 with one plane, else two floats.
template <int kPlanes>
struct Pair {
  u32 words[kPlanes];
  DEVICE_FUNCTION float low() const {
    return kPlanes == 1 ? low_half(words[0]) : prim::float_of(words[0]);
  }
  DEVICE_FUNCTION float high() const {
    return kPlanes == 1 ? high_half(words[0]) : prim::float_of(words[kPlanes - 1]);
  }
};

/// Numbers beyond the first `left` are zero.
template <int kPlanes>
DEVICE_FUNCTION Pair<kPlanes> load_pair(const Operand& x, int64_t from, int left) {
  Pair<kPlanes> pair = {};
  if constexpr (kPlanes == 1) {
    if (x.vector && left >= 2) {
      pair.words[0] = *reinterpret_cast<const u32*>(static_cast<const bf16*>(x.data) + from);
      return pair;
    }
  }
  const Dtype dtype = kPlanes == 1 ? Dtype::kBFloat16 : x.dtype;
  const float low = left > 0 ? load_number(x.data, from, dtype) : 0.0F;
  const float high = left > 1 ? load_number(x.data, from + x.inner, dtype) : 0.0F;
  if constexpr (kPlanes == 1) {
    pair.words[0] = prim::pack_bf16x2(low, high);
  } else {
    pair.words[0] = prim::bits_of(low);
    pair.words[1] = prim::bits_of(high);
  }
  return pair;
}

/// What one chunk needs from memory.
template <int kDA, int kDX, int kPlanes>
struct SweepStage {
  Tile<64, kDA, kPlanes> a, b;
  Tile<64, kDX, kPlanes> x;
  GateRecord records[64];
  float z[64];
};

template <Use kUse, int kDA, int kDX, int kPlanes>
struct SweepShared {
  Tile<kDA, kDX, kPlanes> state;
  Tile<64, 64, kPlanes> p;
  Tile<8, 64, 1> weights;  ///< rows 0..2: parts of the tokens' weights in n; the others zero
  alignas(
      16) float sums[64][4];  ///< per row and column of warps: parts of the product or of the dots
  union {
    bf16 n_parts[kDA][8];  ///< kH: columns 0..2 sum to n, the others zero
    float n[kDX];          ///< kDq, kDk
  };
  SweepStage<kDA, kDX, kPlanes> stages[2];  ///< the second one only with p.stages = 2

  static_assert(sizeof(SweepStage<kDA, kDX, kPlanes>) == sweep_stage_bytes({kDA, kDX, kPlanes}));
};

template <Use kUse, int kDA, int kDX, int kPlanes>
class Sweep {
  static constexpr int kThreads = 256;
  static constexpr bool kReverse = kUse == Use::kDv || kUse == Use::kDk;
  static constexpr bool kTransposed = kUse == Use::kDq || kUse == Use::kDk;  ///< S = C^T
  static constexpr bool kHasN = kUse != Use::kDv;
  static constexpr int kNWidth = kTransposed ? kDX : kDA;  ///< n has a number per column of X or B
  static constexpr int kOutTiles = kDX / 32;               ///< 8-column tiles of Out per warp
  static constexpr int kStateRows = kDA / 64;              ///< 16-row tiles of S per warp
  static constexpr int kStateTiles = kDX / 16;             ///< 8-column tiles of S per warp

 public:
  using Shared = SweepShared<kUse, kDA, kDX, kPlanes>;
  using Stage = SweepStage<kDA, kDX, kPlanes>;
  static_assert(sizeof(Shared) == sweep_shared_bytes({kDA, kDX, kPlanes}, 2));

  DEVICE_FUNCTION Sweep(const SweepParams& params, Shared& shared)
      : p(params),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        warp(thread / 32),
        group(thread % 32 / 4),
        quad(thread % 4) {
    tile = static_cast<int>(prim::block_idx().x) % tiles();
    const int sequence = sequence_head() / p.chunks.num_heads;
    head = sequence_head() - sequence * p.chunks.num_heads;
    range = sequence_at(p.chunks, sequence);
    chunks = segment_at(p.chunks, range, segment());
    columns = p.x.width - tile * kDX;
    depth = divide_up(p.a.width, 16) * 16;
  }

  DEVICE_FUNCTION void run() {
    const int count = chunks.end - chunks.begin;
    clear_shared();
    if (count > 0) load(0);
    load_state();
    for (int i = 0; i < count; ++i) {
      const float gamma = p.gamma[slot_at(i)];
      publish_state();
      prim::cp_async_wait<0>();
      prim::sync_block();
      if (p.stages == 2 && i + 1 < count) load(i + 1);
      if (kTransposed && i > 0) write_dots(i - 1);
      chunk(i, gamma, i + 1 < count);
    }
    if (kTransposed && count > 0) {
      prim::sync_block();
      write_dots(count - 1);
    }
    store_state();
  }

 private:
  // Where ---------------------------------------------------------------------------------------------------------------
  // The first four are asked for before and after the chunks: cheaper to work out again than to keep in registers.
  DEVICE_FUNCTION int tiles() const { return divide_up(p.x.width, kDX); }
  DEVICE_FUNCTION int item() const { return static_cast<int>(prim::block_idx().x) / tiles(); }
  DEVICE_FUNCTION int segment() const { return item() % p.chunks.segments; }
  DEVICE_FUNCTION int sequence_head() const { return item() / p.chunks.segments; }
  DEVICE_FUNCTION int chunk_at(int i) const {
    return kReverse ? chunks.end - 1 - i : chunks.begin + i;
  }
  DEVICE_FUNCTION int64_t slot_at(int i) const {
    return static_cast<int64_t>(head) * p.chunks.slots + range.first_slot + chunk_at(i);
  }
  DEVICE_FUNCTION int token_at(int i) const { return range.begin + chunk_at(i) * 64; }
  DEVICE_FUNCTION int rows_at(int i) const {
    const int left = range.length - chunk_at(i) * 64;
    return left < 64 ? left : 64;
  }
  DEVICE_FUNCTION Stage& stage_at(int i) { return s.stages[p.stages == 2 ? i & 1 : 0]; }

  // Rows and columns of this thread's accumulators.
  DEVICE_FUNCTION int out_row(int m, int half) const {
    return warp / 4 * 32 + 16 * m + 8 * half + group;
  }
  DEVICE_FUNCTION int out_column(int t) const { return warp % 4 * (kDX / 4) + 8 * t + 2 * quad; }
  DEVICE_FUNCTION int score_column(int t) const { return warp % 4 * 16 + 8 * t + 2 * quad; }
  DEVICE_FUNCTION int state_row(int m, int half) const {
    return (warp / 2 * kStateRows + m) * 16 + 8 * half + group;
  }
  DEVICE_FUNCTION int state_column(int t) const { return warp % 2 * (kDX / 2) + 8 * t + 2 * quad; }
  DEVICE_FUNCTION int n_column(int c) const { return 64 * c + 8 * warp + 2 * quad; }

  static DEVICE_FUNCTION float outer(const GateRecord& r) { return kReverse ? r.u : r.w; }
  static DEVICE_FUNCTION float inner(const GateRecord& r) { return kReverse ? r.w : r.u; }

  // Shared memory and loads ---------------------------------------------------------------------------------------------
  DEVICE_FUNCTION void clear_shared() {
    if constexpr (kHasN) {
      for (int i = thread; i < 8 * 64; i += kThreads) s.weights.data[0][i].bits = 0;
    }
    if (kTransposed && p.z == nullptr && thread < 64)
      for (int i = 0; i < p.stages; ++i) s.stages[i].z[thread] = 0;
  }

  DEVICE_FUNCTION void load(int i) {
    Stage& stage = stage_at(i);
    const int rows = rows_at(i), token = token_at(i);
    const int64_t slot = slot_at(i);
    load_tile<kThreads>(stage.a, p.a, token_offset(p.a, range.batch, token, head), rows, 0);
    load_tile<kThreads>(stage.b, p.b, token_offset(p.b, range.batch, token, head), rows, 0);
    load_tile<kThreads>(stage.x, p.x, token_offset(p.x, range.batch, token, head), rows,
                        tile * kDX);
    load_records<kThreads>(stage.records, p.records + slot * 64, 64);
    if (kTransposed && p.z != nullptr && thread < 16)
      prim::cp_async16(&stage.z[4 * thread], p.z + slot * 64 + 4 * thread);
    prim::cp_async_commit();
  }

  // The state -----------------------------------------------------------------------------------------------------------
  /// Calls f(number, offset in a (DQK,DV) matrix) for the numbers of S that exist.
  template <class F>
  DEVICE_FUNCTION void for_state(F f) {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = state_row(m, i / 2), col = state_column(t) + i % 2;
          if (row >= p.a.width || col >= columns) continue;
          const int x = tile * kDX + col;
          f(state[m][t][i], kTransposed ? static_cast<int64_t>(x) * p.dv + row
                                        : static_cast<int64_t>(row) * p.dv + x);
        }
  }
  /// Likewise f(number, offset in a (DQK) vector) for n.
  template <class F>
  DEVICE_FUNCTION void for_n(F f) {
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = n_column(c) + e;
        if (col < (kTransposed ? columns : p.a.width)) f(n[c][e], kTransposed * tile * kDX + col);
      }
  }

  DEVICE_FUNCTION void load_state() {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[m][t][i] = 0;
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c) n[c][0] = n[c][1] = 0;
    if (p.start_c != nullptr) {
      const float* start = p.start_c + static_cast<int64_t>(item()) * p.dqk * p.dv;
      for_state([start](float& x, int64_t at) { x = start[at]; });
    }
    if (kHasN && p.start_n != nullptr) {
      const float* start = p.start_n + static_cast<int64_t>(item()) * p.dqk;
      for_n([start](float& x, int at) { x = start[at]; });
    }
  }

  DEVICE_FUNCTION void store_state() {
    if (segment() != (kReverse ? 0 : p.chunks.segments - 1)) return;
    if (p.end_c != nullptr) {
      float* end = p.end_c + static_cast<int64_t>(sequence_head()) * p.dqk * p.dv;
      for_state([end](float x, int64_t at) { end[at] = x; });
    }
    // Eight lanes hold the same numbers of n, and with kH all tiles do.
    if (kHasN && p.end_n != nullptr && group == 0 && (kTransposed || tile == 0)) {
      float* end = p.end_n + static_cast<int64_t>(sequence_head()) * p.dqk;
      for_n([end](float x, int at) { end[at] = x; });
    }
  }

  DEVICE_FUNCTION void publish_state() {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_pair(s.state, state_row(m, half), state_column(t), state[m][t][2 * half],
                     state[m][t][2 * half + 1]);
    if constexpr (kHasN) {
      if (group == 0) publish_n();
    }
  }

  DEVICE_FUNCTION void publish_n() {
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = n_column(c) + e;
        if constexpr (kTransposed) {
          s.n[col] = n[c][e];
        } else {
          bf16 parts[3];
          split_exactly(n[c][e], parts);
          const Vector16 row = {
              {parts[0].bits | static_cast<u32>(parts[1].bits) << 16, parts[2].bits, 0, 0}};
          *reinterpret_cast<Vector16*>(s.n_parts[col]) = row;
        }
      }
  }

  DEVICE_FUNCTION void update_state(Stage& stage, float gamma) {
    const int first_row = warp / 2 * kStateRows * 16, first_column = warp % 2 * (kDX / 2);
    if (first_row >= depth || first_column >= columns) return;
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[m][t][i] *= gamma;
#pragma unroll
    for (int k0 = 0; k0 < 64; k0 += 16) {
      const GateRecord* records = &stage.records[k0 + 2 * quad];
      const float weights[4] = {inner(records[0]), inner(records[1]), inner(records[8]),
                                inner(records[9])};
      u32 a[kStateRows][kPlanes][4];
#pragma unroll
      for (int m = 0; m < kStateRows; ++m) {
        fragment_a_transposed(a[m], stage.b, first_row + 16 * m, k0);
        scale_columns(a[m], weights);
      }
#pragma unroll
      for (int t = 0; t < kStateTiles; t += 2) {
        u32 b[kPlanes][4];
        fragment_b_transposed(b, stage.x, first_column + 8 * t, k0);
#pragma unroll
        for (int m = 0; m < kStateRows; ++m) {
          multiply_add(state[m][t], a[m], b, 0);
          multiply_add(state[m][t + 1], a[m], b, 2);
        }
      }
    }
  }

  // The vector n --------------------------------------------------------------------------------------------------------
  /// Parts of the weight that a token has in n.
  DEVICE_FUNCTION void write_weights(Stage& stage) {
    if (thread >= 64) return;
    float weight = inner(stage.records[thread]);
    if constexpr (kUse == Use::kDk) weight *= stage.z[thread];
    bf16 parts[3];
    split_exactly(weight, parts);
#pragma unroll
    for (int i = 0; i < 3; ++i) *s.weights.at(0, i, thread) = parts[i];
  }

  /// n <- gamma n + sum of weighted rows; a warp has 8 of every 64 columns, every lane the sums of its quad's columns.
  DEVICE_FUNCTION void update_n(Tile<64, kNWidth, kPlanes>& rows, float gamma) {
    const int l = thread % 32;
    u32 w[2][4];
    prim::ldmatrix_x4(w[0], s.weights.at(0, l % 8, 8 * (l / 8)));
    prim::ldmatrix_x4(w[1], s.weights.at(0, l % 8, 32 + 8 * (l / 8)));
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c) {
      float sums[4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 near[4] = {w[h][0], 0, w[h][1], 0}, far[4] = {w[h][2], 0, w[h][3], 0};
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          u32 b[4];
          prim::ldmatrix_x4_trans(b, rows.at(plane, 32 * h + l, 64 * c + 8 * warp));
          prim::mma_bf16(sums, near, b[0], b[1]);
          prim::mma_bf16(sums, far, b[2], b[3]);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e)  // the three parts lie in groups 0 to 2
        n[c][e] = gamma * n[c][e] + plus_lane(plus_lane(plus_lane(sums[e], 4), 8), 16);
    }
  }

  /// sums[row] += w_row (q_row . n) over this warp's quarter of the contraction; a quad's sum is the whole.
  DEVICE_FUNCTION void add_normaliser(Stage& stage, float (&sums)[2][2]) {
    const int l = thread % 32;
    float products[2][4] = {};
#pragma unroll
    for (int step = 0; step < kDA / 64; ++step) {
      const int k0 = warp % 4 * (kDA / 4) + 16 * step;
      u32 b[2];
      prim::ldmatrix_x2_trans(b, s.n_parts[k0 + l % 16]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        u32 a[kPlanes][4];
        fragment_a(a, stage.a, warp / 4 * 32 + 16 * m, k0);
#pragma unroll
        for (int plane = kPlanes - 1; plane >= 0; --plane)
          prim::mma_bf16(products[m], a[plane], b[0], b[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums[m][half] +=
            stage.records[out_row(m, half)].w * (products[m][2 * half] + products[m][2 * half + 1]);
  }

  // One chunk -----------------------------------------------------------------------------------------------------------
  using OutTile = float[2][kOutTiles][4];
  using ScoreTile = float[2][2][4];
  using DotTile = Pair<kPlanes>[2][kOutTiles][2];

  DEVICE_FUNCTION void chunk(int i, float gamma, bool more) {
    Stage& stage = stage_at(i);
    OutTile out = {};
    {
      ScoreTile scores = {};
      multiply(stage, out, scores);
      finish_scores(stage, scores);
    }
    scale_rows(stage, out);
    if constexpr (kHasN) write_weights(stage);
    prim::sync_block();
    DotTile dots;
    if constexpr (kTransposed) load_dots(i, dots);
    if (warp % 4 * (kDX / 4) < columns) add_products(stage, out);
    update_state(stage, gamma);
    if constexpr (kUse == Use::kH) {
      update_n(stage.b, gamma);
      normalize(i, stage, out);
    } else if constexpr (kTransposed) {
      update_n(stage.x, gamma);
      sum_dots(out, dots);
    }
    if (p.stages == 1 && more) {
      prim::sync_block();
      load(i + 1);
    }
    store(i, out);
  }

  /// out = A S, scores = A B^T
  DEVICE_FUNCTION void multiply(Stage& stage, OutTile& out, ScoreTile& scores) {
    if (depth == kDA) {
#pragma unroll
      for (int k0 = 0; k0 < kDA; k0 += 16) multiply_step(stage, k0, out, scores);
    } else {
#pragma unroll 1
      for (int k0 = 0; k0 < depth; k0 += 16) multiply_step(stage, k0, out, scores);
    }
  }

  DEVICE_FUNCTION void multiply_step(Stage& stage, int k0, OutTile& out, ScoreTile& scores) {
    u32 a[2][kPlanes][4], b[kPlanes][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) fragment_a(a[m], stage.a, warp / 4 * 32 + 16 * m, k0);
#pragma unroll
    for (int t = 0; t < kOutTiles; t += 2) {
      fragment_b_transposed(b, s.state, warp % 4 * (kDX / 4) + 8 * t, k0);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add(out[m][t], a[m], b, 0);
        multiply_add(out[m][t + 1], a[m], b, 2);
      }
    }
    fragment_b(b, stage.b, warp % 4 * 16, k0);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      multiply_add(scores[m][0], a[m], b, 0);
      multiply_add(scores[m][1], a[m], b, 2);
    }
  }

  /// P = scale (scores + z) D to shared memory; with kH also the row sums that make up the normaliser's product.
  DEVICE_FUNCTION void finish_scores(Stage& stage, ScoreTile& scores) {
    float sums[2][2] = {};
    // Read before the stores to P, which could alias.
    const GateRecord* at = &stage.records[score_column(0)];
    const GateRecord others[2][2] = {{at[0], at[1]}, {at[8], at[9]}};
    float z[2][2] = {};
    if constexpr (kUse == Use::kDk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[i / 2][i % 2] = stage.z[score_column(i / 2) + i % 2];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out_row(m, half);
        const GateRecord gates = stage.records[row];
        const float z_row = kUse == Use::kDq ? stage.z[row] : 0.0F;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          float values[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int col = score_column(t) + e;
            const float d = kReverse ? decay(others[t][e], col, gates, row)
                                     : decay(gates, row, others[t][e], col);
            float score = scores[m][t][2 * half + e];
            if constexpr (kUse == Use::kDq) score += z_row;
            if constexpr (kUse == Use::kDk) score += z[t][e];
            values[e] = score * (p.scale * d);
            if constexpr (kUse == Use::kH) sums[m][half] += values[e];
          }
          store_pair(s.p, row, score_column(t), values[0], values[1]);
        }
      }
    if constexpr (kUse == Use::kH) {
      add_normaliser(stage, sums);
      publish_sums(sums);
    }
  }

  /// Sums over the quad into s.sums.
  DEVICE_FUNCTION void publish_sums(float (&sums)[2][2]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = plus_lane(plus_lane(sums[m][half], 1), 2);
        if (quad == 0) s.sums[out_row(m, half)][warp % 4] = sum;
      }
  }

  /// out = outer (A S + z n)
  DEVICE_FUNCTION void scale_rows(Stage& stage, OutTile& out) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out_row(m, half);
        const float factor = outer(stage.records[row]);
        const float z = kUse == Use::kDq ? stage.z[row] : 1.0F;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = out[m][t][2 * half + e];
            if constexpr (kTransposed) x += z * s.n[out_column(t) + e];
            x *= factor;
          }
      }
  }

  /// out += P X
  DEVICE_FUNCTION void add_products(Stage& stage, OutTile& out) {
#pragma unroll
    for (int k0 = 0; k0 < 64; k0 += 16) {
      u32 a[2][kPlanes][4], b[kPlanes][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) fragment_a(a[m], s.p, warp / 4 * 32 + 16 * m, k0);
#pragma unroll
      for (int t = 0; t < kOutTiles; t += 2) {
        fragment_b_transposed(b, stage.x, warp % 4 * (kDX / 4) + 8 * t, k0);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(out[m][t], a[m], b, 0);
          multiply_add(out[m][t + 1], a[m], b, 2);
        }
      }
    }
  }

  /// Divides the rows by N; column tile 0 writes the product.
  DEVICE_FUNCTION void normalize(int i, Stage& stage, OutTile& out) {
    // Where exp(-m) underflows and q is zero, h is zero and not 0 / 0.
    constexpr float kSmallest = 1.17549435e-38F;
    const int rows = rows_at(i);
    const int64_t token = static_cast<int64_t>(range.batch) * p.chunks.time + token_at(i);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out_row(m, half);
        const float* parts = s.sums[row];
        const float product = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        if (p.product != nullptr && tile == 0 && warp % 4 == 0 && quad == 0 && row < rows)
          p.product[(token + row) * p.chunks.num_heads + head] = product;
        if (!p.normalize) continue;
        const float floor = stage.records[row].floor;
        const float norm = fmaxf(fmaxf(product < 0 ? -product : product, floor), kSmallest) + p.eps;
        const float factor = 1.0F / norm;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) {
          out[m][t][2 * half] *= factor;
          out[m][t][2 * half + 1] *= factor;
        }
      }
  }

  // Row dots of kDq and kDk ---------------------------------------------------------------------------------------------
  DEVICE_FUNCTION void load_dots(int i, DotTile& dots) const {
    const int64_t base =
        token_offset(p.dot, range.batch, token_at(i), head) + tile * kDX * p.dot.inner;
    const int rows = rows_at(i);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out_row(m, half);
        const int64_t from = base + row * p.dot.time;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
          dots[m][t][half] = load_pair<kPlanes>(p.dot, from + out_column(t) * p.dot.inner,
                                                row < rows ? columns - out_column(t) : 0);
      }
  }

  DEVICE_FUNCTION void sum_dots(OutTile& out, DotTile& dots) {
    float sums[2][2] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
          sums[m][half] += out[m][t][2 * half] * dots[m][t][half].low() +
                           out[m][t][2 * half + 1] * dots[m][t][half].high();
    publish_sums(sums);
  }

  /// After a barrier, when all warps' parts are there.
  DEVICE_FUNCTION void write_dots(int i) {
    if (thread >= 64) return;
    const int64_t position = static_cast<int64_t>(tile) * p.chunks.num_heads * p.chunks.slots;
    const float* parts = s.sums[thread];
    p.dots[(position + slot_at(i)) * 64 + thread] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }

  // Output --------------------------------------------------------------------------------------------------------------
  DEVICE_FUNCTION void store(int i, OutTile& out) const {
    const int64_t base =
        token_offset(p.out, range.batch, token_at(i), head) + tile * kDX * p.out.inner;
    const int rows = rows_at(i);
    if (kPlanes == 1 && p.out.vector) {
      store_vectors(base, rows, out);
    } else {
      store_numbers(base, rows, out);
    }
  }

  /// Four pieces of a row (or two of two rows) at a time: lane t of a quad collects piece t and stores its 16 bytes.
  DEVICE_FUNCTION void store_vectors(int64_t base, int rows, OutTile& out) const {
    constexpr int kPerRow = kOutTiles < 4 ? kOutTiles : 4, kHalves = 4 / kPerRow;
    bf16* data = static_cast<bf16*>(p.out.data);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int first = 0; first < 2; first += kHalves) {
        Vector16 piece;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int t = j % kPerRow, half = first + j / kPerRow;
          piece.words[j] = prim::pack_bf16x2(out[m][t][2 * half], out[m][t][2 * half + 1]);
        }
        exchange_in_quad(piece.words);
        const int row = out_row(m, first + quad / kPerRow);
        const int col = warp % 4 * (kDX / 4) + 8 * (quad % kPerRow);
        if (row >= rows || col >= columns) continue;
        bf16* to = data + base + row * p.out.time + col;
        if (columns - col >= 8) {
          *reinterpret_cast<Vector16*>(to) = piece;
          continue;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < columns - col) to[e].bits = static_cast<u16>(piece.words[e / 2] >> (e % 2 * 16));
      }
  }

  DEVICE_FUNCTION void store_numbers(int64_t base, int rows, OutTile& out) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out_row(m, half);
        if (row >= rows) continue;
        const int64_t from = base + row * p.out.time;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int col = out_column(t) + e;
            if (col < columns)
              store_number(p.out.data, from + col * p.out.inner,
                           kPlanes == 1 ? Dtype::kBFloat16 : p.out.dtype, out[m][t][2 * half + e]);
          }
      }
  }

  const SweepParams& p;
  Shared& s;
  const int thread, warp, group, quad;  ///< group and quad: row and column of a lane in a fragment
  int tile, head, columns, depth;
  SequenceRange range;
  SegmentRange chunks;
  float state[kStateRows][kStateTiles][4];
  float n[kNWidth / 64][2];  ///< n_column(c) and the next, alike in all groups
};

template <Use kUse, int kDA, int kDX, int kPlanes>
KERNEL_FUNCTION(256, 1)
mlstm_sweep(const GRID_CONSTANT SweepParams p) {
  using Kernel = Sweep<kUse, kDA, kDX, kPlanes>;
  Kernel(p, *reinterpret_cast<typename Kernel::Shared*>(prim::dynamic_shared())).run();
}

}  // namespace xlstm::cuda
