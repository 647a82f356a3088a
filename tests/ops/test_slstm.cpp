// sLSTM and LSTM against the long double oracle: values, gradients by differences, packed sequences, empty sizes,
// extreme gates, isolation of documents.
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>

#include "csrc/ops/slstm.h"
#include "tests/reference/slstm_reference.h"
#include "tests/support/catch.h"

namespace {

using xlstm::reference::SlstmProblem;
using xlstm::reference::SlstmSolution;
using Values = std::vector<long double>;

const char* const kCells[] = {"slstm", "slstm_expf", "lstm"};

struct Setup {
  const char* cell;
  int64_t batch, time, heads, dh;
  bool states = false, resets = false;
  std::vector<int64_t> cu_seqlens = {};
  int gate_dim = 2;     // where the gates stand in wx's memory
  double spread = 1.5;  // of wx
  bool recompute = false;
};

struct Inputs {
  Setup setup;
  at::Tensor wx, r, b;
  std::optional<at::Tensor> y0 = {}, c0 = {}, n0 = {}, m0 = {}, reset = {}, cu_seqlens = {};

  std::vector<at::Tensor*> differentiable() {
    std::vector<at::Tensor*> list{&wx, &r, &b};
    if (y0) list.insert(list.end(), {&*y0, &*c0});
    if (y0 && std::string(setup.cell) != "lstm") list.push_back(&*n0);
    return list;
  }
};

Inputs make_inputs(const Setup& s, at::ScalarType type = at::kDouble) {
  const auto options = at::TensorOptions().dtype(type);
  std::vector<int64_t> sizes{s.batch, s.time, s.heads, s.dh};
  sizes.insert(sizes.begin() + s.gate_dim, 4);
  std::vector<int64_t> order{0, 1, 2, 3};
  for (int64_t& axis : order) axis += axis >= s.gate_dim;
  order.insert(order.begin() + 2, s.gate_dim);
  Inputs in{s, at::randn(sizes, options).mul(s.spread).permute(order),
            at::randn({4, s.heads, s.dh, s.dh}, options).mul(1 / std::sqrt(double(s.dh))),
            at::randn({4, s.heads, s.dh}, options)};
  const int64_t count =
      s.cu_seqlens.empty() ? s.batch : static_cast<int64_t>(s.cu_seqlens.size()) - 1;
  if (s.states) {
    const auto state = [&] { return at::randn({count, s.heads, s.dh}, options); };
    in.y0 = state();
    in.c0 = state();
    in.n0 = state().abs().add(0.3);
    in.m0 = state();
  }
  if (s.resets) in.reset = at::rand({s.batch, s.time}).lt(0.2);
  if (!s.cu_seqlens.empty()) in.cu_seqlens = at::tensor(s.cu_seqlens, at::kInt);
  return in;
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs run(const Inputs& in) {
  return xlstm::ops::slstm(in.wx, in.r, in.b, in.y0, in.c0, in.n0, in.m0,
                           {in.reset, in.cu_seqlens, in.setup.cell, in.setup.recompute});
}

Values values(const at::Tensor& tensor) {
  const at::Tensor t = tensor.detach().to(at::kDouble).contiguous();
  return {t.data_ptr<double>(), t.data_ptr<double>() + t.numel()};
}

SlstmProblem problem(const Inputs& in) {
  const Setup& s = in.setup;
  SlstmProblem p{s.cell, s.batch, s.time, s.heads, s.dh, values(in.wx), values(in.r), values(in.b),
                 {},     {},      {},     {},      {},   s.cu_seqlens};
  if (in.y0) {
    p.y0 = values(*in.y0);
    p.c0 = values(*in.c0);
    p.n0 = values(*in.n0);
    p.m0 = values(*in.m0);
  }
  if (in.reset)
    for (const long double v : values(*in.reset)) p.reset.push_back(v != 0);
  return p;
}

/// The largest difference, relative to the largest expected value. Equal infinities agree.
double error(const at::Tensor& got, const Values& expected) {
  const Values actual = values(got);
  REQUIRE(actual.size() == expected.size());
  long double largest = 1e-300L, difference = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (actual[i] == expected[i]) continue;
    if (!std::isfinite(actual[i]) || !std::isfinite(expected[i])) return INFINITY;
    difference = std::max(difference, std::abs(actual[i] - expected[i]));
  }
  for (const long double v : expected)
    if (std::isfinite(v)) largest = std::max(largest, std::abs(v));
  return static_cast<double>(difference / largest);
}

void check_forward(const Setup& setup, at::ScalarType type, double tolerance) {
  const Inputs in = make_inputs(setup, type);
  const auto [y, y_last, c, n, m] = run(in);
  const SlstmSolution expected = xlstm::reference::slstm(problem(in));
  INFO(setup.cell << " " << setup.batch << " " << setup.time << " " << setup.heads << " "
                  << setup.dh);
  CHECK(error(y, expected.y) <= tolerance);
  CHECK(error(y_last, expected.y_last) <= tolerance);
  CHECK(error(c, expected.c) <= tolerance);
  CHECK(error(n, expected.n) <= tolerance);
  CHECK(error(m, expected.m) <= tolerance);
}

/// Gradients of a random linear function of the outputs along a random direction, one input at a time.
void check_gradients(const Setup& setup) {
  Inputs in = make_inputs(setup);
  const std::vector<at::Tensor*> inputs = in.differentiable();
  for (at::Tensor* t : inputs) t->requires_grad_();
  const auto [y, y_last, c, n, m] = run(in);
  const bool lstm = std::string(setup.cell) == "lstm";
  std::vector<at::Tensor> outputs{y, y_last, c}, weights;
  if (!lstm) outputs.push_back(n);
  for (const at::Tensor& out : outputs)
    weights.push_back(at::randn(out.sizes(), out.options().requires_grad(false)));
  std::vector<at::Tensor> leaves;
  for (at::Tensor* t : inputs) leaves.push_back(*t);
  const auto gradients = torch::autograd::grad(outputs, leaves, weights);

  const SlstmProblem base = problem(in);
  const Values m_base = xlstm::reference::slstm(base).m;
  const auto loss = [&](const SlstmProblem& p) {
    const SlstmSolution s = xlstm::reference::slstm(p);
    const Values* const parts[] = {&s.y, &s.y_last, &s.c, &s.n};
    long double sum = 0;
    for (size_t k = 0; k < weights.size(); ++k) {
      const Values w = values(weights[k]);
      for (size_t i = 0; i < w.size(); ++i) {
        // c and n count in units of e^m, and m is a constant: compare them in the units of the undisturbed m.
        const bool scaled = k >= 2 && !lstm && std::isfinite(m_base[i]);
        sum += w[i] * (*parts[k])[i] * (scaled ? std::exp(s.m[i] - m_base[i]) : 1);
      }
    }
    return sum;
  };
  Values SlstmProblem::*const members[] = {&SlstmProblem::wx, &SlstmProblem::r,  &SlstmProblem::b,
                                           &SlstmProblem::y0, &SlstmProblem::c0, &SlstmProblem::n0};
  for (size_t k = 0; k < inputs.size(); ++k) {
    const at::Tensor direction = at::randn(leaves[k].sizes(), at::kDouble);
    const Values d = values(direction), g = values(gradients[k]);
    const long double h = 1e-6L;
    SlstmProblem plus = base, minus = base;
    long double slope = 0, scale = 0;
    for (size_t i = 0; i < d.size(); ++i) {
      (plus.*members[k])[i] += h * d[i];
      (minus.*members[k])[i] -= h * d[i];
      slope += g[i] * d[i];
      scale += std::abs(g[i] * d[i]);
    }
    INFO(setup.cell << " input " << k << ", " << setup.batch << " " << setup.time << " "
                    << setup.dh);
    CHECK(std::abs(static_cast<double>(slope - (loss(plus) - loss(minus)) / (2 * h))) <=
          1e-9 * static_cast<double>(scale));
  }
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) { return a.equal(b); }

}  // namespace

