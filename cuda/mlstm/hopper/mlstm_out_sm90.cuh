#pragma once
// out for sm_90a: as mlstm_out.cuh, with wgmma on tiles that the copy engine loads.
//
// A tile is 128 rows of a chunk by 256 or 192 columns of X, 64 rows in the registers of each consuming warpgroup; a block takes one
// tile after the other. The ring carries, in the order of use:
//   slices       of 64 of the contraction: A and S, O += A S; after the last one rows are scaled and n is added
//   per pass     64 keys: slices of A and B, scores = A B^T; after the last one P = mask(scores * D) as fragments in
//                registers; then X, O += P X. A warpgroup that sees none of the keys only keeps the ring going.
//   kDq, kDk     the rows' dot operand, some columns at a time
// The rows' gates come by a ring of their own, and so does A where all its slices fit at once: it is then loaded once per
// tile. One thread fills the ring of the products, another the two others.
#include "cuda/mlstm/hopper/mlstm_out_tile_sm90.cuh"

namespace xlstm::cuda {

#if PRIM_HAS_SM90A

/// Whether X and the tile have the column.
template <class Shape>
DEVICE_FUNCTION bool has_column(const OutTile& t, const SweepParams& p, int col) {
  return col < p.x.width && col < t.col0 + Shape::kColumns;
}

template <Use kUse, class Shape>
class OutProducerSm90 {
 public:
  static constexpr bool kTransposed = out_transposed(kUse);

  DEVICE_FUNCTION OutProducerSm90(const OutParamsSm90& params, typename Shape::Shared& memory)
      : maps(params), p(params.out), shared(memory) {}

  /// The ring of the products.
  DEVICE_FUNCTION void fill_products() {
    int use = 0;
#pragma unroll 1
    for (OutTiles<kUse, Shape> tiles(maps); tiles.next();) {
      const OutTile& t = tiles.tile;
      if (t.rows <= 0) continue;
#pragma unroll 1
      for (int j = 0; j < maps.slices; ++j) load_state_slice(t, j, use++);
#pragma unroll 1
      for (int pass = 0; pass < t.passes; ++pass) {
#pragma unroll 1
        for (int j = 0; j < maps.slices; ++j) load_key_slice(t, t.key(pass), j, use++);
        load_values(t, t.key(pass), use++);
      }
      if (kTransposed && p.dots != nullptr)
#pragma unroll 1
        for (int col = t.col0; has_column<Shape>(t, p, col); col += Shape::kDotColumns)
          load_dots(t, col, use++);
    }
  }

  /// The rings of the rows' gates and of A.
  DEVICE_FUNCTION void fill_rows() {
    int count = 0;
#pragma unroll 1
    for (OutTiles<kUse, Shape> tiles(maps); tiles.next();) {
      const OutTile& t = tiles.tile;
      if (t.rows <= 0) continue;
      const int left = p.chunks.length - t.row0, tokens = left < Shape::kRows ? left : Shape::kRows;
      u64* const full = shared.row_ring.fill(count, gate_bytes(tokens));
      load_gates(shared.rows[shared.row_ring.slot(count)], t, t.row0, tokens, full);
      if (maps.resident)
#pragma unroll 1
        for (int j = 0; j < maps.slices; ++j) {
          const int use = count * Shape::kSlots + j;
          load_rows(t, j, j, shared.a_ring.fill(use, sizeof shared.a[0]));
        }
      ++count;
    }
  }

 private:
  static constexpr u32 kSlotBytes = sizeof(Shape::Slot::x);
  static_assert(sizeof(Shape::Slot::x) == sizeof(Shape::Slot::state),
                "of a slice of the state, too");

  DEVICE_FUNCTION bool with_z() const { return kTransposed && p.z != nullptr; }
  DEVICE_FUNCTION bool with_product() const {
    return kUse == Use::kH && (p.normalize || p.product != nullptr);
  }

