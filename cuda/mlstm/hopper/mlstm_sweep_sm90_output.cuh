#pragma once
// The output rows of a consuming warpgroup of the sm_90a sweep: weighted, normalised, multiplied with q or k, stored.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_state.cuh"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX, int kConsumer>
class SweepSm90Output : public SweepSm90State<kUse, kDA, kDX, kConsumer> {
 public:
  using Base = SweepSm90State<kUse, kDA, kDX, kConsumer>;
  using Base::Base;

 protected:
  using Base::kLength;
  using Base::kTransposed;
  using Base::outer;
  using Base::own_row;
  using Base::p;
  using Base::place;
  using Base::quad;
  using Base::quad_sum;
  using Base::s;

  using OutTile = float[kDX / 2];
  using DotPieces = Vector16[kTransposed ? 2 : 1][kTransposed ? kDX / 32 : 1];

  DEVICE_FUNCTION const GateRecord* records_at(int i) { return s.records[s.gate_ring.slot(i)]; }
  DEVICE_FUNCTION const float* z_at(int i) { return s.z[s.gate_ring.slot(i)]; }
  /// This thread's row in the chunk.
  DEVICE_FUNCTION int row_of(int half) const { return 64 * kConsumer + own_row(half); }

  /// out = outer (A S + z n)
  DEVICE_FUNCTION void scale_rows(int i, OutTile& out) {
    const GateRecord* records = records_at(i);
    const float factors[2] = {outer(records[row_of(0)]), outer(records[row_of(1)])};
    float z[2] = {1, 1};
    if constexpr (kUse == Use::kDq) z[0] = z_at(i)[row_of(0)], z[1] = z_at(i)[row_of(1)];
#pragma unroll
    for (int v = 0; v < kDX / 2; ++v) {
      if constexpr (kTransposed) out[v] += z[v / 2 % 2] * s.n[v / 4 * 8 + 2 * quad + v % 2];
      out[v] *= factors[v / 2 % 2];
    }
  }

  /// Divides the rows by N; column tile 0 writes the product.
  DEVICE_FUNCTION void normalize(int i, OutTile& out, const float (&sums)[2]) {
    // Where exp(-m) underflows and q is zero, h is zero and not 0 / 0.
    constexpr float kSmallest = 1.17549435e-38F;
    const int rows = this->rows_at(i);
    const int64_t token =
        static_cast<int64_t>(place.range.batch) * p.chunks.time + this->token_at(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const float product = quad_sum(sums[half]);
      if (p.product != nullptr && place.tile == 0 && quad == 0 && row < rows)
        p.product[(token + row) * p.chunks.num_heads + place.head] = product;
      if (!p.normalize) continue;
      const float norm =
          fmaxf(fmaxf(product < 0 ? -product : product, records_at(i)[row].floor), kSmallest) +
          p.eps;
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
    return token_offset(x, place.range.batch, this->token_at(i), place.head) + place.tile * kDX;
  }

  /// Of q or k, under way while the products are.
  DEVICE_FUNCTION void load_dots(int i, DotPieces& pieces) const {
    const bf16* data = static_cast<const bf16*>(p.dot.data) + offset_of(p.dot, i);
    const int rows = this->rows_at(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
#pragma unroll
      for (int j = 0; j < kDX / 32; ++j) {
        const int col = 32 * j + 8 * quad;
        pieces[half][j] = {};
        if (row < rows && col < place.columns)
          pieces[half][j] = *reinterpret_cast<const Vector16*>(data + row * p.dot.time + col);
      }
    }
  }

  /// <out, q> or <out, k> of every row, before out is rounded.
  DEVICE_FUNCTION void write_dots(int i, OutTile& out, DotPieces& pieces) {
    const int rows = this->rows_at(i);
    const int64_t tiles_before =
        static_cast<int64_t>(place.tile) * p.chunks.num_heads * p.chunks.slots;
    float* to = p.dots + (tiles_before + this->slot_at(i)) * kLength;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kDX / 32; ++j) {
        u32(&words)[4] = pieces[half][j].words;
        exchange_in_quad(words);
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
        Vector16 piece;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int v = 4 * (4 * j + m) + 2 * half;
          piece.words[m] = prim::pack_bf16x2(out[v], out[v + 1]);
        }
        exchange_in_quad(piece.words);
        const int col = 32 * j + 8 * quad;
        if (row >= rows || col >= place.columns) continue;
        *reinterpret_cast<Vector16*>(data + row * p.out.time + col) = piece;
      }
    }
  }
};

}  // namespace xlstm::cuda
