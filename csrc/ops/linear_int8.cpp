// Matrices of 8 bits: quantize_int8, dequantize_int8 and linear_int8 by CPU kernels and in ATen calls, which multiply by the
// dequantised matrix.
#include "csrc/ops/linear_int8.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/converted_linear.h"
#include "csrc/ops/cpu/linear_int8_params.h"
#include "csrc/ops/linear_int8_generic.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using cpu::Int8Matrix;

/// Up to so many rows of x the CPU reads integers; beyond, a product with the dequantised matrix is faster.
constexpr int64_t kFewRows = 16;

/// int8_row_bytes of what may be a symbol.
c10::SymInt row_bytes(const c10::SymInt& in) { return (in + 15) / 16 * 16 + 16; }

void check_matrix(const char* op, const Tensor& weight, const c10::SymInt& in_features) {
  check_rank(op, "weight", weight, 2);
  check_dtype(op, "weight", weight, at::kChar);
  TORCH_CHECK(weight.sym_size(1) == row_bytes(in_features), op, ": weight: expected rows of ",
              row_bytes(in_features), " bytes for ", in_features,
              " columns, as quantize_int8 makes them, got ", weight.sym_size(1));
}

void check_to_quantize(const Tensor& weight) {
  check_rank("quantize_int8", "weight", weight, 2);
  check_floating("quantize_int8", "weight", weight);
}

void check_to_dequantize(const Tensor& weight, const c10::SymInt& in_features,
                         at::ScalarType dtype) {
  TORCH_CHECK(in_features >= 0, "dequantize_int8: in_features: expected >= 0, got ", in_features);
  check_matrix("dequantize_int8", weight, in_features);
  TORCH_CHECK(at::isFloatingType(dtype), "dequantize_int8: dtype: expected a floating one, got ",
              dtype);
}

/// The scales (O,1) float32 of a contiguous matrix, in place.
Tensor scales_of(const Tensor& weight) {
  return weight.view(at::kFloat).narrow(1, weight.size(1) / 4 - 4, 1);
}

/// The same of what says how many columns there are, int32.
Tensor columns_of(const Tensor& weight) {
  return weight.view(at::kInt).narrow(1, weight.size(1) / 4 - 3, 1);
}

void check_scales(const Tensor& scales) {
  TORCH_CHECK(scales.isfinite().all().item<bool>(),
              "quantize_int8: weight: expected finite numbers, got inf or NaN");
}

/// A matrix of 8 bits for `weight`, zeros.
Tensor zero_matrix(const Tensor& weight) {
  return at::zeros({weight.size(0), int8_row_bytes(weight.size(1))},
                   weight.options().dtype(at::kChar));
}

Tensor quantize_any(const Tensor& weight) {
  check_to_quantize(weight);
  const int64_t out = weight.size(0), in = weight.size(1);
  const Tensor packed = zero_matrix(weight);
  if (weight.numel() == 0) return packed;
  const int64_t rows = std::max<int64_t>(1, (int64_t{1} << 24) / in);  // what is held as float32
  for (int64_t first = 0; first < out; first += rows) {
    const int64_t count = std::min(rows, out - first);
    const Tensor part = weight.narrow(0, first, count).to(at::kFloat);
    const Tensor block = packed.narrow(0, first, count);
    Tensor step = part.abs().amax(1, true) / 127;
    step =
        step.masked_fill(step < std::numeric_limits<float>::min(), 0);  // a denormal is too coarse
    scales_of(block).copy_(step);
    block.narrow(1, 0, in).copy_((part / step).round_().masked_fill_(step == 0, 0));
  }
  columns_of(packed).fill_(in);
  check_scales(scales_of(packed));
  return packed;
}

Tensor dequantize_any(const Tensor& weight, int64_t in_features, at::ScalarType dtype) {
  check_to_dequantize(weight, in_features, dtype);
  const Tensor matrix = weight.contiguous();
  Tensor values = at::empty({weight.size(0), in_features}, weight.options().dtype(dtype));
  return values.copy_(matrix.narrow(1, 0, in_features)).mul_(scales_of(matrix));
}

/// Rows of the matrix in a dtype to multiply with.
ConvertedRows dequantized_rows(const Tensor& weight, int64_t in_features, at::ScalarType dtype) {
  return [=](int64_t first, int64_t count) {
    return dequantize_int8(weight.narrow(0, first, count), in_features, dtype);
  };
}

Int8Matrix matrix_of(const Tensor& weight, int64_t in_features) {
  return {in_features, weight.size(0), int8_row_bytes(in_features),
          static_cast<int8_t*>(weight.data_ptr())};
}

/// Of a contiguous matrix. What its first row says is free to read on a CPU: sizes alone tell columns but to 16.
Int8Matrix checked_matrix(const char* op, const Tensor& weight, int64_t in_features) {
  const Int8Matrix matrix = matrix_of(weight, in_features);
  TORCH_CHECK(*matrix.columns(0) == in_features, op, ": weight: expected ", in_features,
              " columns, got ", *matrix.columns(0));
  return matrix;
}

Tensor quantize_cpu(const Tensor& weight) {
  check_to_quantize(weight);
  const Tensor packed = zero_matrix(weight);
  if (weight.numel() == 0) return packed;
  const Tensor values = weight.contiguous();
  cpu::Int8ConversionParams p;
  p.dtype = dtype_code(values, "quantize_int8: weight");
  p.matrix = matrix_of(packed, weight.size(1));
  p.values = const_cast<void*>(values.const_data_ptr());
  cpu::quantize_int8(p);
  check_scales(scales_of(packed));
  return packed;
}

