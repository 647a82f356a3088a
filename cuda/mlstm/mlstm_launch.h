#pragma once
// One launcher per mLSTM kernel. What a kernel does: its params struct in mlstm_params.h.
#include "cuda/mlstm/mlstm_params.h"

namespace xlstm::cuda {

void launch_gates(const GatesParams& params, Stream stream);
void launch_prep(const PrepParams& params, Stream stream);
void launch_segment_scan(const SegmentScanParams& params, Stream stream);
void launch_gate_gradients(const GateGradientParams& params, Stream stream);
void launch_step(const StepParams& params, Stream stream);

/// Whether a fused sweep over this contraction width exists for the device, and how many columns of X a block takes.
bool sweep_covers(int contraction, Dtype dtype, const DeviceLimits& device);
int sweep_tile_columns(int contraction, int columns, Dtype dtype, const DeviceLimits& device);
/// float32 numbers that a block of kDq or kDk leaves per anchor.
int sweep_anchor_numbers(int contraction, int columns, Dtype dtype, const DeviceLimits& device);
void launch_sweep(Use use, const SweepParams& params, const DeviceLimits& device, Stream stream);

/// Columns of X that a block of the out kernel takes.
int out_tile_columns(Dtype dtype, const DeviceLimits& device);
void launch_state(const StateParams& params, const DeviceLimits& device, Stream stream);
void launch_anchors(const AnchorParams& params, Stream stream);
/// float32 numbers that a head's state takes at an anchor, for launch_anchors.
int anchor_numbers(int dqk, int dv, int planes);
void launch_out(Use use, const SweepParams& params, const DeviceLimits& device, Stream stream);

}  // namespace xlstm::cuda
