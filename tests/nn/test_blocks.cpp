// What every block promises about time: any split of a sequence gives the same result, one token at a time included,
// and a reset separates documents to the last bit.
#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

constexpr double kTolerance = 1e-9;  // float64; chunks sum in another order than steps

TEST_CASE("a sequence in pieces gives what it gives in one pass") {
  torch::manual_seed(1);
  for (auto& [name, block] : all_blocks()) {
    INFO(name);
    const at::Tensor x =
        random_input(3, 11);  // blocks compute 32 tokens and fewer in different ways
    const auto [whole, whole_state] = block->forward(x, {}, {});
    for (const std::vector<int64_t>& pieces :
         {std::vector<int64_t>{5, 6}, std::vector<int64_t>{1, 0, 9, 1},
          std::vector<int64_t>{0, 11}}) {
      State state;
      std::vector<at::Tensor> parts;
      for (const auto& piece : x.split_with_sizes(pieces, 1)) {
        auto [y, next] = block->forward(piece, state, {});
        REQUIRE(y.sizes() == piece.sizes());
        parts.push_back(y);
        state = next;
      }
      CHECK(difference(at::cat(parts, 1), whole) < kTolerance);
      CHECK(difference(state, whole_state) < kTolerance);
    }
  }
}

TEST_CASE("decoding without gradients equals the parallel pass and leaves the given state alone") {
  torch::manual_seed(2);
  for (auto& [name, block] : all_blocks()) {
    INFO(name);
    const at::Tensor x = random_input(4, 9);
    const auto [whole, whole_state] = block->forward(x, {}, {});
    at::NoGradGuard no_grad;
    State state;
    std::vector<at::Tensor> parts;
    for (int64_t t = 0; t < x.size(1); ++t) {
      State copy;
      for (const auto& tensor : state) copy.push_back(tensor.clone());
      auto [y, next] = block->forward(x.narrow(1, t, 1), state, {});
      parts.push_back(y);
      REQUIRE(state.size() == copy.size());
      for (size_t i = 0; i < state.size(); ++i) REQUIRE(at::equal(state[i], copy[i]));
      state = next;
    }
    CHECK(difference(at::cat(parts, 1), whole) < kTolerance);
    CHECK(difference(state, whole_state) < kTolerance);
  }
}

TEST_CASE("states that lag behind a ring of tokens are folded for whoever does not decode") {
  torch::manual_seed(7);
  for (auto& [name, block] : all_blocks()) {
    const bool has_mlstm = name.rfind("mlstm", 0) == 0 || name == "xlstm_large";
    for (const bool lazy : {false, true}) {
      INFO(name << ", lazy " << lazy);
      const at::Tensor x = random_input(2, 45);
      const auto [whole, whole_state] = block->forward(x, {}, {});
      at::NoGradGuard no_grad;
      State state;
      std::vector<at::Tensor> parts;
      for (int64_t t = 0; t < 41; ++t) {
        const InPlaceStateGuard guard(lazy);
        auto [y, next] = block->forward(x.narrow(1, t, 1), state, {});
        parts.push_back(y);
        state = std::move(next);
      }
      CHECK(state.size() == whole_state.size() + (lazy && has_mlstm ? 4 : 0));
      State copy;
      for (const auto& tensor : state) copy.push_back(tensor.clone());
      // One more token in one step and three in one pass, on states as everybody knows them.
      for (const int64_t length : {1, 3}) {
        auto [y, next] = block->forward(x.narrow(1, length == 1 ? 41 : 42, length), state, {});
        parts.push_back(y);
        REQUIRE(next.size() == whole_state.size());
        if (length == 1)
          for (size_t i = 0; i < state.size(); ++i) REQUIRE(at::equal(state[i], copy[i]));
        state = std::move(next);
      }
      CHECK(difference(at::cat(parts, 1), whole) < kTolerance);
      CHECK(difference(state, whole_state) < kTolerance);
    }
  }
}

TEST_CASE("gradients reach the given state and everything before it") {
  torch::manual_seed(3);
  for (auto& [name, block] : all_blocks()) {
    INFO(name);
    at::Tensor x = random_input(5, 8).set_requires_grad(true);
    const at::Tensor weight = random_input(5, 8);
    const auto gradient = [&](const at::Tensor& y) {
      return torch::autograd::grad({(y * weight).sum()}, {x})[0];
    };
    const at::Tensor whole = gradient(block->forward(x, {}, {}).first);
    auto [first, state] = block->forward(x.narrow(1, 0, 5), {}, {});
    const at::Tensor second = block->forward(x.narrow(1, 5, 3), state, {}).first;
    CHECK(difference(gradient(at::cat({first, second}, 1)), whole) < kTolerance);
  }
}

