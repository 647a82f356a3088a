#pragma once
// block_linear as one batched matrix product per call, on any device.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// A kernel would take their addresses as those of its own device.
void check_block_linear_devices(const at::Tensor& x, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias);
void check_block_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias);
/// Of the backward pass.
void check_block_linear_gradient(const at::Tensor& dy, const at::Tensor& x,
                                 const at::Tensor& weight);

at::Tensor block_linear_products(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias);
/// dx, dweight, dbias (empty without); dy in x's dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> block_linear_products_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, bool has_bias);

}  // namespace xlstm::ops