  /// So many records from position `first` of the chunk on, and their z.
  DEVICE_FUNCTION u32 gate_bytes(int tokens) const {
    return static_cast<u32>(tokens) * (sizeof(GateRecord) + (with_z() ? 4 : 0));
  }
  template <class Gates>
  DEVICE_FUNCTION void load_gates(Gates& to, const OutTile& t, int first, int tokens,
                                  u64* full) const {
    const u32 count = static_cast<u32>(tokens);
    const int64_t position = t.position(p.chunks, first);
    prim::bulk_load(to.records, p.records + position, count * sizeof(GateRecord), full);
    if (with_z()) prim::bulk_load(to.z, p.z + position, count * sizeof(float), full);
  }

  /// 128 rows of slice j of A.
  DEVICE_FUNCTION void load_rows(const OutTile& t, int j, int to, u64* full) const {
    load_strip<2>(shared.a[to].bytes, maps.a, t, t.row0, 64 * j, full);
  }
  /// So many boxes of 64 tokens of 64 columns.
  template <int kBoxes>
  DEVICE_FUNCTION void load_strip(unsigned char* to, const prim::TensorMap& map, const OutTile& t,
                                  int first, int col, u64* full) const {
#pragma unroll
    for (int i = 0; i < kBoxes; ++i)
      prim::tma_load_4d(to + i * kBoxBytes, map, col, t.head, t.token0 + first + i * kBoxRows,
                        t.batch, full);
  }

  DEVICE_FUNCTION void load_state_slice(const OutTile& t, int j, int use) const {
    const u32 bytes = kSlotBytes + (maps.resident ? 0 : sizeof shared.a[0]) +
                      (with_product() ? sizeof shared.n[0] : 0);
    u64* const full = shared.ring.fill(use, bytes);
    const int slot = shared.ring.slot(use);
    const int matrix = t.head * p.chunks.slots + t.slot;
#pragma unroll
    for (int i = 0; i < Shape::kColumns / kBoxRows; ++i) {
      if constexpr (kTransposed) {
        load_state_box(shared.slots[slot].state.bytes + i * kBoxBytes, maps.state,
                       t.col0 + i * kBoxRows, 64 * j, matrix, full);
      } else {
        load_state_box(shared.slots[slot].x.strip(i), maps.state, 64 * j,
                       t.col0 + i * kStripColumns, matrix, full);
      }
    }
    if (!maps.resident) load_rows(t, j, slot, full);
    if (with_product())
      prim::bulk_load(shared.n[slot], p.state_n + int64_t{matrix} * padded(p.dqk) + 64 * j,
                      sizeof shared.n[0], full);
  }

  DEVICE_FUNCTION void load_key_slice(const OutTile& t, int key, int j, int use) const {
    const bool with_gates = j == maps.slices - 1;
    const u32 bytes = sizeof(Shape::Slot::b) + (maps.resident ? 0 : sizeof shared.a[0]) +
                      (with_gates ? gate_bytes(Shape::kKeys) : 0);
    u64* const full = shared.ring.fill(use, bytes);
    const int slot = shared.ring.slot(use);
    load_strip<1>(shared.slots[slot].b.bytes, maps.b, t, key, 64 * j, full);
    if (!maps.resident) load_rows(t, j, slot, full);
    if (with_gates) load_gates(shared.keys[slot], t, key, Shape::kKeys, full);
  }

  DEVICE_FUNCTION void load_values(const OutTile& t, int key, int use) const {
    u64* const full = shared.ring.fill(use, kSlotBytes);
    load_box_tile(shared.slots[shared.ring.slot(use)].x, maps.x, t.col0, t.head, t.token0 + key,
                  t.batch, full);
  }

  DEVICE_FUNCTION void load_dots(const OutTile& t, int col, int use) const {
    u64* const full = shared.ring.fill(use, sizeof(Shape::Slot::dot));
    auto& dot = shared.slots[shared.ring.slot(use)].dot;
#pragma unroll
    for (int i = 0; i < Shape::kDotColumns / kStripColumns; ++i)
      load_strip<2>(dot.strip(i), maps.dot, t, t.row0, col + i * kStripColumns, full);
  }

  const OutParamsSm90& maps;
  const SweepParams& p;
  typename Shape::Shared& shared;
};

template <Use kUse, class Shape>
class OutConsumerSm90 {
 public:
  static constexpr bool kReverse = out_reverse(kUse), kTransposed = out_transposed(kUse);

