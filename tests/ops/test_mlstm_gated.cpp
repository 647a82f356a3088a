// mLSTM with gates linear in q, k, v (csrc/ops/mlstm_gated.h) against the same written out: a concatenation, a linear map
// and mlstm_chunkwise.
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/autograd/autograd.h>

#include "csrc/ops/mlstm_gated.h"
#include "csrc/ops/products.h"
#include "tests/ops/mlstm_cases.h"

namespace {

using at::Tensor;
using xlstm::ops::MlstmOptions;
using xlstm::test::Case;
using xlstm::test::Problem;
using Tensors = std::vector<Tensor>;

const char* const kNames[] = {"h",  "c",  "n",     "m",   "dq",  "dk",
                              "dv", "dw", "dbias", "dc0", "dn0", "dm0"};

/// q, k, v, weight, bias, c0, n0, m0
Tensors inputs_of(const Problem& p) {
  const Case& c = p.c;
  const int64_t width = c.heads * (2 * c.dqk + c.dv);
  const Tensor weight = at::randn({2 * c.heads, width}, p.q.options()) / std::sqrt(width);
  return {p.q, p.k, p.v, weight, at::randn({2 * c.heads}, p.q.options()), p.c0, p.n0, p.m0};
}

Tensors gated(const Tensors& x, const MlstmOptions& options) {
  const auto [h, c, n, m] =
      xlstm::ops::mlstm_gated(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], options);
  return {h, c, n, m};
}

Tensors written_out(const Tensors& x, const MlstmOptions& options) {
  const Tensor qkv = at::cat({x[0].flatten(2), x[1].flatten(2), x[2].flatten(2)}, -1);
  const Tensors gates = at::linear(qkv, x[3], x[4]).chunk(2, -1);
  const auto [h, c, n, m] =
      xlstm::ops::mlstm_chunkwise(x[0], x[1], x[2], gates[0], gates[1], x[5], x[6], x[7], options);
  return {h, c, n, m};
}

/// Outputs, then gradients of all inputs.
template <class Function>
Tensors run(const Function& function, const Tensors& inputs, const Problem& p) {
  const xlstm::test::Threads one(1);
  Tensors leaves;
  for (const Tensor& x : inputs) leaves.push_back(x.detach().clone().requires_grad_());
  Tensors results = function(leaves, p.options());
  const auto state = results[1].scalar_type();
  const Tensors gradients =
      torch::autograd::grad({results[0], results[1], results[2]}, leaves,
                            {p.dh.to(results[0].scalar_type()), p.dc.to(state), p.dn.to(state)});
  results.insert(results.end(), gradients.begin(), gradients.end());
  return results;
}

/// In norm, relative to what was expected.
double error(const Tensor& got, const Tensor& expected) {
  const Tensor wide = expected.to(at::kDouble);
  return (got.to(at::kDouble) - wide).norm().item<double>() /
         std::max(wide.norm().item<double>(), 1e-6);
}

void check_same(const Tensors& got, const Tensors& expected, double tolerance) {
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO(kNames[i]);
    REQUIRE(got[i].sizes() == expected[i].sizes());
    CHECK(got[i].scalar_type() == expected[i].scalar_type());
    CHECK(error(got[i], expected[i]) <= tolerance);
  }
}

