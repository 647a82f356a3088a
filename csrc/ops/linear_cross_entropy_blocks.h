#pragma once
// linear_cross_entropy in blocks of rows on any device: products by ATen, the loss of a block of logits by a function of
// the caller. The host waits for nothing, so that calls can be captured in a CUDA graph.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace xlstm::ops {

/// A kernel would take their addresses as those of its own device.
void check_linear_cross_entropy_devices(const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& target);
void check_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& target, double soft_cap,
                                std::string_view reduction);

struct CrossEntropyBlock {
  at::Tensor logits;      ///< (R,V) float32 or float64, packed; may be overwritten
  at::Tensor targets;     ///< (R) int64, packed
  at::Tensor scale;       ///< of all gradients, one number; undefined: 1
  at::Tensor row_scales;  ///< (R), likewise
  int64_t ignore_index = -100;
  double soft_cap = 0;
  bool gradient = false;         ///< wanted
  at::ScalarType gradient_type;  ///< of it
};
/// The losses (R), zero where ignored and NaN where the target is outside of the vocabulary, and the gradient (R,V) with
/// regard to the logits, scaled; undefined where it is not wanted.
using CrossEntropyBlockFunction =
    std::function<std::pair<at::Tensor, at::Tensor>(const CrossEntropyBlock&)>;

/// By the definition, in ATen calls.
std::pair<at::Tensor, at::Tensor> cross_entropy_block(const CrossEntropyBlock& block);

struct LinearCrossEntropyCall {
  const at::Tensor &x, &weight, &target;
  int64_t ignore_index;
  double soft_cap;
  std::string_view reduction;
  at::Tensor
      row_scales;  ///< of target's shape: gradients of every row's loss; undefined: of the reduced loss
  bool need_dx, need_dweight;
};
/// Loss, dx and dweight in the dtype of accumulation; empty gradients where they are not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_blocks(
    const LinearCrossEntropyCall& call, const CrossEntropyBlockFunction& function);

}  // namespace xlstm::ops