TEST_CASE("slstm forward equals the oracle", "[slstm]") {
  at::manual_seed(1);
  for (const char* cell : kCells) {
    for (const bool states : {false, true}) {
      check_forward({cell, 3, 37, 2, 5, states, true}, at::kDouble, 1e-13);
      check_forward({cell, 2, 17, 1, 33, states, false, {}, 4}, at::kDouble, 1e-13);
      check_forward({cell, 9, 3, 2, 16, states, true, {}, 3}, at::kDouble, 1e-13);
      check_forward({cell, 1, 1, 1, 1, states}, at::kDouble, 1e-13);
      check_forward({cell, 2, 20, 2, 64, states, false, {}, 4}, at::kFloat, 2e-5);
      check_forward({cell, 5, 20, 1, 20, states, true, {}, 0}, at::kFloat, 2e-5);
    }
  }
}

TEST_CASE("slstm gradients equal differences of the oracle", "[slstm]") {
  at::manual_seed(2);
  for (const char* cell : kCells) {
    check_gradients({cell, 3, 35, 2, 5, true, true});
    check_gradients({cell, 2, 16, 1, 9, false, false, {}, 4});
    check_gradients({cell, 7, 1, 1, 8, true, true, {}, 3});
    check_gradients({cell, 1, 41, 2, 6, true, true, {0, 0, 20, 21, 21, 41}});
    check_gradients({cell, 2, 9, 1, 4, true, false, {}, 2, 30.0});
  }
}

