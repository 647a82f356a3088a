#include "csrc/nn/transformer.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <limits>

namespace xlstm::nn {
namespace {

/// Which keys a query sees: (B,1,T,S) bool. Row t is token past + t of the cache and sees from starts (B,T) to itself.
at::Tensor visible(int64_t past, const at::Tensor& starts) {
  const int64_t length = starts.size(1);
  const at::Tensor rows = at::arange(past, past + length, starts.options()).view({1, length, 1});
  const at::Tensor columns =
      at::arange(past + length, starts.options()).view({1, 1, past + length});
  return ((columns <= rows) & (columns >= starts.unsqueeze(-1))).unsqueeze(1);
}

}  // namespace

at::Tensor document_starts(const State& attention, int64_t length, const at::Tensor& like,
                           const std::optional<at::Tensor>& reset) {
  const int64_t batch = like.size(0), past = attention.empty() ? 0 : attention[0].size(2);
  const auto options = at::TensorOptions().dtype(at::kLong).device(like.device());
  const at::Tensor first = attention.empty() ? at::zeros({batch}, options) : attention[2];
  const at::Tensor before = first.unsqueeze(-1).expand({batch, length});
  if (!reset || length == 0) return before;
  const at::Tensor starts =
      at::where(*reset, at::arange(past, past + length, options), at::zeros({}, options));
  return at::maximum(before, std::get<0>(starts.cummax(1)));
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& positions, double theta) {
  const int64_t half = x.size(3) / 2;
  const auto type = at::toOpMathType(x.scalar_type());
  const at::Tensor exponents =
      at::arange(half, positions.options().dtype(type)) / static_cast<double>(half);
  const at::Tensor frequencies = at::exp(exponents * -std::log(theta));
  const at::Tensor angles = (positions.to(type).unsqueeze(-1) * frequencies).unsqueeze(1);
  const at::Tensor cos = angles.cos(), sin = angles.sin();  // (B,1,T,DH/2)
  const auto halves = x.chunk(2, -1);
  return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1)
      .to(x.scalar_type());
}

Attention::Attention(const TransformerBlockOptions& options, at::Device device)
    : options_(options) {
  const int64_t dim = options.dim;
  TORCH_CHECK(options.num_heads > 0 && dim % options.num_heads == 0 &&
                  (options.gpt || dim / options.num_heads % 2 == 0),
              "num_heads: expected a divisor of embedding_dim ", dim,
              " that leaves heads of an even width, got ", options.num_heads);
  const auto linear = [&](const char* name) {
    auto module = register_module(name, std::make_shared<Linear>(dim, dim, options.gpt, device));
    small_init_(module->weight, dim);
    return module;
  };
  q_ = linear("q"), k_ = linear("k"), v_ = linear("v"), out_ = linear("out");
  wang_init_(out_->weight, dim, options.num_blocks);
}

at::Tensor Attention::split_heads(const at::Tensor& x) const {
  return x.unflatten(-1, {options_.num_heads, options_.dim / options_.num_heads}).transpose(1, 2);
}

Result Attention::forward(const at::Tensor& x, const State& state,
                          const std::optional<at::Tensor>& reset) {
  check_state(state, 3, "attention");
  const int64_t past = state.empty() ? 0 : state[0].size(2), length = x.size(1);
  at::Tensor q = split_heads(q_->forward(x)), k = split_heads(k_->forward(x)),
             v = split_heads(v_->forward(x));
  const at::Tensor starts = document_starts(state, length, x, reset);
  if (!options_.gpt) {
    const at::Tensor positions = at::arange(past, past + length, starts.options()) - starts;
    q = rotate(q, positions, options_.rope_theta);
    k = rotate(k, positions, options_.rope_theta);
  }
  if (past > 0) {
    k = at::cat({state[0], k}, 2);
    v = at::cat({state[1], v}, 2);
  }
  // Without a past and without documents the fast kernels need no mask.
  const bool plain = past == 0 && !reset;
  const at::Tensor mixed =
      plain ? at::scaled_dot_product_attention(q, k, v, {}, 0, /*is_causal=*/true)
            : at::scaled_dot_product_attention(q, k, v, visible(past, starts));
  const at::Tensor first = length > 0      ? starts.select(1, length - 1).clone()
                           : state.empty() ? at::zeros({x.size(0)}, starts.options())
                                           : state[2];
  if (reset) {  // what is seen no more leaves no trace
    const at::Tensor columns = at::arange(past + length, starts.options());
    const at::Tensor gone = (columns < first.unsqueeze(-1)).view({-1, 1, past + length, 1});
    k = k.masked_fill(gone, 0), v = v.masked_fill(gone, 0);
  }
  return {out_->forward(mixed.transpose(1, 2).flatten(2)), {k, v, first}};
}

TransformerBlock::TransformerBlock(const TransformerBlockOptions& options, at::Device device)
    : options_(options) {
  const char* kind = options.gpt ? "layer" : "rms";
  const auto norm = [&](const char* name) {
    return register_module(
        name, std::make_shared<Norm>(options.dim, options.norm_eps, kind, device, options.gpt));
  };
  norm_ = norm("norm");
  attention_ = register_module("attention", std::make_shared<Attention>(options, device));
  ffn_norm_ = norm("ffn_norm");
  if (options.gpt) {
    const FeedForwardOptions plain{.dim = options.dim,
                                   .hidden_dim = options.ffn_dim,
                                   .num_blocks = options.num_blocks,
                                   .bias = true,
                                   .gated = false};
    ffn_ = register_module("ffn", std::make_shared<FeedForward>(plain, device));
  } else {
    swiglu_ = register_module(
        "ffn", std::make_shared<SwiGlu>(options.dim, options.ffn_dim, options.num_blocks, device));
  }
}

State TransformerBlock::advance(Residual& x, const State& state,
                                const std::optional<at::Tensor>& reset) {
  const auto dropped = [&](const at::Tensor& t) {
    return apply_dropout(t, options_.dropout, is_training());
  };
  auto [y, next] = attention_->forward(x.normed(*norm_), state, reset);
  x.add(dropped(y));
  const at::Tensor normed = x.normed(*ffn_norm_);
  x.add(dropped(ffn_ ? ffn_->forward(normed) : swiglu_->forward(normed)));
  return std::move(next);
}

}  // namespace xlstm::nn
