#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace xlstm::ops {

/// Bytes of a row of a matrix of 8 bits: its integers, padded to a multiple of 16, and its scale.
constexpr int64_t int8_row_bytes(int64_t in_features) { return (in_features + 15) / 16 * 16 + 16; }

/// A matrix (O,I), floating, with each row rounded to 8 bits: (O,R) int8, R = int8_row_bytes(I). A row holds its I
/// integers from -127 to 127, zeros, and in its last 16 bytes its scale, max |weight| / 127, as float32 and I as int32:
/// weight[o,i] is integer * scale to half a step. One tensor is thus the whole weight, which moves, is copied and stored as any other.
/// A row without a number of at least 1.5e-36 is kept as zeros. Throws where a row holds inf or NaN.
at::Tensor quantize_int8(const at::Tensor& weight);

/// quantize_int8 of zeros (out_features,in_features), which need not be there: memory for a matrix that is yet to be loaded.
at::Tensor zeros_int8(int64_t out_features, int64_t in_features, at::Device device);

/// What quantize_int8 kept of a matrix with in_features = I columns: weight (O,R) int8 -> (O,I) in a floating dtype.
at::Tensor dequantize_int8(const at::Tensor& weight, int64_t in_features,
                           at::ScalarType dtype = at::kFloat);

/// Linear map with a matrix of 8 bits: x (...,I), weight (O,R) int8 of quantize_int8, bias (O) -> (...,O) in x's dtype,
/// y[...,o] = scale[o] sum_i weight[o,i] x[...,i] + bias[o]. Few rows of x (up to 16) read the integers and add in float32,
/// which for one row takes the time of reading a quarter of float32's bytes; many multiply by dequantize_int8 in x's dtype.
/// In the first case sums of integers with numbers beyond 1e36 overflow. Gradients are those of x and bias.
at::Tensor linear_int8(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias = {});

}  // namespace xlstm::ops