Tensor dequantize_cpu(const Tensor& weight, int64_t in_features, at::ScalarType dtype) {
  check_to_dequantize(weight, in_features, dtype);
  const Tensor matrix = weight.contiguous();
  Tensor values = at::empty({weight.size(0), in_features}, weight.options().dtype(dtype));
  if (values.numel() == 0) return values;
  cpu::Int8ConversionParams p;
  p.dtype = dtype_code(values, "dequantize_int8: dtype");
  p.matrix = checked_matrix("dequantize_int8", matrix, in_features);
  p.values = values.mutable_data_ptr();
  cpu::dequantize_int8(p);
  return values;
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_linear_int8(x, weight, bias);
  const int64_t in = x.size(-1), rows = in > 0 ? x.numel() / in : 0;
  if (x.scalar_type() == at::kDouble || rows == 0 || rows > kFewRows || weight.size(0) == 0)
    return linear_int8_generic(x, weight, bias);
  const Tensor inputs = x.to(at::kFloat).contiguous(), matrix = weight.contiguous(),
               biases = parameter(bias, at::kFloat);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  Tensor y = at::empty(sizes, x.options());
  cpu::LinearInt8Params p;
  p.dtype = dtype_code(x, "linear_int8: x");
  p.matrix = checked_matrix("linear_int8", matrix, in);
  p.rows = rows;
  p.x = inputs.const_data_ptr<float>();
  p.bias = biases.defined() ? biases.const_data_ptr<float>() : nullptr;
  p.y = y.mutable_data_ptr();
  cpu::linear_int8(p);
  return y;
}

class LinearInt8 : public torch::autograd::Function<LinearInt8> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                        const Tensor& weight, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor y = linear_int8(x, weight, bias);
    ctx->save_for_backward({weight});
    ctx->saved_data["in"] = x.size(-1);
    ctx->saved_data["bias"] = bias ? c10::IValue(bias->scalar_type()) : c10::IValue();
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const Tensor& dy = gradients[0];
    const Tensor weight = ctx->get_saved_variables()[0];
    const int64_t in = ctx->saved_data["in"].toInt();
    Tensor dx, dbias;
    if (ctx->needs_input_grad(0))
      dx = converted_linear_backward(dy, in, dequantized_rows(weight, in, dy.scalar_type()));
    if (!ctx->saved_data["bias"].isNone() && ctx->needs_input_grad(2))
      dbias = dy.sum_to_size({dy.size(-1)}).to(ctx->saved_data["bias"].toScalarType());
    return {dx, Tensor(), dbias};
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (recording(x, bias)) return LinearInt8::apply(x, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_int8(x, weight, bias);
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
Tensor linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  return linear_int8(at::autocast::cached_cast(type, x, kDevice), weight, bias);
}

Tensor quantize_meta(const Tensor& weight) {
  check_to_quantize(weight);
  return at::empty_symint({weight.sym_size(0), row_bytes(weight.sym_size(1))},
                          weight.options().dtype(at::kChar));
}

Tensor dequantize_meta(const Tensor& weight, c10::SymInt in_features, at::ScalarType dtype) {
  check_to_dequantize(weight, in_features, dtype);
  return at::empty_symint({weight.sym_size(0), in_features}, weight.options().dtype(dtype));
}

Tensor linear_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_linear_int8(x, weight, bias);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

}  // namespace

void check_linear_int8(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* kOp = "linear_int8";
  check_devices(kOp, x.device(), {{"weight", weight}, {"bias", bias}});
  TORCH_CHECK(x.dim() >= 1, kOp, ": x: expected at least 1 dimension, got none");
  check_floating(kOp, "x", x);
  check_matrix(kOp, weight, x.sym_size(-1));
  if (!bias) return;
  check_floating(kOp, "bias", *bias);
  check_shape(kOp, "bias", *bias, {weight.sym_size(0)}, "(O)");
}

Tensor linear_int8_generic(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const OptionalTensor added = bias ? OptionalTensor(bias->to(x.scalar_type())) : std::nullopt;
  return converted_linear(x, weight.size(0), added,
                          dequantized_rows(weight, x.size(-1), x.scalar_type()));
}

Tensor zeros_int8(int64_t out_features, int64_t in_features, at::Device device) {
  const Tensor matrix = at::zeros({out_features, int8_row_bytes(in_features)},
                                  at::TensorOptions().dtype(at::kChar).device(device));
  columns_of(matrix).fill_(in_features);
  return matrix;
}

Tensor quantize_int8(const Tensor& weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::quantize_int8", "")
                             .typed<decltype(quantize_int8)>();
  return op.call(weight);
}

Tensor dequantize_int8(const Tensor& weight, int64_t in_features, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::dequantize_int8", "")
                             .typed<decltype(dequantize_meta)>();
  return op.call(weight, in_features, dtype);
}

Tensor linear_int8(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::linear_int8", "")
                             .typed<decltype(linear_int8)>();
  return op.call(x, weight, bias);
}

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("quantize_int8", quantize_cpu);
  m.impl("dequantize_int8", dequantize_cpu);
  m.impl("linear_int8", linear_cpu);
}

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("quantize_int8", quantize_any);
  m.impl("dequantize_int8", dequantize_any);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("quantize_int8", torch::autograd::autogradNotImplementedFallback());
  m.impl("dequantize_int8", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_int8", linear_autograd);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) {
  m.impl("linear_int8", linear_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  m.impl("linear_int8", linear_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("quantize_int8", quantize_meta);
  m.impl("dequantize_int8", dequantize_meta);
  m.impl("linear_int8", linear_meta);
}

}  // namespace xlstm::ops