  DEVICE_FUNCTION OutConsumerSm90(const OutParamsSm90& params, typename Shape::Shared& memory,
                                  int index)
      : maps(params), p(params.out), shared(memory), consumer(index) {}

  DEVICE_FUNCTION void run() {
#pragma unroll 1
    for (OutTiles<kUse, Shape> tiles(maps); tiles.next();) {
      const OutTile& t = tiles.tile;
      if (t.rows > 0) {
        take(t);
      } else if (with_dots()) {
        clear_dots(t);
      }
    }
  }

 private:
  using Fragments = u32[kBlockTokens / 16][4];

  DEVICE_FUNCTION bool with_product() const {
    return kUse == Use::kH && (p.normalize || p.product != nullptr);
  }
  DEVICE_FUNCTION bool with_n() const { return kTransposed && p.z != nullptr; }
  DEVICE_FUNCTION bool with_dots() const { return kTransposed && p.dots != nullptr; }

  DEVICE_FUNCTION void take(const OutTile& t) {
    shared.row_ring.wait(count);
    multiply_state();
    scale_rows(t);
#pragma unroll 1
    for (int pass = 0; pass < t.passes; ++pass) {
      const bool sees = this->sees(t, pass);
      multiply_keys(sees, pass == t.passes - 1);
      Fragments weights;
      if (sees) find_weights(t, pass, weights);
      release_slot(shared.ring, use - 1);
      multiply_values(t, pass, sees, weights);
    }
    if (with_dots()) add_dots(t);
    if constexpr (kUse == Use::kH) {
      if (with_product()) finish_product(t);
    }
    release_slot(shared.row_ring, count++);
    write_out(t);
  }

  // Products -----------------------------------------------------------------------------------------------------------

  /// O = A S, and q . n.
  DEVICE_FUNCTION void multiply_state() {
    float row_n = 0;
#pragma unroll
    for (int v = 0; v < Shape::kColumns / 2; ++v) o[v] = 0;
#pragma unroll 1
    for (int j = 0; j < maps.slices; ++j, ++use) {
      shared.ring.wait(use);
      if (maps.resident) shared.a_ring.wait(count * Shape::kSlots + j);
      const int slot = shared.ring.slot(use);
      const Strips a = rows_of(j);
      prim::fence_registers(o);
      prim::wgmma_fence();
      if constexpr (kTransposed) {
        multiply_tiles<Shape::kColumns, false, false, 64>(o, a, strips_of(shared.slots[slot].state),
                                                          true);
      } else {
        multiply_tiles<Shape::kColumns, false, true, 64>(o, a, strips_of(shared.slots[slot].x),
                                                         true);
      }
      prim::wgmma_commit();
      if (with_product()) add_row_n(row_n, j);
      prim::wgmma_wait<0>();
      prim::fence_registers(o);
      release_slot(shared.ring, use);
    }
    row_n += prim::float_of(prim::shfl_xor(prim::bits_of(row_n), 1));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      row_sum[half] = prim::float_of(
          prim::shfl(prim::bits_of(row_n), static_cast<u32>(2 * (lane_here() / 4 + 8 * half))));
  }

  DEVICE_FUNCTION int a_slot(int j) const { return maps.resident ? j : shared.ring.slot(use); }
  /// This consumer's 64 rows of slice j of A.
  DEVICE_FUNCTION Strips rows_of(int j) const {
    return strips_of(shared.a[a_slot(j)]).from(kBoxRows * consumer, 0);
  }

  /// q . n over slice j: a thread has 32 numbers of row thread / 2, which is one of its warp's.
  DEVICE_FUNCTION void add_row_n(float& sum, int j) const {
    const int thread = thread_here() % 128;
    const float* const n = shared.n[shared.ring.slot(use)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = thread % 2 * 32 + 8 * i;
      const Bytes16 piece = *reinterpret_cast<const Bytes16*>(
          shared.a[a_slot(j)].piece(kBoxRows * consumer + thread / 2, col));
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum += low_half(piece.words[e]) * n[col + 2 * e] +
               high_half(piece.words[e]) * n[col + 2 * e + 1];
    }
  }