TEST_CASE("one token and no token") {
  torch::manual_seed(4);
  for (auto& [name, block] : all_blocks()) {
    INFO(name);
    const at::Tensor x = random_input(2, 3);
    const State state = block->forward(x, {}, {}).second;
    const auto [empty, same] = block->forward(x.narrow(1, 0, 0), state, {});
    CHECK(empty.sizes() == at::IntArrayRef({2, 0, kDim}));
    CHECK(difference(same, state) == 0);
    const auto [nothing, start] = block->forward(x.narrow(1, 0, 0), {}, {});
    const at::Tensor y = block->forward(x, start, {}).first;
    CHECK(difference(y, block->forward(x, {}, {}).first) < kTolerance);
    const at::Tensor one = block->forward(x.narrow(1, 0, 1), {}, {}).first;
    CHECK(difference(one, y.narrow(1, 0, 1)) < kTolerance);
  }
}

/// Outputs of the second document, the state behind it, and the gradients of a loss on the second document alone.
std::vector<at::Tensor> second_document(Block& block, const at::Tensor& input,
                                        const at::Tensor& reset, int64_t border) {
  const at::Tensor x = input.detach().clone().set_requires_grad(true);
  auto [y, state] = block.forward(x, {}, reset);
  const at::Tensor document = y.narrow(1, border, y.size(1) - border);
  std::vector<at::Tensor> wanted = block.parameters();
  wanted.push_back(x);
  auto result = torch::autograd::grad({(document * document).sum()}, wanted);
  result.push_back(document.detach());
  for (const auto& tensor : state) result.push_back(tensor.detach());
  return result;
}

TEST_CASE("a changed token changes no bit of the document behind it") {
  torch::manual_seed(5);
  constexpr int64_t kLength = 13, kBorder = 6;
  for (auto& [name, block] : all_blocks()) {
    const at::Tensor x = random_input(3, kLength);
    at::Tensor reset = at::zeros({3, kLength}, at::kBool);
    reset.select(1, kBorder).fill_(true);
    const auto before = second_document(*block, x, reset, kBorder);
    for (const int64_t t : {int64_t{0}, kBorder - 1}) {
      at::Tensor changed = x.clone();
      changed.select(1, t).mul_(-3).add_(7);
      const auto after = second_document(*block, changed, reset, kBorder);
      REQUIRE(before.size() == after.size());
      for (size_t i = 0; i < before.size(); ++i) {
        INFO(name << ", token " << t << ", tensor " << i);
        CHECK(at::equal(before[i], after[i]));
      }
    }
    // and the second document is what it is alone
    const auto alone = block->forward(x.narrow(1, kBorder, kLength - kBorder), {}, {});
    const auto packed = block->forward(x, {}, reset);
    INFO(name);
    CHECK(difference(packed.first.narrow(1, kBorder, kLength - kBorder), alone.first) < kTolerance);
    CHECK(difference(packed.second, alone.second) < kTolerance);
  }
}

TEST_CASE("a state of the wrong size is refused") {
  for (auto& [name, block] : all_blocks()) {
    INFO(name);
    const auto call = [&, &b = *block] { b.forward(random_input(1, 2), {at::zeros({1})}, {}); };
    CHECK(contains(message_of(call), "expected a state of"));
  }
}

TEST_CASE("a residual stream is the same with and without additions in the norms") {
  const bool bias = GENERATE(false, true);
  Norm norm(kDim, 1e-5, bias ? "layer" : "rms", at::kCPU, bias);
  randomize(norm);
  norm.to(at::kDouble);
  const at::Tensor x = random_input(2, 5), branch = random_input(2, 5), last = random_input(2, 5);
  x.requires_grad_(), branch.requires_grad_(), last.requires_grad_();
  const auto run = [&](bool fused) {
    Residual stream(x, fused);
    at::Tensor y = stream.normed(norm);  // nothing waits
    stream.add(branch);
    y = y * stream.normed(norm);
    CHECK((y.grad_fn()->next_edge(1).function->name().find("ResidualNorm") != std::string::npos) ==
          fused);
    stream.add(branch * y), stream.add(last);  // two additions before a norm
    y = y + stream.normed(norm);
    stream.add(y);
    std::vector<at::Tensor> results{stream.sum()};
    for (const at::Tensor& grad :
         torch::autograd::grad({stream.sum().square().sum()}, {x, branch, last, norm.weight}))
      results.push_back(grad);
    return results;
  };
  const auto fused = run(true), steps = run(false);
  for (size_t i = 0; i < fused.size(); ++i) CHECK(difference(fused[i], steps[i]) < kTolerance);
}

}  // namespace
}  // namespace xlstm::nn::test