TEST_CASE("slstm that computes the gates again has the same gradients to the bit", "[slstm]") {
  at::manual_seed(8);
  for (const char* cell : kCells) {
    check_gradients({cell, 3, 35, 2, 5, true, true, {}, 4, 1.5, true});
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      for (const Setup& setup : {Setup{cell, 7, 50, 2, 21, true, true, {}, 4},
                                 {cell, 1, 60, 1, 40, true, true, {0, 0, 18, 19, 60}},
                                 {cell, 3, 16, 3, 16, false, false, {}, 3},
                                 {cell, 2, 0, 1, 3, true}}) {
        Inputs in = make_inputs(setup, type);
        const auto leaves = [&] {
          std::vector<at::Tensor> list;
          for (at::Tensor* t : in.differentiable()) list.push_back(*t);
          return list;
        };
        for (std::optional<at::Tensor>* state : {&in.y0, &in.c0, &in.n0, &in.m0})
          if (*state) *state = (*state)->to(type == at::kDouble ? type : at::kFloat);
        for (at::Tensor* t : in.differentiable()) t->requires_grad_();
        std::vector<std::vector<at::Tensor>> results;
        for (const bool recompute : {false, true}) {
          in.setup.recompute = recompute;
          const auto [y, y_last, c, n, m] = run(in);
          results.push_back(torch::autograd::grad({y.sin().sum(), y_last.sum(), c.square().sum()},
                                                  leaves(), {}, false, false, true));
          results.back().insert(results.back().end(), {y, y_last, c, n, m});
        }
        INFO(cell << " " << c10::toString(type) << " " << setup.time << " " << setup.dh);
        REQUIRE(results[0].size() == results[1].size());
        for (size_t i = 0; i < results[0].size(); ++i) {
          REQUIRE(results[0][i].defined() == results[1][i].defined());
          if (results[0][i].defined()) CHECK(same_bits(results[0][i], results[1][i]));
        }
      }
    }
  }
}

TEST_CASE("slstm packed sequences equal the oracle", "[slstm]") {
  at::manual_seed(3);
  for (const char* cell : kCells) {
    check_forward({cell, 1, 50, 2, 7, true, false, {0, 17, 17, 18, 50, 50}}, at::kDouble, 1e-13);
    check_forward({cell, 1, 50, 2, 7, false, true, {0, 3, 48, 50}}, at::kDouble, 1e-13);
    check_forward({cell, 1, 0, 2, 7, true, false, {0, 0, 0}}, at::kDouble, 0);
  }
}