  /// scores = A B^T, where they are needed. The last slot, which has the keys' gates, is not released.
  DEVICE_FUNCTION void multiply_keys(bool sees, bool last_pass) {
#pragma unroll
    for (int v = 0; v < Shape::kKeys / 2; ++v) scores[v] = 0;
#pragma unroll 1
    for (int j = 0; j < maps.slices; ++j, ++use) {
      shared.ring.wait(use);
      if (sees) {
        prim::fence_registers(scores);
        prim::wgmma_fence();
        multiply_tiles<Shape::kKeys, false, false, 64>(
            scores, rows_of(j), strips_of(shared.slots[shared.ring.slot(use)].b), true);
        prim::wgmma_commit();
        prim::wgmma_wait<0>();
        prim::fence_registers(scores);
      }
      if (j < maps.slices - 1) release_slot(shared.ring, use);
      if (last_pass && maps.resident) release_slot(shared.a_ring, count * Shape::kSlots + j);
    }
  }

  /// Whether some of this consumer's rows see some of the pass's keys.
  DEVICE_FUNCTION bool sees(const OutTile& t, int pass) const {
    const int row = t.row0 + consumer * kBoxRows;
    return kReverse ? t.key(pass) >= row : t.key(pass) <= row;
  }

  /// O += P X over the pass's keys.
  DEVICE_FUNCTION void multiply_values(const OutTile& t, int pass, bool sees, Fragments& weights) {
    shared.ring.wait(use);
    auto& x = shared.slots[shared.ring.slot(use)].x;
    const int left = t.tokens - t.key(pass);
    if (p.chunks.cu_seqlens != nullptr && left < kBlockTokens) {
      clear_rows(x, left);
      meet_consumers();
    }
    if (sees) {
#pragma unroll
      for (int j = 0; j < kBlockTokens / 16; ++j) prim::fence_registers(weights[j]);
      prim::fence_registers(o);
      prim::wgmma_fence();
      multiply_fragments<Shape::kColumns, true>(o, weights, strips_of(x));
      prim::wgmma_commit();
      prim::wgmma_wait<0>();
      prim::fence_registers(o);
    }
    release_slot(shared.ring, use++);
  }

  // Rows ---------------------------------------------------------------------------------------------------------------
  // A thread has rows row_of(half) of the tile; register v of O is row row_of(v / 2 % 2), column 8 (v / 4) + 2 (lane % 4)
  // + v % 2.

  DEVICE_FUNCTION int row_of(int half) const {
    const int thread = thread_here() % 128;
    return kBoxRows * consumer + 16 * (thread / 32) + 8 * half + thread % 32 / 4;
  }
  DEVICE_FUNCTION typename Shape::template Gates<Shape::kRows>& row_gates() const {
    return shared.rows[shared.row_ring.slot(count)];
  }

  /// O = outer weight * (A S [+ z n]); the row sums begin with w q . n.
  DEVICE_FUNCTION void scale_rows(const OutTile& t) {
    float outer[2], z[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const GateRecord& r = row_gates().records[row];
      outer[half] = kReverse ? r.u : r.w;
      z[half] = !with_n() ? 0.0F : kUse == Use::kDq ? row_gates().z[row] : 1.0F;
      // One lane of the four that share a row.
      row_sum[half] = with_product() && lane_here() % 4 == 0 ? outer[half] * row_sum[half] : 0.0F;
    }
    const float* const n = p.state_n + (int64_t{t.head} * p.chunks.slots + t.slot) * padded(p.dqk);
    const int first = t.col0 + 2 * (lane_here() % 4);
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 8; ++i) {
      const int col = first + 8 * i;
      float add[2] = {0, 0};
      if (with_n() && col < padded(p.dqk)) {
        add[0] = n[col];
        add[1] = n[col + 1];
      }
#pragma unroll
      for (int v = 0; v < 4; ++v)
        o[4 * i + v] = outer[v / 2] * (o[4 * i + v] + z[v / 2] * add[v % 2]);
    }
  }

