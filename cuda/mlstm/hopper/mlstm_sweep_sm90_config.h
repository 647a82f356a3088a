#pragma once
// Which sm_90a sweep kernels exist and what they need: shared by the kernel, its launchers and the planning code.
#include <cstddef>

#include "cuda/mlstm/hopper/mlstm_launch_sm90.h"
#include "cuda/prim/tensor_map.h"

namespace xlstm::cuda {

struct SweepSm90Params {
  SweepParams sweep;
  prim::TensorMap a, b, x;
};

/// A kernel contracts over up to `contraction` columns of A and B and takes `columns` columns of X per block.
struct SweepSm90Tile {
  int contraction, columns;
};

inline constexpr int kSweepSm90Threads = 384;
/// More than any of the kernels takes.
inline constexpr size_t kSweepSm90SharedBytes = 227 * 1024;

/// Slots of half chunks (64 tokens) in the rings: as many as fit beside the state. A chunk takes four of A and B and two of
/// X; what is left beyond those is loaded ahead.
constexpr int sweep_sm90_ab_slots(const SweepSm90Tile& t) {
  return t.contraction == 64 ? 12 : t.columns == 64 ? 8 : 7;
}
constexpr int sweep_sm90_x_slots(const SweepSm90Tile& t) { return t.columns == 64 ? 6 : 4; }

/// What a block of kDq or kDk leaves at an anchor: the registers of S and n of the threads that have them.
constexpr int sweep_sm90_anchor_numbers(const SweepSm90Tile& t) {
  return t.contraction * t.columns + 4 * t.columns;
}

/// A block of the wide sweep has two of these.
inline constexpr SweepSm90Tile kSweepSm90WideTile = {256, kSweepSm90WideColumns};

/// Launches the kernel of one use.
template <Use kUse>
void launch_sweep_sm90_tile(const SweepSm90Params& p, Stream stream);
/// The same of the wide sweep: kDq or kDk.
template <Use kUse>
void launch_sweep_sm90_wide_tile(const SweepSm90Params& p, Stream stream);

}  // namespace xlstm::cuda
