#pragma once
// The output rows of a block of the sweep: weighted, normalised, multiplied with q or k, stored.
#include "cuda/mlstm/mlstm_sweep_state.cuh"

namespace xlstm::cuda {

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

template <Use kUse, int kDA, int kDX, int kPlanes>
class SweepOutput : public SweepState<kUse, kDA, kDX, kPlanes> {
 public:
  using Base = SweepState<kUse, kDA, kDX, kPlanes>;
  using Base::Base;
  using typename Base::Stage;

 protected:
  using Base::columns;
  using Base::head;
  using Base::kOutTiles;
  using Base::kTransposed;
  using Base::out_column;
  using Base::out_row;
  using Base::outer;
  using Base::p;
  using Base::publish_sums;
  using Base::quad;
  using Base::range;
  using Base::rows_at;
  using Base::s;
  using Base::slot_at;
  using Base::thread;
  using Base::tile;
  using Base::token_at;
  using Base::warp;

  using OutTile = float[2][kOutTiles][4];
  using DotTile = Pair<kPlanes>[2][kOutTiles][2];

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
        const float norm = fmaxf(product < 0 ? -product : product, floor) + p.eps;
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
        Bytes16 piece;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int t = j % kPerRow, half = first + j / kPerRow;
          piece.words[j] = prim::pack_bf16x2(out[m][t][2 * half], out[m][t][2 * half + 1]);
        }
        transpose_quad(piece.words);
        const int row = out_row(m, first + quad / kPerRow);
        const int col = warp % 4 * (kDX / 4) + 8 * (quad % kPerRow);
        if (row >= rows || col >= columns) continue;
        bf16* to = data + base + row * p.out.time + col;
        if (columns - col >= 8) {
          *reinterpret_cast<Bytes16*>(to) = piece;
          continue;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < columns - col) to[e].bits = half_bits(piece.words, e);
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
};

}  // namespace xlstm::cuda