  /// What the weight of a key in a row takes from the row and from the key.
  struct Side {
    float exponent, rest, z;
    int start;
  };
  template <bool kLater, class Gates>  // of the two tokens
  DEVICE_FUNCTION Side side_of(const Gates& gates, int i, bool with_z) const {
    const GateRecord& r = gates.records[i];
    const float z = with_z && with_n() ? gates.z[i] : 0.0F;
    if constexpr (kLater) return {r.peak, r.peak_rest, z, r.start};
    return {r.alpha, r.alpha_rest, z, 0};
  }

  /// P = mask(scores * D) * scale of the pass's keys as fragments; forward also the sums of its rows.
  DEVICE_FUNCTION void find_weights(const OutTile& t, int pass, Fragments& weights) {
    const auto& keys = shared.keys[shared.ring.slot(use - 1)];
    Side rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows[half] = side_of<!kReverse>(row_gates(), row_of(half), kUse == Use::kDq);
    const int row0 = t.row0 + row_of(0), pair = 2 * (lane_here() % 4), key0 = t.key(pass);
#pragma unroll
    for (int i = 0; i < kBlockTokens / 8; ++i) {
      const int key = 8 * i + pair;
      const Side near = side_of<kReverse>(keys, key, kUse == Use::kDk),
                 far = side_of<kReverse>(keys, key + 1, kUse == Use::kDk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const s = &scores[4 * i + 2 * half];
        const float low = weight(s[0], rows[half], row0 + 8 * half, near, key0 + key);
        const float high = weight(s[1], rows[half], row0 + 8 * half, far, key0 + key + 1);
        weights[i / 2][2 * (i % 2) + half] = prim::pack_bf16x2(low, high);
        if constexpr (kUse == Use::kH) row_sum[half] += low + high;
      }
    }
  }

  /// Selects 0 where a reset or the mask lies between: the score or the exponential may be infinite or NaN there.
  DEVICE_FUNCTION float weight(float score, const Side& row, int t, const Side& key, int s) const {
    const Side &later = kReverse ? key : row, &earlier = kReverse ? row : key;
    const int last = kReverse ? s : t, first = kReverse ? t : s;
    const float d = prim::ex2((earlier.exponent - later.exponent) + (earlier.rest - later.rest));
    const bool counts = first <= last && first >= later.start && d != 0;
    return counts ? (score + (kUse == Use::kDq   ? row.z
                              : kUse == Use::kDk ? key.z
                                                 : 0.0F)) *
                        p.scale * d
                  : 0.0F;
  }

  // Results ------------------------------------------------------------------------------------------------------------

  static DEVICE_FUNCTION float quad_sum(float x) {
    x += prim::float_of(prim::shfl_xor(prim::bits_of(x), 1));
    return x + prim::float_of(prim::shfl_xor(prim::bits_of(x), 2));
  }