TEST_CASE("slstm without tokens passes the states through", "[slstm]") {
  at::manual_seed(4);
  for (const char* cell : kCells) {
    check_forward({cell, 2, 0, 1, 3, true}, at::kDouble, 0);
    check_forward({cell, 2, 0, 1, 3, false}, at::kDouble, 0);
    check_forward({cell, 0, 5, 1, 3, true}, at::kDouble, 0);
    check_gradients({cell, 2, 0, 1, 3, true});
  }
}

TEST_CASE("slstm stays finite with extreme gates", "[slstm]") {
  at::manual_seed(5);
  for (const char* cell : kCells) {
    Inputs in = make_inputs({cell, 4, 24, 1, 19, false, false, {}, 2, 1e4}, at::kFloat);
    if (std::string(cell) != "slstm_expf") in.wx.select(2, 1).select(1, 7).fill_(-INFINITY);
    in.wx.requires_grad_();
    in.r.requires_grad_();
    const auto [y, y_last, c, n, m] = run(in);
    const auto grads =
        torch::autograd::grad({y, c}, {in.wx, in.r}, {at::randn(y.sizes()), at::randn(c.sizes())});
    for (const at::Tensor& t : {y, c, n, m, grads[0], grads[1]})
      CHECK(t.isfinite().all().item<bool>());
    CHECK(error(y, xlstm::reference::slstm(problem(in)).y) <= 1e-4);
  }
}

TEST_CASE("slstm documents are isolated bit by bit", "[slstm]") {
  at::manual_seed(6);
  for (const char* cell : kCells) {
    for (const bool packed : {false, true}) {
      Setup setup{cell, packed ? 1 : 3, 40, 2, 21, false, false, {}, 2};
      if (packed) setup.cu_seqlens = {0, 13, 40};
      Inputs in = make_inputs(setup, at::kFloat);
      if (!packed) {
        in.reset = at::zeros({3, 40}, at::kBool);
        in.reset->select(1, 13).fill_(true);
      }
      const auto tail = [&](at::Tensor wx) {
        in.wx = wx.detach().clone().requires_grad_();
        const auto [y, y_last, c, n, m] = run(in);
        const auto dwx = torch::autograd::grad({y.narrow(1, 13, 27).sum()}, {in.wx})[0];
        return at::cat({y.detach().narrow(1, 13, 27).flatten(), dwx.narrow(1, 13, 27).flatten()});
      };
      at::Tensor changed = in.wx.clone();
      changed.narrow(1, 0, 13).mul_(-3);
      at::Tensor broken = in.wx.clone();
      broken.narrow(1, 5, 3).fill_(NAN);
      const at::Tensor expected = tail(in.wx.clone());
      CHECK(expected.isfinite().all().item<bool>());
      CHECK(same_bits(expected, tail(changed)));
      CHECK(same_bits(expected, tail(broken)));
    }
  }
}

TEST_CASE("slstm does not depend on batch neighbours or the number of threads", "[slstm]") {
  at::manual_seed(7);
  Inputs in = make_inputs({"slstm", 7, 33, 3, 40}, at::kFloat);
  in.wx.requires_grad_();
  const auto pass = [&] {
    const auto y = std::get<0>(run(in));
    return at::cat(
        {y.detach().flatten(), torch::autograd::grad({y.square().sum()}, {in.wx})[0].flatten()});
  };
  const int threads = at::get_num_threads();
  const at::Tensor expected = pass();
  for (const int count : {1, 2, 5}) {
    at::set_num_threads(count);
    CHECK(same_bits(expected, pass()));
  }
  at::set_num_threads(threads);
  const at::Tensor y = std::get<0>(run(in)).detach();
  in.wx = in.wx.detach().narrow(0, 2, 1);
  CHECK(same_bits(y.narrow(0, 2, 1), std::get<0>(run(in))));
}
