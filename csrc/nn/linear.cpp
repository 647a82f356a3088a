#include "csrc/nn/linear.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "csrc/nn/layers.h"
#include "csrc/ops/autocast.h"
#include "csrc/ops/converted_linear.h"
#include "csrc/ops/linear_int8.h"

namespace xlstm::nn {
namespace {

template <class F>
void visit_large_maps(torch::nn::Module& model, const F& f) {
  for (const auto& module : model.modules(/*include_self=*/false))
    if (auto* linear = module->as<Linear>(); linear != nullptr && linear->is_large()) f(*linear);
}

/// The dtype of products with x: what autocast would convert it to, or its own.
at::ScalarType product_dtype(const at::Tensor& x) {
  const at::DeviceType device = x.device().type();
  return ops::autocast_is_on(device) && x.scalar_type() != at::kDouble
             ? at::autocast::get_autocast_dtype(device)
             : x.scalar_type();
}

/// A linear map whose weight needs no gradient and has another dtype than x. at::linear would keep the converted weight until
/// the backward pass; here that converts it again.
class ConvertedLinear : public torch::autograd::Function<ConvertedLinear> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({weight});
    return product(x, weight, bias);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const at::Tensor& dy = gradients[0];
    const at::Tensor weight = ctx->get_saved_variables()[0];
    const at::Tensor dx =
        ops::converted_linear_backward(dy, weight.size(1), rows_in(dy.scalar_type(), weight));
    return {dx, at::Tensor(), at::Tensor()};
  }
  /// What forward() computes.
  static at::Tensor product(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    return ops::converted_linear(x, weight.size(0), bias, rows_in(x.scalar_type(), weight));
  }

 private:
  static ops::ConvertedRows rows_in(at::ScalarType dtype, const at::Tensor& weight) {
    return [=](int64_t first, int64_t count) { return weight.narrow(0, first, count).to(dtype); };
  }
};

}  // namespace

Linear::Linear(int64_t in_features, int64_t out_features, bool with_bias, at::Device device)
    : in_features_(in_features) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  const std::array sizes{out_features, in_features};
  weight = register_parameter(
      "weight", SkipDrawing::lives() ? at::empty(sizes, options) : at::zeros(sizes, options));
  if (with_bias) bias = register_parameter("bias", at::zeros({out_features}, options));
}

at::Tensor Linear::forward(const at::Tensor& x) const {
  if (!lora_a.defined())
    return weight.scalar_type() == at::kChar ? ops::linear_int8(x, weight, given(bias))
                                             : at::linear(x, weight, given(bias));
  const at::ScalarType type = product_dtype(x);
  const at::Tensor input = x.to(type);  // once for both products that read it
  return at::add(frozen_map(input), at::linear(at::linear(input, lora_a.to(type)), lora_b.to(type)),
                 lora_scale_);
}

/// Of the map beside adapters; x in the dtype of the product.
at::Tensor Linear::frozen_map(const at::Tensor& x) const {
  const at::ScalarType type = x.scalar_type();
  const auto added = bias.defined() ? std::optional<at::Tensor>(bias.to(type)) : std::nullopt;
  if (weight.scalar_type() == at::kChar) return ops::linear_int8(x, weight, added);
  const bool trains = weight.requires_grad() || (added && added->requires_grad());
  const bool records = at::GradMode::is_enabled();
  if (weight.scalar_type() == type || (trains && records))
    return at::linear(x, weight.to(type), added);
  return x.requires_grad() && records ? ConvertedLinear::apply(x, weight, added)
                                      : ConvertedLinear::product(x, weight, added);
}

bool Linear::is_large() const {
  constexpr int64_t kLeast = 64;
  return !stays_plain && weight.size(0) >= kLeast && in_features_ >= kLeast;
}

void Linear::adapt(int64_t rank, double alpha) {
  lora_a = register_parameter("lora_a", at::empty({rank, in_features_}, weight.options()));
  lora_b = register_parameter("lora_b", at::zeros({weight.size(0), rank}, weight.options()));
  lora_scale_ = alpha / static_cast<double>(rank);
  draw_adapter();
}

