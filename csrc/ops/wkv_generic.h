#pragma once
// xlstm::wkv in ATen calls, for devices without a kernel.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// Exponent of a state that holds nothing.
constexpr double kWkvEmpty = -1e38;

/// The operators' own order.
struct WkvArguments {
  const at::Tensor &k, &v, &w, &u;
  const std::optional<at::Tensor>&a0, &b0, &p0, &reset;
};

/// Tokens whose states are held at once: a token's are as large as what is known of it.
constexpr int64_t kWkvBlock = 256;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv_generic(const WkvArguments& in,
                                                                       int64_t block = kWkvBlock);

/// From the inputs alone: the states at the borders of blocks again, then block by block, the last one first.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
wkv_generic_backward(const std::optional<at::Tensor>& dy, const std::optional<at::Tensor>& da,
                     const std::optional<at::Tensor>& db, const WkvArguments& in,
                     int64_t block = kWkvBlock);

}  // namespace xlstm::ops
