// MlstmLayer under autocast, where the gates are computed within the cell's operator: against the same block in float64,
// which computes them apart from it (and is compared with the papers' equations in test_oracle.cpp).
#include <ATen/autocast_mode.h>

#include "csrc/nn/recompute.h"
#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

class CpuAutocast {
 public:
  /// Autocast to float32 takes the ways of autocast and rounds nothing further.
  explicit CpuAutocast(at::ScalarType type) : before_(at::autocast::get_autocast_dtype(at::kCPU)) {
    at::autocast::set_autocast_dtype(at::kCPU, type);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~CpuAutocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::set_autocast_dtype(at::kCPU, before_);
  }
  CpuAutocast(const CpuAutocast&) = delete;
  CpuAutocast& operator=(const CpuAutocast&) = delete;

 private:
  const at::ScalarType before_;
};

std::shared_ptr<Block> block_of(const MlstmBlockOptions& options, at::ScalarType type) {
  torch::manual_seed(20);
  auto block = named_block<MlstmBlock>("", options).block;
  block->to(at::kFloat);  // the same numbers in every type
  block->to(type);
  return block;
}

struct Inputs {
  at::Tensor x;
  State state;
  std::optional<at::Tensor> reset;
};

/// y, the new state, and the gradients of x, of the given state but m, and of all parameters.
std::vector<at::Tensor> run(const std::shared_ptr<Block>& block, const Inputs& in,
                            std::optional<at::ScalarType> autocast, bool checkpointed = false) {
  const at::ScalarType type = block->parameters()[0].scalar_type();
  std::vector<at::Tensor> wanted = {in.x.to(type).clone().requires_grad_()};
  State state;
  for (const auto& tensor : in.state) {
    state.push_back(tensor.to(type).clone());
    if (state.size() < 4) wanted.push_back(state.back().requires_grad_());
  }
  for (const auto& parameter : block->parameters()) wanted.push_back(parameter);
  Result out;
  {
    std::optional<CpuAutocast> on;
    if (autocast) on.emplace(*autocast);
    out = checkpointed ? checkpoint(block, wanted[0], state, in.reset)
                       : block->forward(wanted[0], state, in.reset);
  }
  at::Tensor loss =
      (out.first *
       at::cos(at::arange(out.first.numel(), out.first.options())).view(out.first.sizes()))
          .sum();
  for (size_t i = 0; i < 3; ++i) loss = loss + out.second[i].sum() * 0.1;
  auto results = torch::autograd::grad({loss}, wanted, {}, false, false, /*allow_unused=*/true);
  for (auto& result : results)
    if (!result.defined()) result = at::zeros({0}, loss.options());
  results.push_back(out.first.detach());
  for (const auto& tensor : out.second) results.push_back(tensor.detach());
  return results;
}

std::vector<Inputs> all_inputs(const MlstmBlockOptions& options) {
  torch::manual_seed(21);
  std::vector<Inputs> all;
  for (const auto& [batch, length] : {std::pair<int64_t, int64_t>{2, 5}, {3, 21}, {2, 1}}) {
    Inputs in{random_input(batch, length), {}, {}};
    all.push_back(in);
    in.state = block_of(options, at::kDouble)->forward(random_input(batch, 6), {}, {}).second;
    for (auto& tensor : in.state) tensor = tensor.detach().to(at::kFloat);
    all.push_back(in);
    in.reset = at::rand({batch, length}) < 0.3;
    all.push_back(in);
  }
  return all;
}

std::vector<MlstmBlockOptions> variants() {
  std::vector<MlstmBlockOptions> all(2, mlstm_options());
  all[1].conv_kernel_size = 0;
  all[1].bias = true;
  all[1].input_gate = "sigmoid";
  return all;
}

TEST_CASE("mLSTM whose gates are computed within the cell: values and all gradients") {
  for (const auto& options : variants()) {
    const auto block = block_of(options, at::kFloat), exact = block_of(options, at::kDouble);
    for (const Inputs& in : all_inputs(options)) {
      INFO(in.x.sizes() << ", state " << !in.state.empty() << ", reset " << in.reset.has_value());
      const auto got = run(block, in, at::kFloat), expected = run(exact, in, {});
      for (size_t i = 0; i < got.size(); ++i) {
        INFO(i);
        CHECK(difference(got[i].to(at::kDouble), expected[i]) < 2e-5);
      }
    }
  }
}

