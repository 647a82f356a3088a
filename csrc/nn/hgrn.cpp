#include "csrc/nn/hgrn.h"

#include <ATen/OpMathType.h>

#include "csrc/ops/gated_linear_attention.h"
#include "csrc/ops/gated_scan.h"

namespace xlstm::nn {
namespace {

constexpr double kSmallest = 1e-30;  // of a gate whose logarithm is taken

/// What is kept and what is let in, together 1; float32 (float64 for float64).
struct Gates {
  Gates(const at::Tensor& preactivations, const at::Tensor& bound) {
    const auto type = at::toOpMathType(preactivations.scalar_type());
    const at::Tensor x = preactivations.to(type), rest = 1 - bound;
    kept = bound + rest * at::sigmoid(x);
    entering = rest * at::sigmoid(-x);
  }
  at::Tensor kept, entering;
};

}  // namespace

LowerBounds::LowerBounds(int64_t num_blocks, int64_t dim, at::Device device) {
  logits = register_parameter(
      "logits", at::zeros({num_blocks, dim}, at::TensorOptions().dtype(at::kFloat).device(device)));
}

at::Tensor LowerBounds::of_block(int64_t index) const {
  const auto type = at::toOpMathType(logits.scalar_type());
  return at::softmax(logits.to(type), 0).narrow(0, 1, index).sum(0);
}

Hgrn::Hgrn(const MixerOptions& options, std::shared_ptr<LowerBounds> bounds, at::Device device)
    : options_(options), bounds_(std::move(bounds)) {
  const int64_t dim = options.dim;
  input_ = projection("input", dim, dim, device), forget_ = projection("forget", dim, dim, device);
  gate_ = projection("gate", dim, dim, device), out_ = projection("out", dim, dim, device);
  wang_init_(out_->weight, dim, options.num_blocks);
  out_norm_ =
      register_module("out_norm", std::make_shared<Norm>(dim, options.norm_eps, "rms", device));
}

Result Hgrn::forward(const at::Tensor& x, const State& state,
                     const std::optional<at::Tensor>& reset) {
  check_state(state, 1, "HGRN");
  const Gates gates(forget_->forward(x), bounds_->of_block(options_.block_index));
  const at::Tensor in = gates.entering * at::silu(input_->forward(x));
  auto [h, next] = ops::gated_scan(in, gates.kept, optional_state(state, 0), reset);
  const at::Tensor gate = gate_->forward(x);
  const at::Tensor y = gated_norm(h.to(gate.scalar_type()).unsqueeze(-2), out_norm_->weight, {},
                                  gate, {options_.norm_eps, "rms", "silu", options_.fused});
  return {out_->forward(y), {next}};
}

Hgrn2::Hgrn2(const MixerOptions& options, std::shared_ptr<LowerBounds> bounds, at::Device device)
    : options_(options), bounds_(std::move(bounds)) {
  const int64_t dim = options.dim;
  check_heads(dim, options.num_heads, "embedding_dim");
  query_ = projection("query", dim, dim, device), forget_ = projection("forget", dim, dim, device);
  input_ = projection("input", dim, dim, device), out_ = projection("out", dim, dim, device);
  wang_init_(out_->weight, dim, options.num_blocks);
  out_norm_ =
      register_module("out_norm", std::make_shared<Norm>(dim, options.norm_eps, "rms", device));
}

Result Hgrn2::forward(const at::Tensor& x, const State& state,
                      const std::optional<at::Tensor>& reset) {
  check_state(state, 1, "HGRN2");
  const auto split = [&](const at::Tensor& t) {
    return t.unflatten(-1, {options_.num_heads, options_.dim / options_.num_heads});
  };
  const Gates gates(forget_->forward(x), bounds_->of_block(options_.block_index));
  ops::GatedLinearAttentionOptions op;
  op.reset = reset;
  op.scale = 1;
  auto [h, next] = ops::gated_linear_attention(
      split(at::silu(query_->forward(x))), split(gates.entering), split(input_->forward(x)),
      split(gates.kept.clamp_min(kSmallest).log()), {}, optional_state(state, 0), op);
  return {out_->forward(out_norm_->forward(h.flatten(2))), {next}};
}

}  // namespace xlstm::nn
