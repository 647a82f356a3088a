#pragma once
// Shared by the state and out kernels for sm_90a: a warpgroup that loads (24 registers per thread) and two that multiply
// (240 each), and what these do with a tile besides multiplying.
#include "cuda/mlstm/hopper/mlstm_tiles_sm90.cuh"
#include "cuda/mlstm/mlstm_twophase.cuh"

namespace xlstm::cuda {

constexpr int kTwoPhaseSm90Threads = 384, kConsumers = 2, kConsumerWarps = 8;
constexpr u32 kProducerRegisters = 24, kConsumerRegisters = 240;

/// Loads one box of a state: 64 rows and columns of matrix `matrix`.
DEVICE_FUNCTION void load_state_box(unsigned char* to, const prim::TensorMap& map, int row, int col,
                                    int matrix, u64* bar) {
  prim::tma_load_3d(to, map, col, row, matrix, bar);
}

/// A warp has read all it wants of a slot. The fence orders its ordinary reads before the copies that follow.
template <class AnyRing>
DEVICE_FUNCTION void release_slot(AnyRing& ring, int use) {
  prim::fence_proxy_async();
  prim::sync_warp();
  ring.release(use);
}

/// Packed sequences: rows beyond a sequence's end are those of the next one, whose numbers may be infinite; 0 times them is
/// NaN. The first so many consumers call this on a tile of tokens: each clears its share.
template <int kCols>
DEVICE_FUNCTION void clear_rows(StripTile<kBoxRows, kCols>& tile, int first,
                                int consumers = kConsumers) {
  constexpr int kPieces = kCols / 8;
  const int thread = static_cast<int>(prim::thread_idx().x) - 128;
  for (int i = first * kPieces + thread; i < kBoxRows * kPieces; i += 128 * consumers)
    *reinterpret_cast<Bytes16*>(tile.piece(i / kPieces, i % kPieces * 8)) = {};
}
/// After clear_rows: what was written is seen by all products.
DEVICE_FUNCTION void meet_consumers(int consumers = kConsumers) {
  prim::fence_proxy_async();
  prim::named_sync(1, 128 * static_cast<u32>(consumers));
}

/// Two neighbouring numbers of a tile (col even).
template <int kRows, int kCols>
DEVICE_FUNCTION u32 pair_at(StripTile<kRows, kCols>& tile, int row, int col) {
  return *reinterpret_cast<const u32*>(tile.piece(row, col) + col % 8 * 2);
}

}  // namespace xlstm::cuda
