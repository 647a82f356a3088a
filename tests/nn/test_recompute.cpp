#include "csrc/nn/recompute.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>

#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

/// A pass over x from `start`, its result and the gradients of a loss that looks at y and at the last state.
std::vector<at::Tensor> run(const std::shared_ptr<Block>& block, bool checkpointed,
                            const at::Tensor& input, const State& start,
                            const std::optional<at::Tensor>& reset) {
  const at::Tensor x = input.detach().clone().set_requires_grad(true);
  State state;
  std::vector<at::Tensor> wanted = {x};
  for (const auto& tensor : start) {
    state.push_back(tensor.detach().clone());
    // Not the running maximum (the last one), which has no gradient by definition.
    if (state.size() < start.size()) wanted.push_back(state.back().set_requires_grad(true));
  }
  auto [y, next] =
      checkpointed ? checkpoint(block, x, state, reset) : block->forward(x, state, reset);
  at::Tensor loss = (y.to(at::kDouble) * y.to(at::kDouble)).sum();
  for (size_t i = 0; i + 1 < next.size(); ++i) loss = loss + next[i].to(at::kDouble).sin().sum();
  for (const auto& parameter : block->parameters()) wanted.push_back(parameter);
  const auto grads =
      torch::autograd::grad({loss}, wanted, {}, std::nullopt, false, /*allow_unused=*/true);
  std::vector<at::Tensor> results = {y.detach()};
  for (const auto& tensor : next) results.push_back(tensor.detach());
  for (size_t i = 0; i < grads.size(); ++i)
    results.push_back(grads[i].defined() ? grads[i] : at::zeros_like(wanted[i]));
  return results;
}

void check_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    INFO("tensor " << i);
    CHECK(at::equal(a[i], b[i]));
  }
}

TEST_CASE("checkpointing changes no bit of results and gradients") {
  torch::manual_seed(7);
  for (auto& [name, block] : all_blocks()) {
    INFO(name);
    const State start = block->forward(random_input(5, 4), {}, {}).second;
    const at::Tensor x = random_input(5, 7);
    at::Tensor reset = at::zeros({5, 7}, at::kBool);
    reset[1][3].fill_(true);
    check_equal(run(block, true, x, {}, {}), run(block, false, x, {}, {}));
    check_equal(run(block, true, x, start, reset), run(block, false, x, start, reset));
  }
}

TEST_CASE("checkpointing repeats dropout and leaves the random stream where it was") {
  auto options = mlstm_options();
  options.dropout = 0.5;
  torch::manual_seed(8);
  const auto block = named_block<MlstmBlock>("dropout", options).block;
  const at::Tensor x = random_input(5, 7);
  const auto draw = [&](bool checkpointed) {
    torch::manual_seed(9);
    auto results = run(block, checkpointed, x, {}, {});
    results.push_back(at::rand({4}));  // the stream behind the backward pass
    return results;
  };
  check_equal(draw(true), draw(false));
  const auto draw_between = [&](bool checkpointed) {
    torch::manual_seed(9);
    const at::Tensor leaf = x.clone().set_requires_grad(true);
    const at::Tensor y =
        (checkpointed ? checkpoint(block, leaf, {}, {}) : block->forward(leaf, {}, {})).first;
    const at::Tensor between = at::rand({3});
    y.sum().backward();
    return std::vector<at::Tensor>{leaf.grad(), between, at::rand({4})};
  };
  check_equal(draw_between(true), draw_between(false));
  block->eval();
  check_equal(draw(true), draw(false));
}

TEST_CASE("checkpointing asks no generator for a block that draws nothing") {
  auto options = mlstm_options();
  options.dropout = 0.5;  // drawn all the same, which shows that the stream is not put back
  torch::manual_seed(8);
  const auto block = named_block<MlstmBlock>("dropout", options).block;
  const at::Tensor x = random_input(5, 7).set_requires_grad(true);
  const auto draw_behind = [&](bool draws) {
    torch::manual_seed(9);
    checkpoint(block, x, {}, {}, /*fused=*/true, draws).first.sum().backward();
    return at::rand({4});
  };
  const at::Tensor behind = draw_behind(true);
  CHECK(at::equal(behind, draw_behind(true)));
  CHECK_FALSE(at::equal(behind, draw_behind(false)));
}

TEST_CASE(
    "checkpointing under autocast computes the backward pass in the forward pass's precision") {
  torch::manual_seed(10);
  for (const char* kind : {"mlstm", "slstm", "large"}) {
    INFO(kind);
    std::shared_ptr<Block> block =
        kind == std::string("mlstm")   ? named_block<MlstmBlock>("", mlstm_options()).block
        : kind == std::string("slstm") ? named_block<SlstmBlock>("", slstm_options()).block
                                       : named_block<XlstmLargeBlock>("", large_options()).block;
    block->to(at::kFloat);
    const at::Tensor x = random_input(5, 7).to(at::kFloat);
    const auto with_autocast = [&](bool checkpointed) {
      at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
      at::autocast::set_autocast_enabled(at::kCPU, true);
      auto results = run(block, checkpointed, x, {}, {});
      at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(at::kCPU, false);
      return results;
    };
    const auto plain = run(block, false, x, {}, {});
    const auto low = with_autocast(true);
    check_equal(low, with_autocast(false));
    CHECK_FALSE(at::equal(low[0], plain[0]));   // autocast did something
    CHECK(low[0].scalar_type() == at::kFloat);  // the residual stream stays float32
  }
}

