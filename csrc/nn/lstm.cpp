#include "csrc/nn/lstm.h"

#include <ATen/OpMathType.h>

#include <cmath>

#include "csrc/ops/slstm.h"

namespace xlstm::nn {

LstmLayer::LstmLayer(int64_t dim, at::Device device) {
  const auto make = [&](const char* name, at::IntArrayRef sizes) {
    at::Tensor tensor = register_parameter(
        name, at::zeros(sizes, at::TensorOptions().dtype(at::kFloat).device(device)));
    uniform_init_(tensor, 1 / std::sqrt(static_cast<double>(dim)));
    return tensor;
  };
  weight_ih_ = make("weight_ih", {4 * dim, dim});
  weight_hh_ = make("weight_hh", {4 * dim, dim});
  bias_ih_ = make("bias_ih", {4 * dim});
  bias_hh_ = make("bias_hh", {4 * dim});
}

Result LstmLayer::forward(const at::Tensor& x, const State& state,
                          const std::optional<at::Tensor>& reset) {
  check_state(state, 2, "LSTM layer");
  const int64_t batch = x.size(0), length = x.size(1), dim = x.size(2);
  if (x.is_cuda() && !reset && length > 0 && batch > 0) return forward_by_torch(x, state);
  const at::Tensor wx = at::linear(x, weight_ih_).view({batch, length, 4, 1, dim});
  const at::Tensor bias = (bias_ih_ + bias_hh_).view({4, 1, dim});
  auto [y, last, c, n, m] =
      ops::slstm(wx, weight_hh_.view({4, 1, dim, dim}), bias, optional_state(state, 0),
                 optional_state(state, 1), {}, {}, {reset, {}, "lstm"});
  return {y.flatten(2), {last, c}};
}

Result LstmLayer::forward_by_torch(const at::Tensor& x, const State& state) {
  const int64_t batch = x.size(0), dim = x.size(2);
  const auto initial = [&](size_t i) {
    return state.empty() ? at::zeros({1, batch, dim}, x.options())
                         : state[i].view({1, batch, dim}).to(x.scalar_type());
  };
  // One piece in cuDNN's order: of separate tensors it makes this copy itself, with a warning in every call.
  const std::vector<at::Tensor> own{weight_ih_, weight_hh_, bias_ih_, bias_hh_};
  const at::Tensor piece =
      at::cat({own[0].flatten(), own[1].flatten(), own[2].flatten(), own[3].flatten()});
  std::vector<at::Tensor> parameters;
  int64_t begin = 0;
  for (const at::Tensor& each : own) {
    parameters.push_back(piece.narrow(0, begin, each.numel()).view_as(each));
    begin += each.numel();
  }
  // cuDNN refuses gradients of a call that was not made for training.
  const bool train = is_training() || at::GradMode::is_enabled();
  auto [y, last, c] =
      at::lstm(x, {initial(0), initial(1)}, parameters, /*has_biases=*/true, /*num_layers=*/1,
               /*dropout=*/0, train, /*bidirectional=*/false, /*batch_first=*/true);
  const auto outgoing = [&](const at::Tensor& t) {
    return t.view({batch, 1, dim}).to(at::toOpMathType(x.scalar_type()));
  };
  return {y, {outgoing(last), outgoing(c)}};
}

LstmBlock::LstmBlock(const LstmBlockOptions& options, at::Device device) : options_(options) {
  if (options.kind != "lstm")
    norm_ = register_module("norm",
                            std::make_shared<Norm>(options.dim, options.norm_eps, "layer", device));
  lstm_ = register_module("lstm", std::make_shared<LstmLayer>(options.dim, device));
  if (options.kind != "lstm_block") return;
  ffn_norm_ = register_module(
      "ffn_norm", std::make_shared<Norm>(options.dim, options.norm_eps, "layer", device));
  ffn_ = register_module("ffn", std::make_shared<FeedForward>(options.feed_forward, device));
}

State LstmBlock::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  auto [y, next] = lstm_->forward(norm_ ? x.normed(*norm_) : x.sum(), state, reset);
  const auto dropped = [&](const at::Tensor& t) {
    return apply_dropout(t, options_.dropout, is_training());
  };
  if (norm_) {
    x.add(dropped(y));
  } else {
    x.replace(dropped(y));
  }
  if (ffn_) x.add(dropped(ffn_->forward(x.normed(*ffn_norm_))));
  return std::move(next);
}

}  // namespace xlstm::nn
