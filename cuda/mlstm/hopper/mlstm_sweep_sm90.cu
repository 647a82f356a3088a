// Which problems the sm_90a sweep takes, and its launch. Compiled by nvcc: tensor maps are the driver's.
#include <stdexcept>

#include "cuda/mlstm/hopper/mlstm_maps_sm90.h"
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_config.h"

namespace xlstm::cuda {

bool sweep_sm90_covers(int contraction, Dtype dtype, const DeviceLimits& device) {
  return contraction <= 128 && dtype == Dtype::kBFloat16 && device.compute_capability == 90 &&
         device.shared_bytes >= kSweepSm90SharedBytes;
}

bool sweep_sm90_wide_covers(int contraction, Dtype dtype, const DeviceLimits& device) {
  return contraction <= kSweepSm90WideTile.contraction && sweep_sm90_covers(0, dtype, device);
}

int sweep_sm90_tile_columns(int columns) { return columns <= 64 ? 64 : 128; }

int sweep_sm90_anchor_numbers(int contraction, int columns) {
  return sweep_sm90_anchor_numbers(
      {contraction <= 64 ? 64 : 128, sweep_sm90_tile_columns(columns)});
}

int sweep_sm90_wide_anchor_numbers() { return sweep_sm90_anchor_numbers(kSweepSm90WideTile); }

bool sweep_sm90_takes(const SweepParams& p) {
  const auto whole_pieces = [](const Operand& x) {
    return x.dtype == Dtype::kBFloat16 && x.vector && x.width % 8 == 0;
  };
  return tensor_map_covers(p.a, p.chunks) && tensor_map_covers(p.b, p.chunks) &&
         tensor_map_covers(p.x, p.chunks) && whole_pieces(p.out) &&
         (p.dots == nullptr || whole_pieces(p.dot));
}

void launch_sweep_sm90(Use use, const SweepParams& params, const DeviceLimits& device,
                       Stream stream) {
  const bool wide = params.chunks.length == kSweepSm90WideLength;
  const auto covers = wide ? sweep_sm90_wide_covers : sweep_sm90_covers;
  if (!covers(params.a.width, params.x.dtype, device) || !sweep_sm90_takes(params) ||
      (wide ? use != Use::kDq && use != Use::kDk : params.chunks.length != kSweepSm90Length))
    throw std::runtime_error("mlstm_sweep_sm90: no kernel for this problem");
  SweepSm90Params p;
  p.sweep = params;
  p.a = operand_tensor_map(params.a, params.chunks);
  p.b = operand_tensor_map(params.b, params.chunks);
  p.x = operand_tensor_map(params.x, params.chunks);
  if (wide)
    return (use == Use::kDq ? launch_sweep_sm90_wide_tile<Use::kDq>
                            : launch_sweep_sm90_wide_tile<Use::kDk>)(p, stream);
  switch (use) {
    case Use::kH:
      return launch_sweep_sm90_tile<Use::kH>(p, stream);
    case Use::kDv:
      return launch_sweep_sm90_tile<Use::kDv>(p, stream);
    case Use::kDq:
      return launch_sweep_sm90_tile<Use::kDq>(p, stream);
    case Use::kDk:
      return launch_sweep_sm90_tile<Use::kDk>(p, stream);
  }
}

}  // namespace xlstm::cuda
