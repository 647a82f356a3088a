#include "csrc/nn/mlstm_post.h"

namespace xlstm::nn {

PostMlstmLayer::PostMlstmLayer(const MlstmBlockOptions& options, at::Device device)
    : options_(options) {
  const int64_t dim = options.dim, heads = options.num_heads;
  TORCH_CHECK(dim % heads == 0, "num_heads: expected a divisor of embedding_dim ", dim, ", got ",
              heads);
  const auto linear = [&](const char* name, bool bias) {
    return register_module(name, std::make_shared<Linear>(dim, dim, bias, device));
  };
  const auto gate = [&](const char* name, const HeadGateOptions& gate_options) {
    return register_module(name, std::make_shared<HeadGate>(dim, heads, gate_options, device));
  };
  if (options.conv_kernel_size > 0) {
    conv_ = register_module("conv", std::make_shared<CausalConv1d>(dim, options.conv_kernel_size,
                                                                   options.fused, device));
  }
  q_proj_ = linear("q_proj", options.bias), k_proj_ = linear("k_proj", options.bias);
  v_proj_ = linear("v_proj", options.bias), ogate_ = linear("ogate", false);
  igate_ = gate("igate", options.igate), fgate_ = gate("fgate", options.fgate);
  out_norm_ =
      register_module("out_norm", std::make_shared<Norm>(dim, options.norm_eps, "layer", device));
  proj_down_ = linear("proj_down", options.bias);
  for (auto& proj : {q_proj_, k_proj_, v_proj_, ogate_}) small_init_(proj->weight, dim);
  wang_init_(proj_down_->weight, dim, options.num_blocks);
  for (auto& each : {fgate_, igate_}) each->init();
}

Result PostMlstmLayer::forward(const at::Tensor& x, const State& state,
                               const std::optional<at::Tensor>& reset) {
  check_mlstm_state(state, 1, "mLSTM layer");
  const int64_t heads = options_.num_heads;
  const auto [a, window] = convolved(conv_, x, state_at(state, 0), reset);
  const auto by_head = [&](const at::Tensor& t) {
    return t.unflatten(-1, {heads, options_.dim / heads});
  };
  const bool both = igate_->reads_input() && fgate_->reads_input();
  const auto [igate, fgate] =
      both ? gate_pair(x, *igate_, *fgate_) : std::pair(igate_->forward(x), fgate_->forward(x));
  const State cell = state.empty() ? State{} : State(state.begin() + 1, state.end());
  auto [h, next] = mlstm_cell(
      by_head(q_proj_->forward(a)), by_head(k_proj_->forward(a)), by_head(v_proj_->forward(x)),
      igate, fgate, cell, reset,
      {options_.input_gate, options_.normalize, options_.mlstm_eps, options_.chunk_size});
  const at::Tensor gated = gated_norm(h, out_norm_->weight, {}, ogate_->forward(x),
                                      {options_.norm_eps, "layer", "sigmoid", options_.fused});
  const at::Tensor y = apply_dropout(proj_down_->forward(gated), options_.dropout, is_training());
  next.insert(next.begin(), window);
  return {y, std::move(next)};
}

PostMlstmBlock::PostMlstmBlock(const MlstmBlockOptions& options,
                               const FeedForwardOptions& feed_forward, at::Device device) {
  const auto norm = [&](const char* name) {
    return register_module(name,
                           std::make_shared<Norm>(options.dim, options.norm_eps, "layer", device));
  };
  norm_ = norm("norm");
  mlstm_ = register_module("mlstm", std::make_shared<PostMlstmLayer>(options, device));
  ffn_norm_ = norm("ffn_norm");
  ffn_ = register_module("ffn", std::make_shared<FeedForward>(feed_forward, device));
}

State PostMlstmBlock::advance(Residual& x, const State& state,
                              const std::optional<at::Tensor>& reset) {
  auto [y, next] = mlstm_->forward(x.normed(*norm_), state, reset);
  x.add(y);
  x.add(ffn_->forward(x.normed(*ffn_norm_)));
  return std::move(next);
}

}  // namespace xlstm::nn
