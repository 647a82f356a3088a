#pragma once
// Launchers of the sm_90a kernels: wgmma, tensor copies, warps that only load. They take bfloat16 operands that the copy
// engine can read; everything else keeps the kernels of mlstm_launch.h.
#include "cuda/mlstm/mlstm_params.h"

namespace xlstm::cuda {

/// The chunk length L of the sweep; gate records, dots and z are laid out by it.
inline constexpr int kSweepSm90Length = 128;
/// The same of the wide sweep, which serves kDq and kDk.
inline constexpr int kSweepSm90WideLength = 64;
inline constexpr int kSweepSm90WideColumns = 64;  ///< of X in a tile

/// Whether a sweep contracts over so many columns of that type on the device. Says nothing of DeviceLimits::hopper.
bool sweep_sm90_covers(int contraction, Dtype dtype, const DeviceLimits& device);
/// The same of the wide sweep.
bool sweep_sm90_wide_covers(int contraction, Dtype dtype, const DeviceLimits& device);
/// Columns of X that a block takes, of `columns` in all.
int sweep_sm90_tile_columns(int columns);
/// float32 numbers that a block of kDq or kDk leaves per anchor.
int sweep_sm90_anchor_numbers(int contraction, int columns);
/// The same of a tile of the wide sweep.
int sweep_sm90_wide_anchor_numbers();
/// As launch_sweep, by the wide sweep where chunks have kSweepSm90WideLength tokens and else by the other, for chunks of
/// kSweepSm90Length. The operands pass sweep_sm90_takes.
void launch_sweep_sm90(Use use, const SweepParams& params, const DeviceLimits& device,
                       Stream stream);
/// Whether the operands are such that the copy engine can load A, B and X, and rows of the others consist of whole pieces of
/// 16 bytes.
bool sweep_sm90_takes(const SweepParams& params);

}  // namespace xlstm::cuda
