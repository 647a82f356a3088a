#pragma once
// Blocks of every kind for the tests: float64, every parameter random, so that nothing hides behind a zero weight.
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/nn/mlstm_post.h"
#include "csrc/nn/slstm.h"
#include "csrc/nn/xlstm_large.h"

namespace xlstm::nn::test {

constexpr int64_t kDim = 12;

inline void randomize(torch::nn::Module& module) {
  at::NoGradGuard no_grad;
  for (auto& item : module.named_parameters()) {
    at::Tensor& parameter = item.value();
    if (item.key().find("igate_preact.bias") != std::string::npos)
      parameter.zero_();  // -10 would shut the gate
    parameter.add_(at::randn_like(parameter), 0.3);
  }
}

inline MlstmBlockOptions mlstm_options() {
  MlstmBlockOptions options;
  options.dim = kDim;
  options.inner_dim = 24;
  options.num_heads = 3;
  options.mlstm_eps = 0;  // the operator's gradient is exact there
  return options;
}

inline SlstmBlockOptions slstm_options() {
  SlstmBlockOptions options;
  options.dim = kDim;
  options.num_heads = 3;
  options.recurrent_weight_init = "standard";
  options.feed_forward.dim = kDim;
  options.feed_forward.hidden_dim = 16;
  return options;
}

inline XlstmLargeBlockOptions large_options() {
  XlstmLargeBlockOptions options;
  options.dim = kDim;
  options.qk_dim = 6;
  options.v_dim = 12;
  options.num_heads = 3;
  options.ffn_dim = 20;
  options.mlstm_eps = 0;
  return options;
}

struct NamedBlock {
  std::string name;
  std::shared_ptr<Block> block;
};

template <class BlockType, class Options>
NamedBlock named_block(const std::string& name, const Options& options) {
  auto block = std::make_shared<BlockType>(options, at::kCPU);
  randomize(*block);
  block->to(at::kDouble);
  return {name, block};
}

inline FeedForwardOptions squared_relu_options() {
  FeedForwardOptions options;
  options.dim = kDim;
  options.hidden_dim = 20;
  options.act_fn = "relu2";
  options.gated = false;
  return options;
}

/// With the options of both halves in one.
struct PostBlock : PostMlstmBlock {
  PostBlock(const MlstmBlockOptions& options, at::Device device)
      : PostMlstmBlock(options, squared_relu_options(), device) {}
};

/// One block of every kind that the options can make differ.
inline std::vector<NamedBlock> all_blocks() {
  std::vector<NamedBlock> blocks = {named_block<MlstmBlock>("mlstm", mlstm_options()),
                                    named_block<SlstmBlock>("slstm", slstm_options()),
                                    named_block<XlstmLargeBlock>("xlstm_large", large_options())};
  auto mlstm = mlstm_options();
  mlstm.conv_kernel_size = 0;
  mlstm.bias = true;
  mlstm.input_gate = "sigmoid";
  blocks.push_back(named_block<MlstmBlock>("mlstm, sigmoid gate, no convolution, biases", mlstm));
  for (const char* cell : {"slstm_expf", "lstm"}) {
    auto slstm = slstm_options();
    slstm.cell = cell;
    slstm.conv_kernel_size = 0;
    slstm.feed_forward.act_fn = "silu";
    blocks.push_back(named_block<SlstmBlock>(std::string(cell) + ", no convolution", slstm));
  }
  auto dense = slstm_options();
  dense.gate_proj = "dense";
  dense.feed_forward = squared_relu_options();
  blocks.push_back(named_block<SlstmBlock>("slstm, dense gates, plain feed-forward", dense));
  auto gates = mlstm_options();
  gates.igate = {"fixed", "zeros"}, gates.fgate = {"bias", "linspace"};
  blocks.push_back(named_block<MlstmBlock>("mlstm, fixed input gate, forget bias", gates));
  blocks.push_back(named_block<PostBlock>("mlstm, post-up-projection", mlstm_options()));
  gates.igate = {"input", "normal"}, gates.fgate = {"fixed", "open"};
  gates.conv_kernel_size = 0;
  blocks.push_back(named_block<PostBlock>("mlstm, post-up-projection, nothing forgotten", gates));
  return blocks;
}

inline at::Tensor random_input(int64_t batch, int64_t length) {
  return at::randn({batch, length, kDim}, at::TensorOptions().dtype(at::kDouble));
}

/// Largest |a - b| divided by max(1, largest |b|). Infinities must be equal and in the same places.
inline double difference(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return INFINITY;
  if (a.numel() == 0) return 0;
  const at::Tensor finite = at::isfinite(b);
  if (!at::equal(a.masked_fill(finite, 0), b.masked_fill(finite, 0))) return INFINITY;
  const at::Tensor x = a.masked_fill(~finite, 0), y = b.masked_fill(~finite, 0);
  return (x - y).abs().max().item<double>() / std::max(1.0, y.abs().max().item<double>());
}

inline double difference(const State& a, const State& b) {
  if (a.size() != b.size()) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, difference(a[i], b[i]));
  return worst;
}

/// What `call` throws, "" when it does not.
template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace xlstm::nn::test
