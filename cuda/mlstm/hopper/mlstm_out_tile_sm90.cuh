#pragma once
// Shared memory of the out kernel for sm_90a, and which tiles a block takes.
#include <cstddef>

#include "cuda/mlstm/hopper/mlstm_twophase_sm90.cuh"

namespace xlstm::cuda {

struct OutParamsSm90 {
  SweepParams out;
  prim::TensorMap a, b, x, dot, state;
  int32_t tiles;   ///< of the whole launch
  int32_t slices;  ///< of 64 of the contraction
  bool resident;   ///< all slices of A stay in shared memory: at most kSlots of the shape
};

PRIM_FUNCTION constexpr bool out_reverse(Use use) { return use == Use::kDv || use == Use::kDk; }
PRIM_FUNCTION constexpr bool out_transposed(Use use) {
  return use == Use::kDq || use == Use::kDk;
}  // the state is

/// kCols: columns of X that a tile has, 256 or 192.
template <int kCols>
struct OutShapeSm90 {
  static constexpr int kRows = 128, kColumns = kCols, kKeys = kBlockTokens, kSlots = 4;
  static constexpr u32 kProducerRegisters = 40,
                       kConsumerRegisters = 232;  // a tile's numbers need more than 24
  static constexpr int kDotColumns = kCols % 128 == 0 ? 128 : 64;  // of the dot operand in a slot

  union Slot {
    StripTile<kBlockTokens, kColumns> x;  // X [key][column], or the state [contraction][column]
    StripTile<kColumns, 64> state;        // [column][contraction]
    StripTile<kKeys, 64> b;
    StripTile<kRows, kDotColumns> dot;
  };
  template <int kTokens>
  struct Gates {
    GateRecord records[kTokens];
    float z[kTokens];
  };
  struct Shared {
    Slot slots[kSlots];
    StripTile<kRows, 64> a[kSlots];  // slice j where A is resident, else of the ring's slot
    Gates<kKeys> keys[kSlots];       // with the last slice of a pass
    Gates<kRows> rows[2];
    float n[kSlots][64];
    Ring<kSlots, kConsumerWarps> ring, a_ring;  // use of a_ring: kSlots * tile + slice
    Ring<2, kConsumerWarps> row_ring;           // use: tile
  };
};
/// 128 rows of a chunk by kColumns columns.
struct OutTile {
  int col0, row0, head, slot;
  int batch, token0, tokens;  // of the chunk
  int rows;                   // of the chunk from row0 on; none: nothing to do
  int first_key, passes;      // of 64 keys

  DEVICE_FUNCTION int key(int pass) const { return first_key + pass * kBlockTokens; }
  DEVICE_FUNCTION int64_t position(const Chunks& c, int in_chunk) const {
    return (int64_t{head} * c.slots + slot) * c.length + in_chunk;
  }
};

/// The tiles of this block, one after the other. Those of one chunk are neighbours, so that blocks share its operands in
/// the second-level cache.
template <Use kUse, class Shape>
class OutTiles {
 public:
  DEVICE_FUNCTION explicit OutTiles(const OutParamsSm90& params)
      : p(params), index(static_cast<int>(prim::block_idx().x)) {}

  /// False: no more. Leaves out tiles of slots that hold no chunk.
  DEVICE_FUNCTION bool next() {
    constexpr bool kReverse = out_reverse(kUse);
    for (; index < p.tiles; index += static_cast<int>(prim::grid_dim().x)) {
      const Chunks& c = p.out.chunks;
      const int columns = divide_up(p.out.x.width, Shape::kColumns);
      const int row_tiles = divide_up(c.length, Shape::kRows);
      int rest = index;
      tile.col0 = rest % columns * Shape::kColumns;
      rest /= columns;
      tile.row0 = rest % row_tiles * Shape::kRows;
      rest /= row_tiles;
      tile.head = rest % c.num_heads;
      tile.slot = rest / c.num_heads;
      const SlotRange at = slot_at(c, tile.slot);
      if (!at.used) continue;
      tile.batch = at.sequence.batch;
      tile.token0 = at.sequence.begin + at.chunk * c.length;
      const int left = at.sequence.length - at.chunk * c.length;
      tile.tokens = left < c.length ? left : c.length;
      tile.rows = tile.tokens - tile.row0;
      const int end = tile.row0 + Shape::kRows;
      tile.first_key = kReverse ? tile.row0 : 0;
      tile.passes = divide_up(kReverse || end > tile.tokens ? tile.tokens - tile.first_key : end,
                              kBlockTokens);
      index += static_cast<int>(prim::grid_dim().x);
      return true;
    }
    return false;
  }

  OutTile tile;

 private:
  const OutParamsSm90& p;
  int index;
};

}  // namespace xlstm::cuda
