#pragma once
// Which sweep kernels exist and what they need: shared by the kernel, its launchers and the planning code.
#include <cstddef>

#include "cuda/mlstm/mlstm_params.h"

namespace xlstm::cuda {

/// A sweep kernel contracts over up to `contraction` columns of A and B and takes `columns` columns of X per block.
struct SweepTile {
  int contraction, columns, planes;

  constexpr bool operator==(const SweepTile& other) const {
    return contraction == other.contraction && columns == other.columns && planes == other.planes;
  }
};

/// By rising cost; a problem takes the first that fits.
inline constexpr SweepTile kSweepTiles[] = {
    {64, 64, 1},   {64, 128, 1}, {128, 64, 1},
    {128, 128, 1}, {256, 64, 1},  // the state is as large as that of (128, 128)
    {64, 64, 2},   {128, 64, 2},
};

/// Shared memory of one stage (A, B, X, records, z of a chunk) and of everything else (state, P, vectors).
constexpr size_t sweep_stage_bytes(const SweepTile& t) {
  return size_t{64} * 2 * t.planes * (2 * t.contraction + t.columns) +
         64 * (sizeof(GateRecord) + 4);
}
constexpr size_t sweep_fixed_bytes(const SweepTile& t) {
  const size_t vector = t.contraction * 16 > t.columns * 4 ? t.contraction * 16 : t.columns * 4;
  return size_t{2} * t.planes * (t.contraction * t.columns + 64 * 64) + 8 * 64 * 2 + 64 * 16 +
         vector;
}
constexpr size_t sweep_shared_bytes(const SweepTile& t, int stages) {
  return sweep_fixed_bytes(t) + stages * sweep_stage_bytes(t);
}

/// What a block of kDq or kDk leaves at an anchor: the registers of S and n of its 256 threads.
constexpr int sweep_anchor_numbers(const SweepTile& t) {
  return t.contraction * t.columns + 8 * t.columns;
}

/// Launches the kernel of one use; p.stages says how many stages the block's shared memory holds.
template <Use kUse>
void launch_sweep_tile(const SweepTile& tile, const SweepParams& p, Stream stream);

}  // namespace xlstm::cuda
