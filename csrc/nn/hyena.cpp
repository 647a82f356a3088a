#include "csrc/nn/hyena.h"

#include <ATen/OpMathType.h>

#include <cmath>
#include <numbers>

#include "csrc/nn/long_convolution.h"
#include "csrc/ops/causal_conv1d.h"
#include "csrc/ops/full_precision.h"

namespace xlstm::nn {
namespace {

constexpr int64_t kWidth = 64, kInnerLayers = 2, kBands = 16, kShortTaps = 3;
constexpr double kLowestBand = 1e-4;
/// Where the damping has come down to a hundredth, in units of L: of the slowest and of the fastest channel.
constexpr double kSlowest = 1.5, kFastest = 0.3, kDampedTo = 1e-2;

}  // namespace

HyenaFilter::HyenaFilter(int64_t dim, int64_t length, at::Device device)
    : dim_(dim), length_(length) {
  TORCH_CHECK(length > 0, "filter_length: expected a positive number, got ", length);
  const auto layer = [&](const std::string& name, int64_t in, int64_t out, bool bias) {
    auto linear = register_module(name, std::make_shared<Linear>(in, out, bias, device));
    const double bound = 1 / std::sqrt(static_cast<double>(in));  // as torch.nn.Linear
    uniform_init_(linear->weight, bound);
    if (bias) uniform_init_(linear->bias, bound);
    linear->stays_plain = true;  // the filter is computed with the weights in a dtype of its own
    layers_.push_back(std::move(linear));
  };
  layer("features", 1 + 2 * kBands, kWidth, true);
  for (int64_t i = 0; i < kInnerLayers; ++i)
    layer("inner" + std::to_string(i), kWidth, kWidth, true);
  layer("channels", kWidth, dim, false);
  frequency_ = register_parameter(
      "frequency", at::ones({kWidth}, at::TensorOptions().dtype(at::kFloat).device(device)));
}

at::Tensor HyenaFilter::forward(int64_t first, int64_t count) const {
  const auto type = at::toOpMathType(frequency_.scalar_type());
  const auto options = at::TensorOptions().dtype(type).device(frequency_.device());
  const at::Tensor time = (at::arange(count, options) + static_cast<double>(first)).unsqueeze(1) /
                          static_cast<double>(length_);
  const at::Tensor angle =
      time * at::linspace(kLowestBand, kBands - 1, kBands, options) * (2 * std::numbers::pi);
  at::Tensor x = at::cat({time, angle.cos(), -angle.sin()}, 1);
  const at::Tensor frequency = frequency_.to(type);
  for (size_t i = 0; i + 1 < layers_.size(); ++i)
    x = at::sin(frequency * at::linear(x, layers_[i]->weight.to(type), layers_[i]->bias.to(type)));
  const double full = -std::log(kDampedTo);
  const at::Tensor delta = at::linspace(full / kSlowest, full / kFastest, dim_, options);
  return at::linear(x, layers_.back()->weight.to(type)) * at::exp(-time * delta);
}

Hyena::Hyena(const MixerOptions& options, int64_t filter_length, at::Device device)
    : options_(options) {
  const int64_t dim = options.dim;
  const auto parameter = [&](const char* name, at::IntArrayRef sizes) {
    return register_parameter(
        name, at::zeros(sizes, at::TensorOptions().dtype(at::kFloat).device(device)));
  };
  in_ = projection("in", dim, 3 * dim, device), out_ = projection("out", dim, dim, device);
  wang_init_(out_->weight, dim, options.num_blocks);
  conv_weight_ = parameter("conv_weight", {3 * dim, kShortTaps});
  conv_bias_ = parameter("conv_bias", {3 * dim});
  for (at::Tensor& tensor : {std::ref(conv_weight_), std::ref(conv_bias_)})
    uniform_init_(tensor, 1 / std::sqrt(static_cast<double>(kShortTaps)));
  filter_ = register_module("filter", std::make_shared<HyenaFilter>(dim, filter_length, device));
  skip_ = parameter("skip", {dim});
  normal_init_(skip_, 1);
}

Result Hyena::forward(const at::Tensor& x, const State& state,
                      const std::optional<at::Tensor>& reset) {
  check_state(state, 3, "Hyena");
  const auto type = at::toOpMathType(x.scalar_type());
  const int64_t length = x.size(1), past = state.empty() ? 0 : state[1].size(1);
  auto [mixed, window] = ops::causal_conv1d(in_->forward(x), conv_weight_, conv_bias_,
                                            optional_state(state, 0), reset);
  at::Tensor y, z, filter;
  {
    const ops::FullFloat wide;
    const auto parts = mixed.to(type).chunk(3, -1);
    const at::Tensor now = parts[1] * parts[2];
    z = past > 0 ? at::cat({state[1].to(type), now}, 1) : now;
    const bool remembered = past > 0 && x.size(0) > 0 && (length == 0 || is_decode_step(x, reset));
    filter = remembered ? at::cat({state[2][0].to(type), filter_->forward(past, length)})
                        : filter_->forward(0, past + length);
    if (length == 1) {
      if (reset) z = at::cat({z.narrow(1, 0, past).masked_fill(reset->unsqueeze(-1), 0), now}, 1);
      y = (z * filter.flip(0)).sum(1, true);
    } else if (length > 0) {
      std::optional<at::Tensor> starts;
      if (reset) starts = at::constant_pad_nd(*reset, {past, 0}, 0);
      y = long_convolution(z.transpose(1, 2), filter.t(), starts)
              .narrow(-1, past, length)
              .transpose(1, 2);
      if (reset) z = without_past(z, last_start(*starts));
    } else {
      y = now;
    }
    y = (parts[0] * (y + skip_.to(type) * now)).to(mixed.scalar_type());
  }
  return {out_->forward(y), {window, z, filter.unsqueeze(0).expand({x.size(0), -1, -1})}};
}

}  // namespace xlstm::nn
