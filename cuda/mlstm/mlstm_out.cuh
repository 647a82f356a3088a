#pragma once
// out: 64 rows of a chunk, O = outer (A S) + [mask(A B^T * D)] X, for one tile of X's columns.
//
// The work of a block is a list of steps that each use one stage of shared memory, loaded one or two steps ahead:
//   pass 0           slices of 64 of the contraction: O += A S; after the last one rows are scaled and n is added
//   passes 1, 2, ..  one or two blocks of 64 keys: slices of S = A B^T; after the last one P = mask(S * D) goes to shared
//                    memory; then per block of keys O += P X
//   last             kDq, kDk: row dots of O
#include "cuda/mlstm/mlstm_twophase.cuh"

namespace xlstm::cuda {

/// What a block works on, the same for all of its threads. It lies in shared memory: read again where it is needed it
/// takes no registers from the sums.
struct alignas(16) OutPlace {
  int col0, row_block, head, slot;
  int batch, token0;                  // row and first token of the chunk
  int tokens, rows;                   // of the chunk, and from this block's first row on
  int slices, first_key, key_blocks;  // slices: of 64 of the contraction
};

template <int kPlanes>
struct OutShape {
  static constexpr int kRows = kBlockTokens;
  static constexpr int kColumns = kPlanes == 1 ? 128 : 64;
  static constexpr int kKeyBlocks = kPlanes == 1 ? 2 : 1;  // per pass
  // Two by four warps: a warp has 32 rows by a quarter of the columns, and by 16 keys of every block.
  static constexpr int kRowTiles = 2, kColumnTiles = kColumns / 32, kKeyTiles = 2;

  struct Stage {
    Tile<kRows, 64, kPlanes> a;
    union {
      Tile<64, kColumns, kPlanes>
          x;  // state [contraction][column], X [key][column], or the rows' dot operand
      Tile<kColumns, 64, kPlanes> state;  // [column][contraction]
      Tile<kBlockTokens, 64, kPlanes> b[kKeyBlocks];
    };
    float n[64];
  };
  struct Shared {
    Tile<kRows, kBlockTokens, kPlanes> scores[kKeyBlocks];  // P
    GateRecord rows[kRows], keys[kKeyBlocks * kBlockTokens];
    float row_z[kRows], key_z[kKeyBlocks * kBlockTokens];
    float row_sums[4][kRows];  // by column of warps
    float row_n[kRows];        // q . n
    OutPlace place;
    Stage stages[1];  // as many as the launch has
  };
  static constexpr size_t shared_bytes(int stages) {
    return sizeof(Shared) + (stages - 1) * sizeof(Stage);
  }
};

template <Use kUse, int kPlanes>
class OutBlock {
 public:
  using Shape = OutShape<kPlanes>;
  using Stage = typename Shape::Stage;
  static constexpr bool kReverse = kUse == Use::kDv || kUse == Use::kDk;
  static constexpr bool kTransposed = kUse == Use::kDq || kUse == Use::kDk;  // the state is

  DEVICE_FUNCTION explicit OutBlock(const SweepParams& params)
      : p(params),
        shared(*reinterpret_cast<typename Shape::Shared*>(prim::dynamic_shared())),
        place(shared.place) {
    thread = static_cast<int>(prim::thread_idx().x);
    lane = thread % 32;
    warp_row = thread / 128 * 32;
    warp = thread / 32 % 4;
  }

  DEVICE_FUNCTION void run() {
    const OutPlace found = find_place();
    if (thread == 0) place = found;
    prim::sync_block();
    if (found.rows <= 0) {
      if (found.tokens > 0 && p.dots != nullptr && thread < kBlockTokens) *dot_at(thread) = 0;
      return;
    }
    work();
    if (with_dots()) write_dots();
    if constexpr (kUse == Use::kH) {
      if (with_product()) finish_product();
    }
    write_out();
  }

 private:
  struct Step {
    int pass = 0, index = 0;
  };

  /// An unused slot has no tokens; no rows are left of a chunk that ends before this block of rows.
  DEVICE_FUNCTION OutPlace find_place() const {
    OutPlace x;
    const int tiles = divide_up(p.x.width, Shape::kColumns);
    const int row_blocks = p.chunks.length / kBlockTokens;
    int index = static_cast<int>(prim::block_idx().x);
    x.col0 = index % tiles * Shape::kColumns;
    index /= tiles;
    x.row_block = index % row_blocks;
    index /= row_blocks;
    x.head = index % p.chunks.num_heads;
    x.slot = index / p.chunks.num_heads;
    const SlotRange slot = slot_at(p.chunks, x.slot);
    x.batch = slot.sequence.batch;
    x.token0 = slot.sequence.begin + slot.chunk * p.chunks.length;
    const int left = slot.sequence.length - slot.chunk * p.chunks.length;
    x.tokens = !slot.used ? 0 : left < p.chunks.length ? left : p.chunks.length;
    x.rows = x.tokens - x.row_block * kBlockTokens;
    x.slices = divide_up(p.a.width, 64);
    x.first_key = kReverse ? x.row_block : 0;
    x.key_blocks = kReverse ? divide_up(x.tokens, kBlockTokens) - x.row_block : x.row_block + 1;
    return x;
  }

