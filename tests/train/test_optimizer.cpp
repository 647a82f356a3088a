// AdamW against the update rule written out in double precision.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "csrc/core/error.h"
#include "csrc/models/language_model.h"
#include "tests/support/catch.h"
#include "tests/train/processes_here.h"
#include "train/optimizer.h"

using namespace xlstm;
using train::AdamW;
using train::ProcessesHere;

namespace {

at::Tensor parameter(at::IntArrayRef shape) {
  return at::randn(shape, at::kDouble).set_requires_grad(true);
}

NamedTensors some_parameters() {
  return {{"token_embedding.weight", parameter({5, 3})},
          {"blocks.0.proj_up.weight", parameter({3, 7})},
          {"blocks.0.proj_up.bias", parameter({7})},
          {"blocks.0.norm.weight", parameter({3})}};
}

at::Tensor number(double value, at::ScalarType type = at::kDouble) {
  return at::full({}, value, type);
}

struct Oracle {
  std::vector<double> p, m, v;
  explicit Oracle(const at::Tensor& tensor)
      : p(tensor.data_ptr<double>(), tensor.data_ptr<double>() + tensor.numel()),
        m(p.size()),
        v(p.size()) {}
  void step(const std::vector<double>& g, double lr, double decay, int64_t t,
            const config::OptimConfig& o) {
    for (size_t i = 0; i < p.size(); ++i) {
      p[i] -= lr * decay * p[i];
      m[i] = o.beta1 * m[i] + (1 - o.beta1) * g[i];
      v[i] = o.beta2 * v[i] + (1 - o.beta2) * g[i] * g[i];
      const double m_hat = m[i] / (1 - std::pow(o.beta1, static_cast<double>(t)));
      const double v_hat = v[i] / (1 - std::pow(o.beta2, static_cast<double>(t)));
      p[i] -= lr * m_hat / (std::sqrt(v_hat) + o.eps);
    }
  }
};

void set_gradient(const at::Tensor& parameter, const at::Tensor& gradient) {
  parameter.mutable_grad() = gradient;
}

}  // namespace

TEST_CASE("AdamW follows its rule, with decay on the matrices alone") {
  config::OptimConfig options;
  options.weight_decay = 0.3;
  const NamedTensors parameters = some_parameters();
  const std::vector<double> decay = {0, 0.3, 0, 0};
  std::vector<Oracle> oracles;
  for (const auto& entry : parameters) oracles.emplace_back(entry.second);
  AdamW optimizer(parameters, options);
  for (int64_t t = 1; t <= 5; ++t) {
    const double lr = 0.01 / static_cast<double>(t), factor = t == 3 ? 0.25 : 1.0;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const at::Tensor& p = parameters[i].second;
      const at::Tensor gradient = at::randn(p.sizes(), at::kDouble);
      const double* data = gradient.data_ptr<double>();
      std::vector<double> clipped(data, data + gradient.numel());
      for (double& g : clipped) g *= factor;
      set_gradient(p, gradient);
      oracles[i].step(clipped, lr, decay[i], t, options);
    }
    optimizer.step(number(lr), factor == 1.0 ? at::Tensor() : number(1 / factor, at::kFloat));
    CHECK(optimizer.steps() == t);
    for (size_t i = 0; i < parameters.size(); ++i) {
      for (size_t k = 0; k < oracles[i].p.size(); ++k) {
        REQUIRE(parameters[i].second.data_ptr<double>()[k] ==
                Approx(oracles[i].p[k]).epsilon(1e-12));
      }
    }
  }
  optimizer.zero_grad();
  for (const auto& entry : parameters) CHECK(!entry.second.grad().defined());
}

TEST_CASE("which parameters decay") {
  const at::Tensor matrix = at::ones({2, 2}), vector = at::ones({2});
  CHECK(models::decays("blocks.0.q_proj.weight", matrix, false));
  CHECK(models::decays("lm_head.weight", matrix, false));
  CHECK(!models::decays("blocks.0.q_proj.bias", vector, false));
  CHECK(!models::decays("blocks.0.xlstm_norm.weight", vector, false));
  CHECK(!models::decays("blocks.0.learnable_skip", vector, false));
  CHECK(!models::decays("blocks.0.slstm_cell._recurrent_kernel_", matrix, false));
  CHECK(!models::decays("token_embedding.weight", matrix, false));
  CHECK(models::decays("token_embedding.weight", matrix, true));
}

TEST_CASE("a parameter without a gradient stays, and so does its state") {
  const NamedTensors parameters = some_parameters();
  AdamW optimizer(parameters, {});
  const at::Tensor before = parameters[1].second.detach().clone();
  set_gradient(parameters[0].second, at::ones({5, 3}, at::kDouble));
  optimizer.step(number(0.1));
  CHECK(parameters[1].second.equal(before));
}

