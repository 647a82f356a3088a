#pragma once
// block_linear as one batched matrix product per call, on any device.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

void check_block_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias);

at::Tensor block_linear_products(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias);
/// dx, dweight, dbias (empty without); dy in x's dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> block_linear_products_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, bool has_bias);

}  // namespace xlstm::ops