  DEVICE_FUNCTION bool with_product() const {
    return kUse == Use::kH && (p.normalize || p.product != nullptr);
  }
  DEVICE_FUNCTION bool with_n() const { return kTransposed && p.z != nullptr; }
  DEVICE_FUNCTION bool with_dots() const { return kTransposed && p.dots != nullptr; }

  DEVICE_FUNCTION int passes() const { return divide_up(place.key_blocks, Shape::kKeyBlocks); }
  DEVICE_FUNCTION int blocks_of(int pass) const {
    const int left = place.key_blocks - (pass - 1) * Shape::kKeyBlocks;
    return left < Shape::kKeyBlocks ? left : Shape::kKeyBlocks;
  }
  DEVICE_FUNCTION void advance(Step& step) const {
    const int count = step.pass == 0 ? place.slices : place.slices + blocks_of(step.pass);
    if (++step.index < count) return;
    ++step.pass;
    step.index = 0;
  }

  DEVICE_FUNCTION void work() {
    clear(o);
    const int steps = place.slices * (1 + passes()) + place.key_blocks + (with_dots() ? 1 : 0);
    int load_stage = 0, stage = 0;
    Step load_step, step;
#pragma unroll 1
    for (int i = 1 - p.stages; i < steps; ++i) {
      if (i >= 0) {
        // This step's stage has arrived, and every thread has left the one that is loaded over next. After the last slice
        // of a pass it is P that has arrived; the pass's records are loaded over not before its last block of keys.
        if (p.stages == 3) {
          prim::cp_async_wait<1>();
        } else {
          prim::cp_async_wait<0>();
        }
        prim::sync_block();
      }
      if (i + p.stages - 1 < steps) {
        load(shared.stages[load_stage], load_step);
        advance(load_step);
      }
      prim::cp_async_commit();
      load_stage = load_stage + 1 == p.stages ? 0 : load_stage + 1;
      if (i < 0) continue;
      compute(shared.stages[stage], step);
      advance(step);
      stage = stage + 1 == p.stages ? 0 : stage + 1;
    }
  }

  // Loading -----------------------------------------------------------------------------------------------------------

  DEVICE_FUNCTION int64_t position(int in_chunk) const {
    return (int64_t{place.head} * p.chunks.slots + place.slot) * p.chunks.length + in_chunk;
  }

  template <int kCols>
  DEVICE_FUNCTION void load_rows(Tile<64, kCols, kPlanes>& tile, const Operand& x, int block,
                                 int col) const {
    const int first = block * kBlockTokens;
    load_tile<kTwoPhaseThreads>(tile, x,
                                token_offset(x, place.batch, place.token0 + first, place.head),
                                place.tokens - first, col);
  }

  DEVICE_FUNCTION void load_gates(GateRecord* records, float* z, int block, int blocks) const {
    const int here = thread_here();
    const int first = block * kBlockTokens, count = blocks * kBlockTokens;
    load_records<kTwoPhaseThreads>(records, p.records + position(first), count);
    if (kTransposed && p.z != nullptr && here < count / 4)
      prim::cp_async16(z + 4 * here, p.z + position(first) + 4 * here);
  }

  template <int kStateRows, int kStateCols>
  DEVICE_FUNCTION void load_state(Tile<kStateRows, kStateCols, kPlanes>& tile, int row0,
                                  int column0) const {
    const int here = thread_here();
    constexpr int kPieces = kStateCols / 8;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const bf16* const from =
          static_cast<const bf16*>(p.states) +
          state_offset<kPlanes>(p.chunks, place.head, place.slot, plane, p.dqk, p.dv);
#pragma unroll
      for (int i = 0; i < kStateRows * kPieces / kTwoPhaseThreads; ++i) {
        const int piece = here + i * kTwoPhaseThreads;
        const int r = piece / kPieces, c = piece % kPieces * 8;
        const bool inside = row0 + r < padded(p.dqk) && column0 + c < padded(p.dv);
        const int64_t offset = int64_t{row0 + r} * padded(p.dv) + column0 + c;
        prim::cp_async16(tile.at(plane, r, c), from + (inside ? offset : 0), inside ? 16 : 0);
      }
    }
  }