TEST_CASE("mLSTM in bfloat16: fused operators are as near to float64 as single ones") {
  auto options = mlstm_options();
  const auto exact = block_of(options, at::kDouble), fused = block_of(options, at::kFloat);
  options.fused = false;
  const auto single = block_of(options, at::kFloat);
  double fused_error = 0, single_error = 0;
  for (const Inputs& in : all_inputs(options)) {
    const auto expected = run(exact, in, {});
    const auto got = run(fused, in, at::kBFloat16), other = run(single, in, at::kBFloat16);
    for (size_t i = 0; i < expected.size(); ++i) {
      fused_error += difference(got[i].to(at::kDouble), expected[i]);
      single_error += difference(other[i].to(at::kDouble), expected[i]);
    }
  }
  CHECK(fused_error > 0);
  CHECK(fused_error < 1.2 * single_error);
}

TEST_CASE("mLSTM under autocast: checkpoints, pieces, decoding") {
  const auto block = block_of(mlstm_options(), at::kFloat);
  for (const Inputs& in : all_inputs(mlstm_options())) {
    if (in.x.size(1) == 1) continue;  // decoded where no graph is recorded
    const auto plain = run(block, in, at::kBFloat16),
               checkpointed = run(block, in, at::kBFloat16, true);
    for (size_t i = 0; i < plain.size(); ++i) CHECK(at::equal(checkpointed[i], plain[i]));
  }
  const at::NoGradGuard no_grad;
  const CpuAutocast on(at::kFloat);
  const at::Tensor x = random_input(3, 30).to(at::kFloat);
  const auto [whole, whole_state] = block->forward(x, {}, {});
  for (const bool lazy : {false, true}) {
    State state;
    std::vector<at::Tensor> parts;
    for (const auto& piece : x.split_with_sizes({1, 1, 1, 9, 1, 0, 1, 16}, 1)) {
      const InPlaceStateGuard guard(lazy);
      auto [y, next] = block->forward(piece, state, {});
      parts.push_back(y);
      state = std::move(next);
    }
    CHECK(difference(at::cat(parts, 1), whole) < 2e-5);
    CHECK(difference(state, whole_state) < 2e-5);
  }
}

TEST_CASE("mLSTM decodes by fused operators as by single ones, in place where it may") {
  const at::NoGradGuard no_grad;
  auto all = variants();
  all.push_back(mlstm_options());
  all.back().bias = true;
  all.back().conv_kernel_size = 2;
  all.push_back(mlstm_options());
  all.back().qkv_block_size = all.back().inner_dim;  // one block
  all.push_back(mlstm_options());
  all.back().igate.source = "bias";
  for (auto options : all) {
    INFO("convolution " << options.conv_kernel_size << " blocks of " << options.qkv_block_size
                        << " bias " << options.bias << " gate " << options.igate.source);
    const auto fused = block_of(options, at::kDouble);
    options.fused = false;
    const auto single = block_of(options, at::kDouble);
    const at::Tensor x = random_input(3, 8).to(at::kDouble);
    const State start = fused->forward(x.narrow(1, 0, 3), {}, {}).second;
    for (const bool in_place : {false, true}) {
      State state, other = start;
      for (const at::Tensor& tensor : start) state.push_back(tensor.clone());
      for (int64_t t = 3; t < x.size(1); ++t) {
        std::optional<InPlaceStateGuard> guard;
        if (in_place) guard.emplace(/*lazy_fold=*/false);
        const at::Tensor token = x.narrow(1, t, 1), window = state[0], before = window.clone();
        const auto [y, next] = fused->forward(token, state, {}, /*fused=*/true);
        guard.reset();
        const bool same = next[0].is_same(window);
        CHECK(same == (in_place && options.conv_kernel_size > 0));
        if (!same) CHECK(at::equal(window, before));
        const auto [y_single, next_single] = single->forward(token, other, {}, /*fused=*/false);
        CHECK(difference(y, y_single) < 1e-12);
        state = next, other = next_single;
        CHECK(difference(state, other) < 1e-12);
      }
    }
  }
}

TEST_CASE("mLSTM on the meta device") {
  MlstmBlock block(mlstm_options(), at::kMeta);
  for (const int64_t length : {3, 40}) {
    const at::Tensor x = at::empty({2, length, kDim}, at::TensorOptions().device(at::kMeta));
    CHECK(block.forward(x, {}, {}).first.sizes() == x.sizes());
  }
}

}  // namespace
}  // namespace xlstm::nn::test