TEST_CASE(
    "a checkpointed block accumulates as any other, and each accumulation is announced once") {
  torch::manual_seed(11);
  const auto block = named_block<MlstmBlock>("", mlstm_options()).block;
  const at::Tensor x = random_input(2, 5);
  block->forward(x, {}, {}).first.sum().backward();
  std::vector<at::Tensor> plain;
  std::vector<c10::intrusive_ptr<torch::autograd::Node>>
      keep_alive;  // hooks live as long as their nodes
  int announced = 0;
  for (auto& parameter : block->parameters()) {
    plain.push_back(parameter.grad().clone());
    parameter.mutable_grad() = at::Tensor();
    // What data parallelism listens to.
    keep_alive.push_back(torch::autograd::impl::grad_accumulator(parameter));
    keep_alive.back()->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
        [&announced](const torch::autograd::variable_list& outputs,
                     const torch::autograd::variable_list&) {
          ++announced;
          return outputs;
        }));
  }
  for (int repeat = 0; repeat < 2; ++repeat) checkpoint(block, x, {}, {}).first.sum().backward();
  const auto parameters = block->parameters();
  CHECK(announced == 2 * static_cast<int>(parameters.size()));
  for (size_t i = 0; i < parameters.size(); ++i)
    CHECK(at::equal(parameters[i].grad(), 2 * plain[i]));
}

TEST_CASE("hooks on the parameters and inputs of a checkpointed block are called once") {
  torch::manual_seed(13);
  const auto block = named_block<MlstmBlock>("", mlstm_options()).block;
  const at::Tensor x = random_input(2, 5).set_requires_grad(true);
  int called = 0;
  auto tensors = block->parameters();
  tensors.push_back(x);
  for (auto& tensor : tensors)
    tensor.register_hook([&called](const at::Tensor& gradient) {
      ++called;
      return gradient * 2;
    });
  const auto gradients = [&](bool checkpointed) {
    called = 0;
    for (auto& tensor : tensors) tensor.mutable_grad() = at::Tensor();
    (checkpointed ? checkpoint(block, x, {}, {}) : block->forward(x, {}, {}))
        .first.sum()
        .backward();
    CHECK(called == static_cast<int>(tensors.size()));
    std::vector<at::Tensor> found;
    for (const auto& tensor : tensors) found.push_back(tensor.grad());
    return found;
  };
  check_equal(gradients(true), gradients(false));
}

TEST_CASE("what changes between the passes of a checkpointed block changes no gradient") {
  auto options = mlstm_options();
  options.dropout = 0.5;
  torch::manual_seed(14);
  const auto block = named_block<MlstmBlock>("dropout", options).block;
  const at::Tensor x = random_input(5, 7).set_requires_grad(true);
  const at::Tensor reset = at::zeros({5, 7}, at::kBool);
  const auto passes = [&](const auto& between) {
    torch::manual_seed(15);
    const at::Tensor loss = checkpoint(block, x, {}, reset).first.sum();
    between();
    return torch::autograd::grad({loss}, {x})[0];
  };
  const at::Tensor expected = passes([] {});
  CHECK(at::equal(passes([&] { block->eval(); }), expected));
  CHECK_FALSE(block->is_training());  // as the caller left it
  block->train();
  const std::string message = message_of([&] { passes([&] { reset.fill_(true); }); });
  CHECK(contains(message, "modified by an inplace operation"));
}

TEST_CASE("a checkpointed block has no second derivative, and says so") {
  torch::manual_seed(16);
  const auto block = named_block<MlstmBlock>("", mlstm_options()).block;
  const at::Tensor x = random_input(2, 5).set_requires_grad(true);
  const at::Tensor loss = checkpoint(block, x, {}, {}).first.sum();
  const std::string message =
      message_of([&] { torch::autograd::grad({loss}, {x}, {}, true, /*create_graph=*/true); });
  CHECK(contains(message, "second derivatives are not implemented"));
}

TEST_CASE("without gradients a checkpointed block is the block") {
  torch::manual_seed(12);
  at::NoGradGuard no_grad;
  const auto block = named_block<SlstmBlock>("", slstm_options()).block;
  const at::Tensor x = random_input(2, 5);
  CHECK(at::equal(checkpoint(block, x, {}, {}).first, block->forward(x, {}, {}).first));
}

}  // namespace
}  // namespace xlstm::nn::test