  DEVICE_FUNCTION void load(Stage& stage, const Step& step) const {
    const int key = place.first_key + (step.pass - 1) * Shape::kKeyBlocks;
    if (step.pass > passes()) {
      load_rows(stage.x, p.dot, place.row_block, place.col0);
    } else if (step.index >= place.slices) {
      load_rows(stage.x, p.x, key + step.index - place.slices, place.col0);
    } else {
      load_rows(stage.a, p.a, place.row_block, 64 * step.index);
      if (step.pass == 0) {
        load_state_slice(stage, step.index);
        if (step.index == 0) load_gates(shared.rows, shared.row_z, place.row_block, 1);
      } else {
#pragma unroll
        for (int b = 0; b < Shape::kKeyBlocks; ++b)
          if (b < blocks_of(step.pass)) load_rows(stage.b[b], p.b, key + b, 64 * step.index);
        if (step.index == 0) load_gates(shared.keys, shared.key_z, key, blocks_of(step.pass));
      }
    }
  }

  DEVICE_FUNCTION void load_state_slice(Stage& stage, int slice) const {
    const int here = thread_here();
    if constexpr (kTransposed) {
      load_state(stage.state, place.col0, 64 * slice);
    } else {
      load_state(stage.x, 64 * slice, place.col0);
    }
    if (with_product() && here < 16)
      prim::cp_async16(stage.n + 4 * here, chunk_n() + 64 * slice + 4 * here);
  }

  DEVICE_FUNCTION const float* chunk_n() const {
    return p.state_n + (int64_t{place.head} * p.chunks.slots + place.slot) * padded(p.dqk);
  }

  // Products ----------------------------------------------------------------------------------------------------------

  template <int kTiles>
  using Sums = float[Shape::kRowTiles][kTiles][4];

  template <int kTiles>
  static DEVICE_FUNCTION void clear(Sums<kTiles>& sums) {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;
  }

