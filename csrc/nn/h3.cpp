#include "csrc/nn/h3.h"

#include <ATen/OpMathType.h>

#include "csrc/ops/full_precision.h"

namespace xlstm::nn {

H3::H3(const MixerOptions& options, int64_t state_size, at::Device device)
    : options_(options), state_size_(state_size) {
  const int64_t dim = options.dim;
  check_heads(dim, options.num_heads, "embedding_dim");
  q_ = projection("q", dim, dim, device), k_ = projection("k", dim, dim, device);
  v_ = projection("v", dim, dim, device), out_ = projection("out", dim, dim, device);
  shift_ = register_module("shift", std::make_shared<ShiftSsm>(dim, state_size, device));
  diagonal_ = register_module("diagonal",
                              std::make_shared<DiagonalSsm>(options.num_heads, state_size, device));
  wang_init_(out_->weight, dim, options.num_blocks);
}

Result H3::forward(const at::Tensor& x, const State& state,
                   const std::optional<at::Tensor>& reset) {
  check_state(state, 2, "H3");
  const int64_t heads = options_.num_heads, width = options_.dim / heads;
  // What lies between the projections is float32 (float64) throughout, as FFTs want it.
  const auto type = at::toOpMathType(x.scalar_type());
  if (x.size(1) == 0) {
    const auto zeros = [&](at::IntArrayRef sizes) {
      return at::zeros(sizes, x.options().dtype(type));
    };
    if (!state.empty()) return {x, {state[0].clone(), state[1].clone()}};
    return {x,
            {zeros({x.size(0), state_size_ - 1, options_.dim}),
             zeros({x.size(0), heads, width * width, state_size_})}};
  }
  const at::Tensor queries = q_->forward(x), keys = k_->forward(x), values = v_->forward(x);
  at::Tensor y, window, h;
  {
    const ops::FullFloat wide;
    const auto by_head = [&](const at::Tensor& t) {
      return t.to(type).unflatten(-1, {heads, width}).permute({0, 2, 3, 1});  // (B,NH,DH,T)
    };
    std::tie(y, window) = shift_->forward(keys.to(type), state_at(state, 0), reset);
    const at::Tensor kv = (by_head(y).unsqueeze(3) * by_head(values).unsqueeze(2)).flatten(2, 3);
    std::tie(y, h) = diagonal_->forward(kv, state_at(state, 1), reset);
    y = (y.unflatten(2, {width, width}) * by_head(queries).unsqueeze(3)).sum(2);
    y = y.flatten(1, 2).transpose(1, 2).to(queries.scalar_type());
  }
  return {out_->forward(y), {window, h}};
}

}  // namespace xlstm::nn
