#include "csrc/nn/slstm.h"

#include <cmath>

#include "csrc/ops/norm.h"
#include "csrc/ops/slstm.h"

namespace xlstm::nn {
namespace {

constexpr int64_t kForget = 1;  // gate order i, f, z, o

/// Forget gate biases 5 - 12 (k / (DH-1))^(0.3 + 1.3 r), r the block's relative depth: short memories to long ones
/// within a head, more long ones in later blocks. One value per unit of a head.
at::Tensor powerlaw_bias(int64_t head_dim, int64_t block_index, int64_t num_blocks,
                         const at::TensorOptions& options) {
  const double depth =
      num_blocks > 1 ? static_cast<double>(block_index) / static_cast<double>(num_blocks - 1) : 0.0;
  const double last = static_cast<double>(std::max<int64_t>(head_dim - 1, 1));
  return 5.0 - 12.0 * at::pow(at::arange(head_dim, options) / last, 0.3 + 1.3 * depth);
}

}  // namespace

SlstmLayer::SlstmLayer(const SlstmBlockOptions& options, at::Device device) : options_(options) {
  const int64_t dim = options.dim, heads = options.num_heads;
  TORCH_CHECK(dim % heads == 0, "num_heads: expected a divisor of embedding_dim ", dim, ", got ",
              heads);
  const int64_t head_dim = dim / heads;
  if (options.conv_kernel_size > 0) {
    conv_ = register_module("conv", std::make_shared<CausalConv1d>(dim, options.conv_kernel_size,
                                                                   options.fused, device));
  }
  TORCH_CHECK(options.gate_proj == "headwise" || options.gate_proj == "dense",
              "slstm.gate_proj: expected \"headwise\" or \"dense\", got \"", options.gate_proj,
              "\"");
  const auto gate = [&](const char* name) {
    const int64_t blocks = options.gate_proj == "dense" ? 1 : heads;
    return register_module(name, std::make_shared<BlockLinear>(dim, blocks, false, device));
  };
  igate_ = gate("igate"), fgate_ = gate("fgate"), zgate_ = gate("zgate"), ogate_ = gate("ogate");
  const auto float_options = at::TensorOptions().dtype(at::kFloat).device(device);
  recurrent_ =
      register_parameter("recurrent", at::zeros({4, heads, head_dim, head_dim}, float_options));
  bias_ = register_parameter("bias", at::zeros({4, heads, head_dim}, float_options));
  out_norm_ =
      register_module("out_norm", std::make_shared<Norm>(dim, options.norm_eps, "layer", device));
  for (auto& each : {igate_, fgate_, zgate_, ogate_}) small_init_(each->weight, dim);
  init_cell_parameters();
}

void SlstmLayer::init_cell_parameters() {
  at::NoGradGuard no_grad;
  const double bound = 1.0 / std::sqrt(static_cast<double>(options_.dim));
  TORCH_CHECK(
      options_.recurrent_weight_init == "zeros" || options_.recurrent_weight_init == "standard",
      "slstm.recurrent_weight_init: expected \"zeros\" or \"standard\", got \"",
      options_.recurrent_weight_init, "\"");
  if (options_.recurrent_weight_init == "standard") uniform_init_(recurrent_, bound);

  at::Tensor forget = bias_.select(0, kForget);
  if (options_.bias_init == "powerlaw_blockdependent") {
    if (!forget.is_meta()) {
      forget.copy_(powerlaw_bias(forget.size(-1), options_.block_index, options_.num_blocks,
                                 forget.options()));
    }
  } else if (options_.bias_init == "small_init") {
    linspace_init_(forget, 3, 6);
  } else if (options_.bias_init == "standard") {
    uniform_init_(bias_, bound);
  } else {
    TORCH_CHECK(options_.bias_init == "zeros",
                "slstm.bias_init: expected \"powerlaw_blockdependent\", \"small_init\", \"zeros\" "
                "or \"standard\", "
                "got \"",
                options_.bias_init, "\"");
  }
}

Result SlstmLayer::forward(const at::Tensor& x, const State& state,
                           const std::optional<at::Tensor>& reset) {
  check_state(state, 5, "sLSTM layer");
  const int64_t batch = x.size(0), length = x.size(1), heads = options_.num_heads;
  const int64_t head_dim = options_.dim / heads;

  const auto [a, window] = convolved(conv_, x, state_at(state, 0), reset);
  const at::Tensor wx =
      at::stack({igate_->forward(a), fgate_->forward(a), zgate_->forward(x), ogate_->forward(x)}, 2)
          .view({batch, length, 4, heads, head_dim});
  auto [h, y, c, n, m] =
      ops::slstm(wx, recurrent_, bias_, optional_state(state, 1), optional_state(state, 2),
                 optional_state(state, 3), optional_state(state, 4),
                 {reset,
                  {},
                  options_.cell,
                  options_.recompute,
                  options_.recurrent_clip,
                  options_.recurrent_cut});
  h = apply_dropout(h, options_.dropout,
                    is_training());  // before the norm, as the reference does it
  const at::Tensor out =
      ops::headwise_norm(h, out_norm_->weight, {}, {}, {}, {}, options_.norm_eps);
  return {out, {window, y, c, n, m}};
}

SlstmBlock::SlstmBlock(const SlstmBlockOptions& options, at::Device device) {
  norm_ = register_module("norm",
                          std::make_shared<Norm>(options.dim, options.norm_eps, "layer", device));
  slstm_ = register_module("slstm", std::make_shared<SlstmLayer>(options, device));
  ffn_norm_ = register_module(
      "ffn_norm", std::make_shared<Norm>(options.dim, options.norm_eps, "layer", device));
  ffn_ = register_module("ffn", std::make_shared<FeedForward>(options.feed_forward, device));
}

State SlstmBlock::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  auto [y, next] = slstm_->forward(x.normed(*norm_), state, reset);
  x.add(y);
  x.add(ffn_->forward(x.normed(*ffn_norm_)));
  return std::move(next);
}

}  // namespace xlstm::nn