  /// sums += A B over 64 of the contraction; B is [contraction][column], or with kRowsAreColumns [column][contraction].
  template <bool kRowsAreColumns, int kTiles, class TileB>
  DEVICE_FUNCTION void multiply(Sums<kTiles>& sums, Tile<64, 64, kPlanes>& tile_a,
                                TileB& tile_b) const {
#pragma unroll
    for (int k0 = 0; k0 < 64; k0 += 16) {
      u32 a[Shape::kRowTiles][kPlanes][4];
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) fragment_a(a[m], tile_a, warp_row + 16 * m, k0);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        u32 b[kPlanes][4];
        const int column = 8 * (warp * kTiles + n);
        if constexpr (kRowsAreColumns) {
          fragment_b(b, tile_b, column, k0);
        } else {
          fragment_b_transposed(b, tile_b, column, k0);
        }
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          multiply_add(sums[m][n], a[m], b, 0);
          multiply_add(sums[m][n + 1], a[m], b, 2);
        }
      }
    }
  }

  DEVICE_FUNCTION void compute(Stage& stage, const Step& step) {
    if (step.pass == 0) {
      if constexpr (kTransposed) {
        multiply<true>(o, stage.a, stage.state);
      } else {
        multiply<false>(o, stage.a, stage.x);
      }
      if (with_product()) add_row_n(stage);
      if (step.index == place.slices - 1) scale_rows();
    } else if (step.pass > passes()) {
      add_dots(stage);
    } else if (step.index < place.slices) {
#pragma unroll
      for (int b = 0; b < Shape::kKeyBlocks; ++b) {
        if (step.index == 0) clear(s[b]);
        if (b < blocks_of(step.pass)) multiply<true>(s[b], stage.a, stage.b[b]);
      }
      if (step.index == place.slices - 1) write_scores(step.pass);
    } else {
      multiply<false>(o, shared.scores[step.index - place.slices], stage.x);
    }
  }

  // Rows ---------------------------------------------------------------------------------------------------------------
  // A thread has rows row_of(m, half) of the block; of O the columns column_of(n) and the one after it.

  DEVICE_FUNCTION int row_of(int m, int half) const { return row_of(m, half, lane); }
  DEVICE_FUNCTION int row_of(int m, int half, int of_lane) const {
    return warp_row + 16 * m + 8 * half + of_lane / 4;
  }
  DEVICE_FUNCTION int column_of(int n) const { return column_of(n, lane); }
  DEVICE_FUNCTION int column_of(int n, int of_lane) const {
    return 8 * (warp * Shape::kColumnTiles + n) + 2 * (of_lane % 4);
  }

  /// q . n over this slice: a thread has 16 numbers of row thread / 4.
  DEVICE_FUNCTION void add_row_n(Stage& stage) {
    const int here = thread_here();
    const int row = here / 4, first = here % 4 * 16;
#pragma unroll
    for (int c = first; c < first + 16; c += 8) {
      const float* const n = stage.n + c;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const Bytes16 piece = *reinterpret_cast<const Bytes16*>(stage.a.at(plane, row, c));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          row_n += low_half(piece.words[i]) * n[2 * i] + high_half(piece.words[i]) * n[2 * i + 1];
      }
    }
  }

  /// O = outer weight * (A S [+ z n]).
  DEVICE_FUNCTION void scale_rows() {
    const int here = thread_here();
#pragma unroll
    for (int n = 0; n < Shape::kColumnTiles; ++n) {
      const int column = place.col0 + column_of(n, here % 32);
      float add[2] = {0, 0};
      if (with_n()) {
        if (column < p.dqk) add[0] = chunk_n()[column];
        if (column + 1 < p.dqk) add[1] = chunk_n()[column + 1];
      }
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row_of(m, half, here % 32);
          const float outer = kReverse ? shared.rows[row].u : shared.rows[row].w;
          const float z = with_n() ? kUse == Use::kDq ? shared.row_z[row] : 1.0F : 0.0F;
          float(&x)[4] = o[m][n];
          x[2 * half] = outer * (x[2 * half] + z * add[0]);
          x[2 * half + 1] = outer * (x[2 * half + 1] + z * add[1]);
        }
    }
  }

  /// P = mask(S * D) * scale of the pass's keys, to shared memory; forward also the sums of its rows.
  DEVICE_FUNCTION void write_scores(int pass) {
    const int key0 = (place.first_key + (pass - 1) * Shape::kKeyBlocks) * kBlockTokens,
              here = lane_here();
#pragma unroll
    for (int b = 0; b < Shape::kKeyBlocks; ++b) {
      if (b >= blocks_of(pass)) continue;
#pragma unroll
      for (int n = 0; n < Shape::kKeyTiles; ++n) {
        const int column = 8 * (warp * Shape::kKeyTiles + n) + 2 * (here % 4);
        const int key = b * kBlockTokens + column;
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = row_of(m, half, here);
            const float low = score(s[b][m][n][2 * half], row, key, key0);
            const float high = score(s[b][m][n][2 * half + 1], row, key + 1, key0);
            store_pair(shared.scores[b], row, column, low, high);
            if constexpr (kUse == Use::kH) row_sum[m][half] += low + high;
          }
      }
    }
  }

  DEVICE_FUNCTION float score(float product, int row, int key, int key0) const {
    const GateRecord &r = shared.rows[row], &k = shared.keys[key];
    const int t = place.row_block * kBlockTokens + row, other = key0 + key;
    const float d = kReverse ? decay(k, other, r, t) : decay(r, t, k, other);
    if (with_n()) product += kUse == Use::kDq ? shared.row_z[row] : shared.key_z[key];
    return d == 0 ? 0.0F : product * p.scale * d;
  }

  // Results -----------------------------------------------------------------------------------------------------------

  static DEVICE_FUNCTION float quad_sum(float x) {
    x += prim::float_of(prim::shfl_xor(prim::bits_of(x), 1));
    return x + prim::float_of(prim::shfl_xor(prim::bits_of(x), 2));
  }

  /// Sums of rows over the warps' columns; all threads of the block.
  DEVICE_FUNCTION void share_row_sums() {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(row_sum[m][half]);
        if (lane % 4 == 0) shared.row_sums[warp][row_of(m, half)] = sum;
      }
    if constexpr (kUse == Use::kH) {
      const float sum = quad_sum(row_n);
      if (lane % 4 == 0) shared.row_n[thread / 4] = sum;
    }
    prim::sync_block();
  }
  DEVICE_FUNCTION float total_row_sum(int row) const {
    return (shared.row_sums[0][row] + shared.row_sums[1][row]) +
           (shared.row_sums[2][row] + shared.row_sums[3][row]);
  }

  DEVICE_FUNCTION float* dot_at(int row) const {
    const int64_t tile =
        int64_t{place.col0 / Shape::kColumns} * p.chunks.num_heads * p.chunks.slots;
    return p.dots + tile * p.chunks.length + position(place.row_block * kBlockTokens + row);
  }

  DEVICE_FUNCTION void add_dots(Stage& stage) {
    const int here = thread_here();
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < Shape::kColumnTiles; ++n)
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            const u32 pair = *reinterpret_cast<const u32*>(
                stage.x.at(plane, row_of(m, half, here % 32), column_of(n, here % 32)));
            row_sum[m][half] +=
                o[m][n][2 * half] * low_half(pair) + o[m][n][2 * half + 1] * high_half(pair);
          }
  }

  DEVICE_FUNCTION void write_dots() {
    share_row_sums();
    if (thread < kBlockTokens) *dot_at(thread) = thread < place.rows ? total_row_sum(thread) : 0;
  }

  /// The normaliser's product; divides O by N.
  DEVICE_FUNCTION void finish_product() {
    share_row_sums();
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        const GateRecord& r = shared.rows[row];
        const float product = total_row_sum(row) + r.w * shared.row_n[row];
        if (p.product != nullptr && place.col0 == 0 && warp == 0 && lane % 4 == 0 &&
            row < place.rows) {
          const int64_t token = int64_t{place.batch} * p.chunks.time + place.token0 +
                                place.row_block * kBlockTokens + row;
          p.product[token * p.chunks.num_heads + place.head] = product;
        }
        if (!p.normalize) continue;
        const float size = product < 0 ? -product : product;
        const float inverse = prim::rcp((size > r.floor ? size : r.floor) + p.eps);
#pragma unroll
        for (int n = 0; n < Shape::kColumnTiles; ++n) {
          o[m][n][2 * half] *= inverse;
          o[m][n][2 * half + 1] *= inverse;
        }
      }
  }

  DEVICE_FUNCTION void write_out() const {
    const int64_t base =
        token_offset(p.out, place.batch, place.token0 + place.row_block * kBlockTokens, place.head);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        const int64_t at = base + row * p.out.time;
        if constexpr (kPlanes == 1) {
          write_row(at, row, m, half);
        } else {
#pragma unroll
          for (int n = 0; n < Shape::kColumnTiles; ++n)
            if (row < place.rows)
              write_pair(at, place.col0 + column_of(n), o[m][n][2 * half], o[m][n][2 * half + 1]);
        }
      }
  }

  /// bfloat16: 8 neighbouring columns per lane.
  DEVICE_FUNCTION void write_row(int64_t at, int row, int m, int half) const {
    Bytes16 piece;
#pragma unroll
    for (int n = 0; n < 4; ++n)
      piece.words[n] = prim::pack_bf16x2(o[m][n][2 * half], o[m][n][2 * half + 1]);
    transpose_quad(piece.words);
    const int column = place.col0 + 8 * (warp * Shape::kColumnTiles + lane % 4);
    auto* const out = static_cast<u16*>(p.out.data);
    if (row >= place.rows) return;
    if (p.out.vector && column + 8 <= p.out.width) {
      *reinterpret_cast<Bytes16*>(out + at + column) = piece;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < p.out.width)
        out[at + (column + i) * p.out.inner] = half_bits(piece.words, i);
  }

  /// float32 or float16: two neighbouring columns.
  DEVICE_FUNCTION void write_pair(int64_t at, int column, float low, float high) const {
    struct alignas(8) Pair {
      float low, high;
    };
    if (p.out.vector && column + 2 <= p.out.width) {
      if (p.out.dtype == Dtype::kFloat32) {
        *reinterpret_cast<Pair*>(static_cast<float*>(p.out.data) + at + column) = {low, high};
      } else {
        *reinterpret_cast<u32*>(static_cast<u16*>(p.out.data) + at + column) =
            prim::pack_f16x2(low, high);
      }
      return;
    }
    if (column < p.out.width) store_number(p.out.data, at + column * p.out.inner, p.out.dtype, low);
    if (column + 1 < p.out.width)
      store_number(p.out.data, at + (column + 1) * p.out.inner, p.out.dtype, high);
  }

  const SweepParams& p;
  typename Shape::Shared& shared;
  OutPlace& place;
  int thread, lane, warp_row, warp;  // warp: column of warps
  Sums<Shape::kColumnTiles> o;
  Sums<Shape::kKeyTiles> s[Shape::kKeyBlocks];
  float row_sum[Shape::kRowTiles][2] = {};
  float row_n = 0;
};

template <Use kUse, int kPlanes>
KERNEL_FUNCTION(kTwoPhaseThreads, 2)
mlstm_out(const GRID_CONSTANT SweepParams p) {
  OutBlock<kUse, kPlanes>(p).run();
}

/// One translation unit per number of planes.
template <int kPlanes>
void launch_out_planes(Use use, const SweepParams& params, const DeviceLimits& device,
                       Stream stream);

}  // namespace xlstm::cuda
