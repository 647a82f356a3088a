#pragma once
// The output rows of a consuming warpgroup of the sm_90a sweep: weighted, normalised, multiplied with q or k, stored.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_state.cuh"

namespace xlstm::cuda {

template <class Block, int kConsumer = 0>
class SweepSm90Output : public SweepSm90State<Block, kConsumer> {
 public:
  using Base = SweepSm90State<Block, kConsumer>;
  using Base::Base;
  static constexpr Use kUse = Block::kOfUse;

 protected:
  using Base::column;
  using Base::columns;
  using Base::kDX;
  using Base::kLength;
  using Base::kOwnColumns;
  using Base::kReverse;
  using Base::kTransposed;
  using Base::outer;
  using Base::p;
  using Base::place;
  using Base::quad;
  using Base::quad_sum;
  using Base::row_of;
  using Base::s;
  using Base::tile;

  using OutTile = float[kDX / 2];
  using ScoreTile = float[32];
  using Fragments = u32[4][4];
  using DotPieces = Bytes16[kTransposed ? 2 : 1][kTransposed ? kDX / 32 : 1];

  DEVICE_FUNCTION const GateRecord* records_at(int i) { return s.records[s.gate_ring.slot(i)]; }
  DEVICE_FUNCTION const float* z_at(int i) { return s.z[s.gate_ring.slot(i)]; }

  /// P = scale (scores + z) D of the 64 tokens from `first` on, as the A operand of P X; with kH also its row sums.
  DEVICE_FUNCTION void finish_scores(int i, int first, ScoreTile& scores, Fragments& fragments,
                                     float (&sums)[2]) {
    const GateRecord* records = records_at(i);
    const float* z = z_at(i);
    const int rows[2] = {row_of(0), row_of(1)};
    const GateRecord gates[2] = {records[rows[0]], records[rows[1]]};
    float z_row[2] = {};
    if constexpr (kUse == Use::kDq) z_row[0] = z[rows[0]], z_row[1] = z[rows[1]];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      if (t % 2 == 0) prim::sync_warp();  // keeps the compiler from loading all records at once
      const int col = first + 8 * t + 2 * quad;
      const GateRecord others[2] = {records[col], records[col + 1]};
      float z_column[2] = {};
      if constexpr (kUse == Use::kDk) z_column[0] = z[col], z_column[1] = z[col + 1];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float values[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float d = kReverse ? decay(others[e], col + e, gates[r], rows[r])
                                   : decay(gates[r], rows[r], others[e], col + e);
          values[e] = (scores[4 * t + 2 * r + e] + z_row[r] + z_column[e]) * (p.scale * d);
          if constexpr (kUse == Use::kH) sums[r] += values[e];
        }
        fragments[t / 2][t % 2 * 2 + r] = prim::pack_bf16x2(values[0], values[1]);
      }
    }
  }

  /// Operands in registers: made before the wgmma_fence, not used again before the wait.
  static DEVICE_FUNCTION void keep(Fragments& fragments) {
#pragma unroll
    for (int j = 0; j < 4; ++j) prim::fence_registers(fragments[j]);
  }

  /// out = outer (A S + z n)
  DEVICE_FUNCTION void scale_rows(int i, OutTile& out) {
    const GateRecord* records = records_at(i);
    const float factors[2] = {outer(records[row_of(0)]), outer(records[row_of(1)])};
    float z[2] = {1, 1};
    if constexpr (kUse == Use::kDq) z[0] = z_at(i)[row_of(0)], z[1] = z_at(i)[row_of(1)];
#pragma unroll
    for (int v = 0; v < kDX / 2; ++v) {
      if constexpr (kTransposed)
        out[v] += z[v / 2 % 2] * this->published_n(this->consumer)[v / 4 * 8 + 2 * quad + v % 2];
      out[v] *= factors[v / 2 % 2];
    }
  }

  /// Divides the rows by N; column tile 0 writes the product.
  DEVICE_FUNCTION void normalize(int i, OutTile& out, const float (&sums)[2]) {
    const int rows = this->rows_at(i);
    const int64_t token =
        static_cast<int64_t>(place.range.batch) * p.chunks.time + this->token_at(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const float product = quad_sum(sums[half]);
      if (p.product != nullptr && column() == 0 && quad == 0 && row < rows)
        p.product[(token + row) * p.chunks.num_heads + place.head] = product;
      if (!p.normalize) continue;
      const float norm = fmaxf(product < 0 ? -product : product, records_at(i)[row].floor) + p.eps;
      const float factor = 1.0F / norm;
#pragma unroll
      for (int v = 2 * half; v < kDX / 2; v += 4) {
        out[v] *= factor;
        out[v + 1] *= factor;
      }
    }
  }

  // Rows are accessed in pieces of 16 bytes: lane t of a quad has piece t of 32 columns, which the quad exchanges for the
  // two columns of each piece that its accumulators hold.
  DEVICE_FUNCTION int64_t offset_of(const Operand& x, int i) const {
    return token_offset(x, place.range.batch, this->token_at(i), place.head) + column();
  }

  /// Of q or k, under way while the products are.
  DEVICE_FUNCTION void load_dots(int i, DotPieces& pieces) {
    this->forget_addresses();
    const bf16* data = static_cast<const bf16*>(p.dot.data) + offset_of(p.dot, i);
    const int rows = this->rows_at(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
#pragma unroll
      for (int j = 0; j < kDX / 32; ++j) {
        const int col = 32 * j + 8 * quad;
        pieces[half][j] = {};
        if (row < rows && col < columns())
          pieces[half][j] = *reinterpret_cast<const Bytes16*>(data + row * p.dot.time + col);
      }
    }
  }

  /// <out, q> or <out, k> of every row, before out is rounded.
  DEVICE_FUNCTION void write_dots(int i, OutTile& out, DotPieces& pieces) {
    if (kOwnColumns && columns() <= 0) return;
    const int rows = this->rows_at(i);
    const int64_t tiles_before = static_cast<int64_t>(tile()) * p.chunks.num_heads * p.chunks.slots;
    float* to = p.dots + (tiles_before + this->slot_at(i)) * kLength;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kDX / 32; ++j) {
        u32(&words)[4] = pieces[half][j].words;
        transpose_quad(words);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int v = 4 * (4 * j + m) + 2 * half;
          sum += out[v] * low_half(words[m]) + out[v + 1] * high_half(words[m]);
        }
      }
      sum = quad_sum(sum);
      const int row = row_of(half);
      if (quad == 0) to[row] = row < rows ? sum : 0.0F;
    }
  }

  DEVICE_FUNCTION void store(int i, OutTile& out) const {
    bf16* data = static_cast<bf16*>(p.out.data) + offset_of(p.out, i);
    const int rows = this->rows_at(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
#pragma unroll
      for (int j = 0; j < kDX / 32; ++j) {
        Bytes16 piece;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int v = 4 * (4 * j + m) + 2 * half;
          piece.words[m] = prim::pack_bf16x2(out[v], out[v + 1]);
        }
        transpose_quad(piece.words);
        const int col = 32 * j + 8 * quad;
        if (row >= rows || col >= columns()) continue;
        *reinterpret_cast<Bytes16*>(data + row * p.out.time + col) = piece;
      }
    }
  }
};

}  // namespace xlstm::cuda