  /// Row dots of the tile's columns.
  DEVICE_FUNCTION void add_dots(const OutTile& t) {
    float sums[2] = {};
#pragma unroll
    for (int part = 0; part < Shape::kColumns / Shape::kDotColumns; ++part) {
      if (!has_column<Shape>(t, p, t.col0 + part * Shape::kDotColumns)) continue;
      shared.ring.wait(use);
      auto& dot = shared.slots[shared.ring.slot(use)].dot;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < Shape::kDotColumns / 8; ++i) {
          const float* const x = &o[part * Shape::kDotColumns / 2 + 4 * i + 2 * half];
          const u32 pair = pair_at(dot, row_of(half), 8 * i + 2 * (lane_here() % 4));
          sums[half] += x[0] * low_half(pair) + x[1] * high_half(pair);
        }
      release_slot(shared.ring, use++);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const float sum = quad_sum(sums[half]);
      if (lane_here() % 4 == 0) write_dot(t, row, row < t.rows ? sum : 0.0F);
    }
  }

  /// Readers add up as many numbers as the kernel of sm_80 has tiles, which are more: those beyond the last tile are zero.
  DEVICE_FUNCTION void write_dot(const OutTile& t, int row, float sum) const {
    if (t.row0 + row >= p.chunks.length) return;
    const int64_t all = int64_t{p.chunks.num_heads} * p.chunks.slots * p.chunks.length;
    float* const to = p.dots + t.position(p.chunks, t.row0 + row);
    const int tile = t.col0 / Shape::kColumns;
    to[tile * all] = sum;
    if (t.col0 + Shape::kColumns < p.x.width) return;
    for (int i = tile + 1; i < divide_up(p.x.width, kDotTile); ++i) to[i * all] = 0;
  }

  /// A tile beyond the end of its sequence.
  DEVICE_FUNCTION void clear_dots(const OutTile& t) const {
    const int thread = thread_here() % 128;
    if (thread % 2 == 0) write_dot(t, kBoxRows * consumer + thread / 2, 0);
  }

  /// The normaliser's product; divides O by N.
  DEVICE_FUNCTION void finish_product(const OutTile& t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const float product = quad_sum(row_sum[half]);
      if (p.product != nullptr && t.col0 == 0 && lane_here() % 4 == 0 && row < t.rows) {
        const int64_t token = int64_t{t.batch} * p.chunks.time + t.token0 + t.row0 + row;
        p.product[token * p.chunks.num_heads + t.head] = product;
      }
      if (!p.normalize) continue;
      const float floor = row_gates().records[row].floor;
      const float size = product < 0 ? -product : product;
      const float inverse = prim::rcp((size > floor ? size : floor) + p.eps);
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 8; ++i) {
        o[4 * i + 2 * half] *= inverse;
        o[4 * i + 2 * half + 1] *= inverse;
      }
    }
  }

  DEVICE_FUNCTION void write_out(const OutTile& t) const {
    const int64_t base = token_offset(p.out, t.batch, t.token0 + t.row0, t.head);
    auto* const out = static_cast<u16*>(p.out.data);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const int64_t at = base + row * p.out.time;
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 8; i += 4) {
        Bytes16 piece;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          piece.words[j] =
              prim::pack_bf16x2(o[4 * (i + j) + 2 * half], o[4 * (i + j) + 2 * half + 1]);
        transpose_quad(piece.words);
        const int col = t.col0 + 8 * (i + lane_here() % 4);
        if (row < t.rows) write_piece(out, at, col, piece);
      }
    }
  }

  /// Eight neighbouring columns.
  DEVICE_FUNCTION void write_piece(u16* out, int64_t at, int col, const Bytes16& piece) const {
    if (p.out.vector && col + 8 <= p.out.width) {
      *reinterpret_cast<Bytes16*>(out + at + col) = piece;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < p.out.width) out[at + (col + i) * p.out.inner] = half_bits(piece.words, i);
  }

  const OutParamsSm90& maps;
  const SweepParams& p;
  typename Shape::Shared& shared;
  int consumer;
  int use = 0, count = 0;  // of the ring of the products; tiles so far
  float o[Shape::kColumns / 2], scores[Shape::kKeys / 2];
  float row_sum[2];
};

template <Use kUse, class Shape>
DEVICE_FUNCTION void out_block_sm90(const OutParamsSm90& params) {
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(prim::dynamic_shared());
  prim::require_aligned(&shared, 1024);
  const u32 thread = prim::thread_idx().x;
  if (thread == 0) {
    shared.ring.init();
    shared.a_ring.init();
    shared.row_ring.init();
    prim::fence_mbar_init();
  }
  prim::sync_block();
  const int group = warpgroup_here();
  if (group == 0) {
    prim::set_max_registers_down<Shape::kProducerRegisters>();
    if (thread == 0) OutProducerSm90<kUse, Shape>(params, shared).fill_products();
    if (thread == 32) OutProducerSm90<kUse, Shape>(params, shared).fill_rows();
  } else {
    prim::set_max_registers_up<Shape::kConsumerRegisters>();
    OutConsumerSm90<kUse, Shape>(params, shared, group - 1).run();
  }
}

#endif

template <Use kUse, int kColumns>
KERNEL_FUNCTION(kTwoPhaseSm90Threads, 1)
mlstm_out_sm90(const GRID_CONSTANT OutParamsSm90 p) {
#if PRIM_HAS_SM90A
  out_block_sm90<kUse, OutShapeSm90<kColumns>>(p);
#else
  prim::wgmma_fence();  // traps
#endif
}

}  // namespace xlstm::cuda
