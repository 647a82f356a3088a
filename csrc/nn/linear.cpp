#include "csrc/nn/linear.h"

#include <ATen/core/grad_mode.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "csrc/nn/layers.h"
#include "csrc/ops/linear_int8.h"

namespace xlstm::nn {
namespace {

template <class F>
void visit_large_maps(torch::nn::Module& model, const F& f) {
  for (const auto& module : model.modules(/*include_self=*/false))
    if (auto* linear = module->as<Linear>(); linear != nullptr && linear->is_large()) f(*linear);
}

}  // namespace

Linear::Linear(int64_t in_features, int64_t out_features, bool with_bias, at::Device device)
    : in_features_(in_features) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  weight = register_parameter("weight", at::zeros({out_features, in_features}, options));
  if (with_bias) bias = register_parameter("bias", at::zeros({out_features}, options));
}

at::Tensor Linear::forward(const at::Tensor& x) const {
  const auto added = bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt;
  const at::Tensor y = weight.scalar_type() == at::kChar ? ops::linear_int8(x, weight, added)
                                                         : at::linear(x, weight, added);
  if (!lora_a.defined()) return y;
  const at::ScalarType type = x.scalar_type();
  return at::add(y, at::linear(at::linear(x, lora_a.to(type)), lora_b.to(type)), lora_scale_);
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
  uniform_init_(lora_a, 1 / std::sqrt(static_cast<double>(in_features_)));
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
  for (auto& item : model.named_parameters())
    if (item.value().is_floating_point() && !is_adapter(item.key()))
      item.value().set_data(item.value().to(dtype));
  for (auto& buffer : model.buffers())
    if (buffer.is_floating_point()) buffer.set_data(buffer.to(dtype));
}

void adapt_linear_maps(torch::nn::Module& model, int64_t rank, double alpha) {
  for (auto& parameter : model.parameters()) parameter.set_requires_grad(false);
  bool any = false;
  visit_large_maps(model, [&](Linear& linear) {
    linear.adapt(rank, alpha);
    any = true;
  });
  TORCH_CHECK(any, "lora.rank: expected 0, got ", rank,
              ": no linear map of this model has 64 channels or more on both sides");
}

}  // namespace xlstm::nn
