#include "csrc/nn/xlstm_large.h"

#include "csrc/nn/mlstm.h"

namespace xlstm::nn {

at::Tensor soft_cap(const at::Tensor& x, double cap) {
  return cap > 0 ? at::tanh(x / cap) * cap : x;
}

XlstmLargeLayer::XlstmLargeLayer(const XlstmLargeBlockOptions& options, at::Device device)
    : options_(options) {
  const int64_t dim = options.dim, heads = options.num_heads;
  TORCH_CHECK(options.qk_dim > 0 && options.qk_dim % heads == 0,
              "qk_dim_factor: expected a width of q and k that is a positive multiple of ", heads,
              " heads, got ", options.qk_dim);
  TORCH_CHECK(options.v_dim > 0 && options.v_dim % heads == 0,
              "v_dim_factor: expected a width of v that is a positive multiple of ", heads,
              " heads, got ", options.v_dim);
  q_ = register_module("q", std::make_shared<Linear>(dim, options.qk_dim, false, device));
  k_ = register_module("k", std::make_shared<Linear>(dim, options.qk_dim, false, device));
  v_ = register_module("v", std::make_shared<Linear>(dim, options.v_dim, false, device));
  ogate_ =
      register_module("ogate_preact", std::make_shared<Linear>(dim, options.v_dim, false, device));
  igate_ = register_module("igate_preact", std::make_shared<Linear>(dim, heads, true, device));
  fgate_ = register_module("fgate_preact", std::make_shared<Linear>(dim, heads, true, device));
  multihead_norm_ = register_module(
      "multihead_norm", std::make_shared<Norm>(options.v_dim, options.norm_eps, "layer", device));
  out_proj_ =
      register_module("out_proj", std::make_shared<Linear>(options.v_dim, dim, false, device));

  igate_->stays_plain = fgate_->stays_plain = true;

  // The gates' weights stay zero: at the start i = -10 closes the input gate softly and o = 1/2.
  for (auto& proj : {q_, k_, v_}) small_init_(proj->weight, dim);
  wang_init_(out_proj_->weight, dim, options.num_blocks);
  linspace_init_(igate_->bias, -10, -10);
  linspace_init_(fgate_->bias, 3, 6);
}

Result XlstmLargeLayer::forward(const at::Tensor& x, const State& state,
                                const std::optional<at::Tensor>& reset) {
  check_mlstm_state(state, 0, "xLSTM-large layer");
  const int64_t batch = x.size(0), length = x.size(1), heads = options_.num_heads;
  const std::vector<int64_t> qk_shape = {batch, length, heads, options_.qk_dim / heads};
  const std::vector<int64_t> v_shape = {batch, length, heads, options_.v_dim / heads};
  const auto [igate, fgate] = gate_pair(x, *igate_, *fgate_);
  auto [h, next] = mlstm_cell(q_->forward(x).view(qk_shape), k_->forward(x).view(qk_shape),
                              v_->forward(x).view(v_shape), soft_cap(igate, options_.gate_soft_cap),
                              soft_cap(fgate, options_.gate_soft_cap), state, reset,
                              {"exp", true, options_.mlstm_eps, options_.chunk_size});
  const at::Tensor gated = gated_norm(h, multihead_norm_->weight, {}, ogate_->forward(x),
                                      {options_.norm_eps, "layer", "sigmoid", options_.fused});
  return {apply_dropout(out_proj_->forward(gated), options_.dropout, is_training()),
          std::move(next)};
}

SwiGlu::SwiGlu(int64_t dim, int64_t hidden_dim, int64_t num_blocks, at::Device device) {
  proj_up_gate_ =
      register_module("proj_up_gate", std::make_shared<Linear>(dim, hidden_dim, false, device));
  proj_up_ = register_module("proj_up", std::make_shared<Linear>(dim, hidden_dim, false, device));
  proj_down_ =
      register_module("proj_down", std::make_shared<Linear>(hidden_dim, dim, false, device));
  small_init_(proj_up_gate_->weight, dim);
  small_init_(proj_up_->weight, dim);
  wang_init_(proj_down_->weight, dim, num_blocks);
}

at::Tensor SwiGlu::forward(const at::Tensor& x) const {
  return proj_down_->forward(at::silu(proj_up_gate_->forward(x)) * proj_up_->forward(x));
}

XlstmLargeBlock::XlstmLargeBlock(const XlstmLargeBlockOptions& options, at::Device device)
    : dropout_(options.dropout) {
  norm_mlstm_ = register_module(
      "norm_mlstm", std::make_shared<Norm>(options.dim, options.norm_eps, "rms", device));
  mlstm_layer_ = register_module("mlstm_layer", std::make_shared<XlstmLargeLayer>(options, device));
  norm_ffn_ = register_module("norm_ffn",
                              std::make_shared<Norm>(options.dim, options.norm_eps, "rms", device));
  ffn_ = register_module(
      "ffn", std::make_shared<SwiGlu>(options.dim, options.ffn_dim, options.num_blocks, device));
}

State XlstmLargeBlock::advance(Residual& x, const State& state,
                               const std::optional<at::Tensor>& reset) {
  auto [y, next] = mlstm_layer_->forward(x.normed(*norm_mlstm_), state, reset);
  x.add(y);
  x.add(apply_dropout(ffn_->forward(x.normed(*norm_ffn_)), dropout_, is_training()));
  return std::move(next);
}

}  // namespace xlstm::nn
