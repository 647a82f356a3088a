// The LSTM layer by torch's LSTM, which a GPU runs, against the operator xlstm::slstm: weights, biases and states mean the
// same in both.
#include "csrc/nn/lstm.h"
#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

TEST_CASE("torch's LSTM is the operator's lstm cell: values, states, gradients") {
  torch::manual_seed(11);
  for (const bool training : {false, true})
    for (const bool given : {false, true})
      for (const int64_t length : {1, 9}) {
        CAPTURE(training, given, length);
        LstmLayer layer(kDim, at::kCPU);
        layer.to(at::kDouble);
        randomize(layer);
        layer.train(training);
        const at::Tensor x = at::randn({3, length, kDim}, at::kDouble).requires_grad_();
        State state;
        if (given)
          for (int i = 0; i < 2; ++i)
            state.push_back(at::randn({3, 1, kDim}, at::kDouble).requires_grad_());
        std::vector<at::Tensor> leaves{x};
        for (const at::Tensor& each : layer.parameters()) leaves.push_back(each);
        leaves.insert(leaves.end(), state.begin(), state.end());
        const at::Tensor dy = at::randn({3, length, kDim}, at::kDouble),
                         d_last = at::randn({3, 1, kDim}, at::kDouble),
                         d_cell = at::randn({3, 1, kDim}, at::kDouble);
        const auto gradients = [&](const Result& result) {
          return torch::autograd::grad({result.first, result.second[0], result.second[1]}, leaves,
                                       {dy, d_last, d_cell});
        };
        const Result operators = layer.forward(x, state, {}),
                     torchs = layer.forward_by_torch(x, state);
        REQUIRE(torchs.first.sizes() == operators.first.sizes());
        REQUIRE(torchs.second.size() == 2);
        CHECK(difference(torchs.first, operators.first) < 1e-13);
        CHECK(difference(torchs.second, operators.second) < 1e-13);
        const auto expected = gradients(operators), got = gradients(torchs);
        for (size_t i = 0; i < leaves.size(); ++i) {
          CAPTURE(i);
          CHECK(difference(got[i], expected[i]) < 1e-11);
        }
      }
}

}  // namespace
}  // namespace xlstm::nn::test
