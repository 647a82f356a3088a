#pragma once
// xlstm::selective_scan in ATen calls, for devices without a kernel.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// The operators' own order.
struct SelectiveScanArguments {
  const at::Tensor &x, &delta, &a, &b, &c, &skip;
  const std::optional<at::Tensor>&state0, &reset;
};

/// Tokens whose states are held at once.
constexpr int64_t kSelectiveScanBlock = 64;

std::tuple<at::Tensor, at::Tensor> selective_scan_generic(const SelectiveScanArguments& in,
                                                          int64_t block = kSelectiveScanBlock);

/// From the inputs alone: the states at the borders of blocks again, then block by block, the last one first. Held at any
/// time are those states and a few tensors of the size of a block's.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
selective_scan_generic_backward(const std::optional<at::Tensor>& dy,
                                const std::optional<at::Tensor>& dstate,
                                const SelectiveScanArguments& in,
                                int64_t block = kSelectiveScanBlock);

}  // namespace xlstm::ops