struct CpuAutocast {
  CpuAutocast() {
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~CpuAutocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("mlstm_gated: values and gradients of gates written out") {
  const Case cases[] = {
      {},
      {1, 1, 1, 1, 3},
      {3, 1, 2, 4, 4},
      {2, 33, 4, 8, 8, true, false},
      {1, 0, 2, 3, 5},
      {2, 9, 3, 5, 7, true, true, true, false},
      {1, 2048, 2, 3, 2, true, true}};  // the gradient of the weight in four parts
  for (const Case& which : cases) {
    CAPTURE(which.batch, which.time, which.dqk, which.dv);
    const Problem p(which);
    const Tensors inputs = inputs_of(p);
    check_same(run(gated, inputs, p), run(written_out, inputs, p), 1e-11);
  }
}

TEST_CASE("mlstm_gated takes views") {
  const Problem p({});
  Tensors inputs = inputs_of(p);
  const Tensors expected = run(written_out, inputs, p);
  const auto strided = [](const Tensors& x, const MlstmOptions& options) {
    Tensors views = x;
    // q and k lie in one tensor beside each other, v with its heads outside.
    const Tensors qk = at::cat({x[0].flatten(2), x[1].flatten(2)}, -1).chunk(2, -1);
    views[0] = qk[0].view(x[0].sizes());
    views[1] = qk[1].view(x[1].sizes());
    views[2] = x[2].transpose(1, 2).contiguous().transpose(1, 2);
    views[3] = x[3].t().contiguous().t();
    return gated(views, options);
  };
  check_same(run(strided, inputs, p), expected, 1e-11);
}

TEST_CASE("mlstm_gated: some gradients, and none") {
  const Problem p({});
  const Tensors inputs = inputs_of(p);
  const auto gradients = [&](const auto& function, size_t output, const Tensors& wanted_of) {
    Tensors x = inputs, wanted;
    for (size_t i = 0; i < x.size(); ++i) {
      if (!wanted_of[i].defined()) continue;
      x[i] = x[i].clone().requires_grad_();
      wanted.push_back(x[i]);
    }
    return torch::autograd::grad({function(x, p.options())[output].square().sum()}, wanted);
  };
  Tensors only_k = Tensors(8), only_weight = Tensors(8);
  only_k[1] = inputs[1];
  only_weight[3] = inputs[3];
  for (const size_t output : {0, 1, 2}) {
    for (const Tensors& wanted : {only_k, only_weight}) {
      const Tensors got = gradients(gated, output, wanted);
      CHECK(error(got[0], gradients(written_out, output, wanted)[0]) < 1e-11);
    }
  }
  const Tensors recorded = run(gated, inputs, p);
  const xlstm::test::Threads one(1);
  const Tensors plain = gated(inputs, p.options());
  for (size_t i = 0; i < plain.size(); ++i) {
    CHECK_FALSE(plain[i].requires_grad());
    CHECK(error(plain[i], recorded[i]) < 1e-14);
  }
}

TEST_CASE("mlstm_gated without states") {
  const Problem p({});
  const Tensors inputs = inputs_of(p);
  Tensors zeros = inputs;
  for (size_t i = 5; i < 8; ++i) zeros[i] = at::zeros_like(inputs[i]);
  const auto stateless = [](const Tensors& x, const MlstmOptions& options) {
    const auto [h, c, n, m] =
        xlstm::ops::mlstm_gated(x[0], x[1], x[2], x[3], x[4], {}, {}, {}, options);
    return Tensors{h, c, n, m};
  };
  check_same(stateless(inputs, p.options()), written_out(zeros, p.options()), 1e-11);
}

TEST_CASE("mlstm_gated in low precision does not round the gates") {
  const Problem p({2, 96, 4, 16, 16});
  const Tensors inputs = inputs_of(p);
  for (const bool autocast : {false, true}) {
    for (const auto type : {at::kBFloat16, at::kHalf}) {
      if (autocast && type == at::kHalf) continue;
      CAPTURE(autocast, type);
      Tensors low;
      for (size_t i = 0; i < inputs.size(); ++i)
        low.push_back(inputs[i].to(type).to(i < 5 && !autocast ? type : at::kFloat));
      Tensors wide;
      for (const Tensor& x : low) wide.push_back(x.to(at::kDouble));
      const auto in_low = [&](const auto& function) {
        return [&](const Tensors& x, const MlstmOptions& options) {
          std::optional<CpuAutocast> on;
          if (autocast) on.emplace();
          return function(x, options);
        };
      };
      const Tensors exact = run(written_out, wide, p);
      const Tensors got = run(in_low(gated), low, p), rounded = run(in_low(written_out), low, p);
      for (size_t i = 0; i < got.size(); ++i) {
        INFO(kNames[i]);
        CHECK(got[i].scalar_type() == rounded[i].scalar_type());
        CHECK(error(got[i], exact[i]) <= 2 * error(rounded[i], exact[i]) + 1e-6);
      }
      CHECK(error(got[3], exact[3]) < 1e-5);  // m shows the gates
      CHECK(error(rounded[3], exact[3]) > 1e-5);
    }
  }
}

TEST_CASE("mlstm_gated under autocast gives the weights' gradients unrounded") {
  const Problem p({2, 40, 2, 8, 8});
  Tensors inputs;
  for (const Tensor& x : inputs_of(p)) inputs.push_back(x.to(at::kFloat));
  const auto low = [](const Tensors& x, const MlstmOptions& options) {
    const CpuAutocast on;
    return gated(x, options);
  };
  const Tensors got = run(low, inputs, p);
  CHECK(got[0].scalar_type() == at::kBFloat16);
  CHECK(got[1].scalar_type() == at::kFloat);
  for (const size_t i : {7, 8}) {
    CHECK(got[i].scalar_type() == at::kFloat);
    CHECK_FALSE(at::equal(got[i], got[i].to(at::kBFloat16).to(at::kFloat)));
  }
}

TEST_CASE("mlstm_gated has first derivatives alone") {
  const Problem p({1, 4, 1, 2, 2});
  Tensors inputs = inputs_of(p);
  for (Tensor& x : inputs) x = x.clone().requires_grad_();
  const Tensor loss = gated(inputs, p.options())[0].square().sum();
  const Tensors first = torch::autograd::grad({loss}, {inputs[0], inputs[3]}, {}, true, true);
  Tensors same = inputs;
  for (Tensor& x : same) x = x.detach().clone().requires_grad_();
  const Tensors expected =
      torch::autograd::grad({written_out(same, p.options())[0].square().sum()}, {same[0], same[3]});
  CHECK(error(first[0], expected[0]) < 1e-11);
  CHECK(error(first[1], expected[1]) < 1e-11);
  const std::string message =
      message_of([&] { torch::autograd::grad({first[0].sum()}, {inputs[0]}); });
  CHECK(message.find("mlstm_chunkwise_backward") != std::string::npos);
}

TEST_CASE("mlstm_gated on the meta device") {
  const Problem p({});
  Tensors inputs;
  for (const Tensor& x : inputs_of(p)) inputs.push_back(x.to(at::kMeta).requires_grad_());
  MlstmOptions options;
  const Tensors out = gated(inputs, options);
  CHECK(out[0].sizes() == p.v.sizes());
  CHECK(out[1].sizes() == p.c0.sizes());
  const Tensors gradients = torch::autograd::grad({out[0].sum()}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) CHECK(gradients[i].sizes() == inputs[i].sizes());
}

TEST_CASE("mlstm_gated names the argument that is wrong") {
  const Problem p({});
  const auto message_with = [&](size_t i, const Tensor& x) {
    Tensors inputs = inputs_of(p);
    inputs[i] = x;
    return message_of([&] { gated(inputs, p.options()); });
  };
  CHECK(message_with(0, p.q.flatten(2)).find("mlstm_gated: q") != std::string::npos);
  CHECK(message_with(1, p.v).find("mlstm_gated: k") != std::string::npos);
  for (const Tensor& v : {p.v.flatten(2), p.v.narrow(1, 1, 5)})
    CHECK(message_with(2, v).find("mlstm_gated: v") != std::string::npos);
  CHECK(message_with(3, p.q).find("mlstm_gated: weight") != std::string::npos);
  CHECK(message_with(4, p.q).find("mlstm_gated: bias") != std::string::npos);
  const std::pair<size_t, const char*> others[] = {{1, "k"}, {2, "v"}, {3, "weight"}, {4, "bias"}};
  for (const auto& [i, name] : others)
    CHECK(message_with(i, inputs_of(p)[i].to(at::kMeta))
              .find(std::string(name) + ": expected device cpu, got meta") != std::string::npos);
}

TEST_CASE("products of half precision are float32, and long sums are split evenly") {
  const auto options = at::TensorOptions().dtype(at::kBFloat16);
  const Tensor a = at::randn({5, 64}, options), b = at::randn({64, 3}, options);
  const Tensor exact = a.to(at::kDouble).mm(b.to(at::kDouble));
  const Tensor product = xlstm::ops::full_product(a, b);
  CHECK(product.scalar_type() == at::kFloat);
  CHECK(error(product, exact) < 1e-6);
  CHECK(at::equal(xlstm::ops::full_product(a.unsqueeze(0), b.unsqueeze(0))[0], product));
  CHECK(xlstm::ops::product_chunks(8192, 1, 8, 1536) == 16);
  CHECK(xlstm::ops::product_chunks(8192, 300, 8, 8) == 1);
  CHECK(xlstm::ops::product_chunks(1026, 1, 8, 8) == 2);
  CHECK(xlstm::ops::product_chunks(1025, 1, 8, 8) == 1);
  CHECK(xlstm::ops::product_chunks(0, 1, 8, 8) == 1);
}