TEST_CASE("an update that is to be skipped changes nothing") {
  const NamedTensors parameters = some_parameters();
  AdamW optimizer(parameters, {});
  const auto update = [&](double skip) {
    for (const auto& entry : parameters) set_gradient(entry.second, at::ones_like(entry.second));
    optimizer.step(number(0.1), number(2, at::kFloat), number(skip, at::kFloat));
  };
  update(0);
  std::vector<at::Tensor> before;
  for (const auto& entry : parameters) before.push_back(entry.second.detach().clone());
  for (const auto& entry : optimizer.state()) before.push_back(entry.second.clone());
  update(1);
  CHECK(optimizer.steps() == 1);
  size_t i = 0;
  for (const auto& entry : parameters) CHECK(entry.second.equal(before[i++]));
  for (const auto& entry : optimizer.state()) CHECK(entry.second.equal(before[i++]));
  update(0);
  CHECK(optimizer.steps() == 2);
  CHECK(!parameters[0].second.equal(before[0]));
}

TEST_CASE("the state goes out and in without changing a bit") {
  const NamedTensors first = some_parameters();
  NamedTensors second;
  for (const auto& [name, p] : first)
    second.emplace_back(name, p.detach().clone().set_requires_grad(true));
  AdamW a(first, {}), b(second, {});
  const auto update = [](AdamW& optimizer, const NamedTensors& parameters) {
    for (const auto& entry : parameters) set_gradient(entry.second, entry.second.detach().mul(2));
    optimizer.step(number(0.01));
  };
  update(a, first);
  update(a, first);
  {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < first.size(); ++i) second[i].second.copy_(first[i].second);
  }
  b.load_state(a.state());
  CHECK(b.steps() == 2);
  update(a, first);
  update(b, second);
  for (size_t i = 0; i < first.size(); ++i) CHECK(first[i].second.equal(second[i].second));
  CHECK(a.state().size() == 9);
}

TEST_CASE("three processes share the state, and update as one does") {
  // Threads in the place of processes. 130 and 3 elements: pieces inside, at the ends of and larger than a parameter.
  constexpr int64_t kProcesses = 3;
  const ProcessesHere here;
  const auto parameters = [] {
    at::manual_seed(1);
    return NamedTensors{{"embedding.weight", at::randn({13, 10}).set_requires_grad(true)},
                        {"proj.weight", at::randn({40, 7}).set_requires_grad(true)},
                        {"proj.bias", at::randn({3}).set_requires_grad(true)},
                        {"unused.weight", at::randn({70, 2}).set_requires_grad(true)}};
  };
  const auto train = [](AdamW& optimizer, const NamedTensors& of) {
    for (int step = 1; step <= 3; ++step) {
      for (size_t i = 0; i < 3; ++i)
        set_gradient(of[i].second, of[i].second.detach().sin().mul(step));
      optimizer.step(number(0.1), number(2, at::kFloat), number(0, at::kFloat));
      optimizer.zero_grad();
    }
  };
  config::OptimConfig options;
  const NamedTensors whole = parameters();
  AdamW alone(whole, options);
  train(alone, whole);
  const NamedTensors expected = alone.state();
  options.shard = true;
  std::array<NamedTensors, kProcesses> own, states;
  std::array<int64_t, kProcesses> bytes{};
  for (NamedTensors& of : own) of = parameters();  // drawn one after the other
  here.run(kProcesses, [&](train::ProcessGroup& group) {
    const auto rank = static_cast<size_t>(group.place().rank);
    AdamW optimizer(own[rank], options, &group);
    bytes[rank] = optimizer.bytes();
    train(optimizer, own[rank]);
    const NamedTensors state = optimizer.state();
    AdamW next(own[rank], options, &group);
    next.load_state(state);
    states[rank] = next.state();
  });
  CHECK(bytes[0] + bytes[1] + bytes[2] == alone.bytes());
  CHECK(*std::max_element(bytes.begin(), bytes.end()) <= alone.bytes() / kProcesses + 8 * 64);
  for (const NamedTensors& of : own)
    for (size_t i = 0; i < of.size(); ++i) CHECK(of[i].second.equal(whole[i].second));
  CHECK(states[1].empty());
  REQUIRE(states[0].size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(states[0][i].first == expected[i].first);
    CHECK(states[0][i].second.equal(expected[i].second));
  }
}

TEST_CASE("a port that is none is refused") {
  const ProcessesHere here;
  for (const char* port : {"70000", "65536", "4294967297", "0", "x"}) {
    ::setenv("MASTER_PORT", port, 1);
    try {
      here.run(2, [](train::ProcessGroup&) {});
      FAIL("met at port " << port);
    } catch (const Error& error) {
      CHECK(error.code == ExitCode::kConfig);
      CHECK(std::string(error.what()).find("MASTER_PORT is '" + std::string(port)) !=
            std::string::npos);
    }
  }
}

TEST_CASE("a state of another model is refused by name") {
  AdamW optimizer(some_parameters(), {});
  const auto message_of = [&](const NamedTensors& state) -> std::string {
    try {
      optimizer.load_state(state);
    } catch (const Error& error) {
      CHECK(error.code == ExitCode::kCheckpoint);
      return error.what();
    }
    return "";
  };
  NamedTensors state = optimizer.state();
  state.pop_back();
  CHECK(message_of(state).find("lacks step") != std::string::npos);
  state = optimizer.state();
  state.emplace_back("exp_avg.other", at::zeros({1}));
  CHECK(message_of(state).find("exp_avg.other") != std::string::npos);
  state = optimizer.state();
  state[0].second = at::zeros({3, 5}, at::kDouble);
  CHECK(message_of(state).find(state[0].first) != std::string::npos);
}