void Linear::draw_adapter() {
  if (lora_a.is_meta() || SkipDrawing::lives()) return;
  const at::NoGradGuard no_grad;
  at::Tensor drawn =
      at::empty(lora_a.sizes(), lora_a.options().device(at::kCPU));  // as all that is drawn
  uniform_init_(drawn, 1 / std::sqrt(static_cast<double>(in_features_)));
  lora_a.copy_(drawn);
}

at::Tensor Linear::merged_weight() const {
  if (!lora_a.defined()) return weight.clone();
  const at::ScalarType type = weight.is_floating_point()
                                  ? c10::promoteTypes(weight.scalar_type(), lora_a.scalar_type())
                                  : lora_a.scalar_type();
  return weight_as(type).addmm(lora_b.to(type), lora_a.to(type), 1, lora_scale_);
}

void Linear::take_int8(const at::Tensor& matrix) {
  TORCH_CHECK(fits_int8(matrix), "Linear: no matrix of 8 bits from ", in_features_, " to ",
              weight.size(0), " channels: ", matrix.scalar_type(), " ", matrix.sizes());
  const at::NoGradGuard no_grad;
  weight.set_requires_grad(false);  // integers have no gradient
  weight.set_data(matrix);
}

bool Linear::fits_int8(const at::Tensor& matrix) const {
  return matrix.scalar_type() == at::kChar &&
         matrix.sizes() == at::IntArrayRef({weight.size(0), ops::int8_row_bytes(in_features_)});
}

void Linear::keep_in(at::ScalarType dtype) {
  if (dtype == at::kChar) {
    take_int8(SkipDrawing::lives() ? ops::zeros_int8(weight.size(0), in_features_, weight.device())
                                   : ops::quantize_int8(weight));
    return;
  }
  const at::NoGradGuard no_grad;
  weight.set_requires_grad(false);
  weight.set_data(weight.to(dtype));
}

at::Tensor Linear::weight_as(at::ScalarType dtype) const {
  return weight.scalar_type() == at::kChar ? ops::dequantize_int8(weight, in_features_, dtype)
                                           : weight.to(dtype);
}

bool is_adapter(const std::string& name) {
  return name.ends_with(".lora_a") || name.ends_with(".lora_b");
}

void round_weights(torch::nn::Module& model, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  if (dtype == at::kChar) {
    // All, then one after the other: a matrix that cannot be rounded leaves the model as it was.
    std::vector<std::pair<Linear*, at::Tensor>> rounded;
    visit_large_maps(model, [&](Linear& linear) {
      if (linear.weight.is_floating_point())
        rounded.emplace_back(&linear, ops::quantize_int8(linear.weight));
    });
    for (const auto& [linear, matrix] : rounded) linear->take_int8(matrix);
    dtype = at::kBFloat16;
  }
  const auto widens = [dtype](const at::Tensor& parameter) {
    return at::isReducedFloatingType(parameter.scalar_type()) && !at::isReducedFloatingType(dtype);
  };
  for (auto& item : model.named_parameters())
    if (item.value().is_floating_point() && !is_adapter(item.key()) && !widens(item.value()))
      item.value().set_data(item.value().to(dtype));
  for (auto& buffer : model.buffers())
    if (buffer.is_floating_point()) buffer.set_data(buffer.to(dtype));
}

void adapt_linear_maps(torch::nn::Module& model, int64_t rank, double alpha, at::ScalarType base) {
  for (auto& parameter : model.parameters()) parameter.set_requires_grad(false);
  bool any = false;
  visit_large_maps(model, [&](Linear& linear) {
    linear.adapt(rank, alpha);
    linear.keep_in(base);
    any = true;
  });
  TORCH_CHECK(any, "lora.rank: expected 0, got ", rank,
              ": no linear map of this model has 64 channels or more on both sides");
}

}  // namespace xlstm::nn
