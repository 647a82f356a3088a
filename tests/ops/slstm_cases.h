#pragma once
// sLSTM calls in every variation, values and gradients by the operator for the CPU: what other paths are compared with.
#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <string>
#include <vector>

#include "csrc/ops/rows.h"
#include "csrc/ops/slstm.h"
#include "csrc/ops/slstm_arguments.h"
#include "tests/support/catch.h"

namespace xlstm::test {

struct SlstmCase {
  const char* cell = "slstm";
  int64_t batch = 2, time = 37, heads = 2, dh = 16;
  bool states = false, resets = false;
  std::vector<int64_t> cu_seqlens = {};
  int gate_dim = 2;  ///< where the gates stand in wx's memory
  bool recompute = false;
  double clip = 0;
  bool cut = false;
  bool float_parameters = false;  ///< r and b in float32 whatever wx's dtype
  bool only_y = false;            ///< gradients come into y alone
  bool strided_dy = false;
};

inline std::string title(const SlstmCase& s, at::ScalarType type) {
  std::string text = std::string(s.cell) + " B " + std::to_string(s.batch) + " T " +
                     std::to_string(s.time) + " heads " + std::to_string(s.heads) + " x " +
                     std::to_string(s.dh) + " " + c10::toString(type) + " gate axis " +
                     std::to_string(s.gate_dim);
  for (const auto& [name, on] :
       {std::pair("states", s.states), std::pair("resets", s.resets),
        std::pair("packed", !s.cu_seqlens.empty()), std::pair("recompute", s.recompute),
        std::pair("clip", s.clip > 0), std::pair("cut", s.cut),
        std::pair("float parameters", s.float_parameters), std::pair("only y", s.only_y),
        std::pair("strided dy", s.strided_dy)})
    if (on) text += std::string(" ") + name;
  return text;
}

inline ops::SlstmArguments slstm_arguments(const SlstmCase& s, at::ScalarType type) {
  at::manual_seed(17);
  const auto draw = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
  const at::ScalarType state_type = ops::accumulate_type(type),
                       parameter_type = s.float_parameters ? state_type : type;
  std::vector<int64_t> sizes{s.batch, s.time, s.heads, s.dh};
  sizes.insert(sizes.begin() + s.gate_dim, 4);
  std::vector<int64_t> order{0, 1, 2, 3};
  for (int64_t& axis : order) axis += axis >= s.gate_dim;
  order.insert(order.begin() + 2, s.gate_dim);
  const double scale = 1 / std::sqrt(static_cast<double>(s.dh));
  ops::SlstmArguments a{draw(sizes).to(type).permute(order),
                        draw({4, s.heads, s.dh, s.dh}).mul(scale).to(parameter_type),
                        draw({4, s.heads, s.dh}).to(parameter_type),
                        {},
                        {},
                        {},
                        {},
                        {},
                        {},
                        s.cell,
                        s.recompute,
                        s.clip,
                        s.cut,
                        true};
  const int64_t count =
      s.cu_seqlens.empty() ? s.batch : static_cast<int64_t>(s.cu_seqlens.size()) - 1;
  if (s.states) {
    const auto state = [&] { return draw({count, s.heads, s.dh}).to(state_type); };
    a.y0 = state();
    a.c0 = state();
    a.n0 = state().abs().add(0.3);
    a.m0 = state();
  }
  if (s.resets) a.reset = at::rand({s.batch, s.time}).lt(0.2);
  if (!s.cu_seqlens.empty()) a.cu_seqlens = at::tensor(s.cu_seqlens, at::kLong);
  return a;
}

/// What comes into the outputs from outside: dy, dy_last, dc, dn; the last three undefined with only_y, dn for the LSTM.
struct SlstmUpstream {
  at::Tensor dy, dy_last, dc, dn;
};

inline SlstmUpstream slstm_upstream(const SlstmCase& s, const ops::SlstmArguments& a) {
  const auto type = a.wx.scalar_type();
  const at::Tensor gate = a.wx.select(2, 0);
  const auto draw = [](at::IntArrayRef sizes, at::ScalarType to) {
    return at::randn(sizes, at::kDouble).to(to);
  };
  SlstmUpstream d{draw(gate.sizes(), type), {}, {}, {}};
  if (s.strided_dy) d.dy = draw({s.heads, s.dh, s.batch, s.time}, type).permute({2, 3, 0, 1});
  if (s.only_y) return d;
  const int64_t count = a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : s.batch;
  const auto state = [&] { return draw({count, s.heads, s.dh}, ops::accumulate_type(type)); };
  d.dy_last = state();
  d.dc = state();
  if (std::string(s.cell) != "lstm") d.dn = state();
  return d;
}

inline ops::SlstmBackwardArguments slstm_backward_arguments(const ops::SlstmArguments& a,
                                                            const SlstmUpstream& d,
                                                            const ops::SlstmResults& saved) {
  const auto optional = [](const at::Tensor& x) {
    return x.defined() ? ops::OptionalTensor(x) : std::nullopt;
  };
  ops::SlstmBackwardArguments b{optional(d.dy),
                                optional(d.dy_last),
                                optional(d.dc),
                                optional(d.dn),
                                std::get<0>(saved),
                                std::get<5>(saved),
                                std::get<6>(saved),
                                {},
                                a.r,
                                {},
                                a.y0,
                                a.c0,
                                a.n0,
                                a.m0,
                                a.reset,
                                a.cu_seqlens,
                                a.cell,
                                a.recurrent_clip,
                                a.recurrent_cut,
                                ops::slstm_gate_dim(a.wx)};
  if (a.recompute) b.wx = a.wx, b.b = a.b;
  return b;
}

struct SlstmExpected {
  std::vector<at::Tensor> outputs;    ///< y, y_last, c, n, m
  std::vector<at::Tensor> gradients;  ///< dwx, dr, db and, where there are states, dy0, dc0, dn0
};

/// By the operator for the CPU on `a` in the dtype `type`.
inline SlstmExpected slstm_expected(const ops::SlstmArguments& a, const SlstmUpstream& d) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().requires_grad_(); };
  const auto optional_leaf = [&](const ops::OptionalTensor& x) {
    return x ? ops::OptionalTensor(leaf(*x)) : std::nullopt;
  };
  const bool lstm = a.cell == "lstm";
  const at::Tensor wx = leaf(a.wx), r = leaf(a.r), b = leaf(a.b);
  const ops::OptionalTensor y0 = optional_leaf(a.y0), c0 = optional_leaf(a.c0),
                            n0 = optional_leaf(a.n0);
  const auto [y, y_last, c, n, m] =
      ops::slstm(wx, r, b, y0, c0, n0, a.m0,
                 {a.reset, a.cu_seqlens, a.cell, a.recompute, a.recurrent_clip, a.recurrent_cut});
  std::vector<at::Tensor> leaves{wx, r, b}, outputs{y}, weights{d.dy};
  if (y0) leaves.insert(leaves.end(), {*y0, *c0});
  if (n0 && !lstm) leaves.push_back(*n0);
  const auto add = [&](const at::Tensor& out, const at::Tensor& weight) {
    if (weight.defined()) outputs.push_back(out), weights.push_back(weight);
  };
  add(y_last, d.dy_last);
  add(c, d.dc);
  add(n, d.dn);
  return {{y.detach(), y_last.detach(), c.detach(), n.detach(), m.detach()},
          torch::autograd::grad(outputs, leaves, weights)};
}

/// ||a - b|| / ||b||, ||a|| where b is zero; equal infinities agree.
inline double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  if (b.numel() == 0) return 0;
  const at::Tensor wanted = b.to(at::kDouble), same = a.to(at::kDouble).eq(wanted);
  const at::Tensor x = a.to(at::kDouble).masked_fill(same, 0), y = wanted.masked_fill(same, 0);
  const at::Tensor finite = wanted.masked_fill(wanted.abs().eq(INFINITY), 0);
  const double size = at::linalg_vector_norm(finite).item<double>();
  const double error = at::linalg_vector_norm(x - y).item<double>() / (size == 0 ? 1 : size);
  return std::isnan(error) ? INFINITY : error;
}

inline void check_slstm_close(const std::vector<std::string>& names,
                              const std::vector<at::Tensor>& got,
                              const std::vector<at::Tensor>& wanted, double tolerance) {
  REQUIRE(wanted.size() <= names.size());
  REQUIRE(wanted.size() <= got.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    INFO(names[i]);
    REQUIRE(got[i].sizes() == wanted[i].sizes());
    CHECK(relative_difference(got[i], wanted[i]) <= tolerance);
  }
}

}  // namespace xlstm::test
