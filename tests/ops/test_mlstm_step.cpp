// mlstm_step, documents packed into one row, and errors of the mLSTM operators.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "csrc/ops/mlstm.h"
#include "csrc/ops/mlstm_generic.h"
#include "tests/support/catch.h"

namespace {

using at::Tensor;
using xlstm::ops::mlstm_chunkwise;
using xlstm::ops::mlstm_step;
using xlstm::ops::MlstmOptions;

double difference(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0) return 0;
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

struct Inputs {
  Inputs(int64_t batch, int64_t time, int64_t heads, int64_t dqk, int64_t dv,
         at::ScalarType type = at::kDouble) {
    at::manual_seed(17);
    const auto d = at::TensorOptions().dtype(at::kDouble);
    q = at::randn({batch, time, heads, dqk}, d).to(type);
    k = at::randn({batch, time, heads, dqk}, d).to(type);
    v = at::randn({batch, time, heads, dv}, d).to(type);
    i = at::randn({batch, time, heads}, d).to(type);
    f = (at::randn({batch, time, heads}, d) + 2).to(type);
  }
  Inputs slice(int64_t begin, int64_t end) const {
    Inputs part = *this;
    for (Tensor* x : {&part.q, &part.k, &part.v, &part.i, &part.f}) *x = x->slice(1, begin, end);
    return part;
  }
  auto run(const MlstmOptions& options = {}) const {
    return mlstm_chunkwise(q, k, v, i, f, {}, {}, {}, options);
  }
  std::vector<Tensor> all() const { return {q, k, v, i, f}; }

  Tensor q, k, v, i, f;
};

/// Bit for bit, NaN equal to NaN.
bool same_bits(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && ((a == b) | (a.isnan() & b.isnan())).all().item<bool>();
}

std::vector<Tensor> outputs_and_gradients(const Inputs& in, const MlstmOptions& options) {
  std::vector<Tensor> inputs;
  for (const Tensor& x : in.all()) inputs.push_back(x.detach().clone().requires_grad_());
  const auto [h, c, n, m] =
      mlstm_chunkwise(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], {}, {}, {}, options);
  std::vector<Tensor> result = torch::autograd::grad({(h * h).sum()}, inputs);
  result.push_back(h.detach());
  return result;
}

}  // namespace

TEST_CASE("mlstm_step repeated equals mlstm_chunkwise") {
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const bool sigmoid : {false, true}) {
      for (const int64_t dv : {1, 9, 300}) {
        const Inputs in(2, 12, 3, 5, dv, type);
        MlstmOptions options;
        options.input_gate = sigmoid ? "sigmoid" : "exp";
        options.normalize = !sigmoid || dv == 9;
        const auto [h, c, n, m] = in.run(options);
        Tensor cs = at::zeros(c.sizes(), c.options()), ns = at::zeros(n.sizes(), n.options());
        Tensor ms = at::zeros({2, 3, 2}, m.options()).select(2, 0);  // not contiguous
        const double tolerance = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-5 : 0.02;
        for (int64_t t = 0; t < 12; ++t) {
          const Tensor step = mlstm_step(in.q.select(1, t), in.k.select(1, t), in.v.select(1, t),
                                         in.i.select(1, t), in.f.select(1, t), cs, ns, ms, options);
          CHECK(step.scalar_type() == type);
          CHECK(difference(step, h.select(1, t)) <= tolerance * (1 + h.abs().max().item<double>()));
        }
        const double state_tolerance = type == at::kDouble ? 1e-12 : 1e-5;
        CHECK(difference(cs, c) <= state_tolerance);
        CHECK(difference(ns, n) <= state_tolerance);
        CHECK(difference(ms, m) <= state_tolerance);
      }
    }
  }
}

TEST_CASE("mlstm_step_lazy and mlstm_fold equal mlstm_step") {
  for (const auto type : {at::kDouble, at::kFloat}) {
    for (const int64_t tokens : {1, 5, 16}) {
      for (const bool sigmoid : {false, true}) {
        for (const auto& [batch, dv] : {std::pair(0, 9), {2, 9}, {1, 300}}) {
          const Inputs in(batch, 40, 3, 5, dv, type);
          MlstmOptions options;
          options.input_gate = sigmoid ? "sigmoid" : "exp";
          options.normalize = tokens != 5;
          const auto state = [&](at::IntArrayRef sizes) { return at::zeros(sizes, type); };
          Tensor c = state({batch, 3, 5, dv}), n = state({batch, 3, 5}), m = state({batch, 3});
          Tensor c1 = c.clone(), n1 = n.clone(), m1 = m.clone();
          Tensor c2 = c.clone(), n2 = n.clone(), m2 = m.clone();
          const auto empty = [&] {
            return xlstm::ops::empty_mlstm_ring(in.k.select(1, 0), in.v.select(1, 0), tokens);
          };
          auto ring = empty(), generic_ring = empty();
          const double tolerance = type == at::kDouble ? 1e-12 : 1e-5;
          for (int64_t t = 0; t < 40; ++t) {
            const auto token = [t](const Tensor& x) { return x.select(1, t); };
            const Tensor h =
                xlstm::ops::mlstm_step_lazy(token(in.q), token(in.k), token(in.v), token(in.i),
                                            token(in.f), c, n, m, ring, options);
            const Tensor h1 = mlstm_step(token(in.q), token(in.k), token(in.v), token(in.i),
                                         token(in.f), c1, n1, m1, options);
            CHECK(difference(h, h1) <= tolerance * (1 + h1.abs().sum().item<double>()));
            const Tensor q = token(in.q), k = token(in.k), v = token(in.v), i = token(in.i),
                         f = token(in.f);
            const Tensor h2 = xlstm::ops::mlstm_generic_step_lazy({{q,
                                                                    k,
                                                                    v,
                                                                    i,
                                                                    f,
                                                                    c2,
                                                                    n2,
                                                                    m2,
                                                                    options.input_gate,
                                                                    options.normalize,
                                                                    {},
                                                                    options.eps},
                                                                   generic_ring});
            CHECK(difference(h2, h1) <= tolerance * (1 + h1.abs().sum().item<double>()));
            CHECK(at::equal(ring.count, generic_ring.count));
          }
          xlstm::ops::mlstm_fold(c, n, m, ring, options);
          CHECK(ring.count.sum().item<int64_t>() == 0);
          CHECK(difference(c, c1) <= 10 * tolerance);
          CHECK(difference(n, n1) <= 10 * tolerance);
          CHECK(difference(m, m1) <= 10 * tolerance);
        }
      }
    }
  }
}

TEST_CASE("the lazy step is for states that outweigh the ring, on the CPU the caches, too") {
  CHECK(xlstm::ops::mlstm_lazy_moves_less(64, 64, 2));
  CHECK(xlstm::ops::mlstm_lazy_moves_less(256, 512, 4));
  CHECK_FALSE(xlstm::ops::mlstm_lazy_moves_less(16, 16, 2));
  // Break-even in bfloat16: 3.5 dqk dv = 32 (dqk + dv).
  CHECK_FALSE(xlstm::ops::mlstm_lazy_moves_less(18, 18, 2));
  CHECK(xlstm::ops::mlstm_lazy_moves_less(19, 19, 2));
  CHECK(xlstm::ops::mlstm_step_lazy_pays(at::zeros({1, 2, 512}), at::zeros({1, 2, 512})));
  CHECK_FALSE(xlstm::ops::mlstm_step_lazy_pays(at::zeros({1, 2, 512}), at::zeros({1, 2, 511})));
}

TEST_CASE("cu_seqlens equals separate sequences, empty ones included") {
  const Inputs in(1, 50, 2, 5, 6);
  const std::vector<int32_t> starts{0, 0, 7, 8, 40, 40, 50};
  MlstmOptions options;
  options.cu_seqlens = at::tensor(starts, at::kInt);
  options.chunk_size = 4;
  const auto [h, c, n, m] = in.run(options);
  REQUIRE(c.size(0) == 6);
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    MlstmOptions alone;
    alone.chunk_size = 4;
    const auto [h1, c1, n1, m1] = in.slice(starts[s], starts[s + 1]).run(alone);
    CHECK(difference(h.slice(1, starts[s], starts[s + 1]), h1) < 1e-12);
    CHECK(difference(c[s], c1[0]) < 1e-12);
    CHECK(difference(n[s], n1[0]) < 1e-12);
    CHECK(difference(m[s], m1[0]) < 1e-12);
  }
}

TEST_CASE("a document changes no bit of another") {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const bool packed_by_lengths : {false, true}) {
      const Inputs in(1, 90, 2, 16, 16, type);
      MlstmOptions options;
      if (packed_by_lengths) {
        options.cu_seqlens = at::tensor({0, 30, 61, 90}, at::kInt);
      } else {
        Tensor reset = at::zeros({1, 90}, at::kBool);
        reset.select(1, 30).fill_(true);
        reset.select(1, 61).fill_(true);
        options.reset = reset;
      }
      const auto before = outputs_and_gradients(in, options);
      for (const double value : {3.0, std::numeric_limits<double>::quiet_NaN()}) {
        Inputs changed = in;
        for (Tensor* x : {&changed.q, &changed.k, &changed.v, &changed.i, &changed.f}) {
          *x = x->clone();
          x->select(1, 40).fill_(value);  // in the second document
        }
        const auto after = outputs_and_gradients(changed, options);
        for (size_t j = 0; j < before.size(); ++j) {
          CHECK(same_bits(before[j].slice(1, 0, 30), after[j].slice(1, 0, 30)));
          CHECK(same_bits(before[j].slice(1, 61, 90), after[j].slice(1, 61, 90)));
          CHECK_FALSE(same_bits(before[j].slice(1, 30, 61), after[j].slice(1, 30, 61)));
        }
      }
    }
  }
}

TEST_CASE("a reset gives no gradient to the first forget gate, nor to the state before it") {
  const Inputs in(1, 9, 1, 4, 4);
  MlstmOptions options;
  options.reset = at::zeros({1, 9}, at::kBool);
  options.reset->select(1, 0).fill_(true);
  const auto d = at::TensorOptions().dtype(at::kDouble);
  const Tensor c0 = at::randn({1, 1, 4, 4}, d).requires_grad_(),
               n0 = at::randn({1, 1, 4}, d).requires_grad_();
  const Tensor f = in.f.clone().requires_grad_(), m0 = at::zeros({1, 1}, d);
  const Tensor h = std::get<0>(mlstm_chunkwise(in.q, in.k, in.v, in.i, f, c0, n0, m0, options));
  const auto g = torch::autograd::grad({h.sum()}, {f, c0, n0});
  CHECK(g[0].select(1, 0).item<double>() == 0);
  CHECK(g[0].abs().max().item<double>() > 0);
  CHECK(g[1].abs().max().item<double>() == 0);
  CHECK(g[2].abs().max().item<double>() == 0);
}

TEST_CASE("sequences without tokens pass their states through") {
  const auto d = at::TensorOptions().dtype(at::kDouble);
  const Inputs in(2, 0, 3, 4, 5);
  const Tensor c0 = at::randn({2, 3, 4, 5}, d).requires_grad_(),
               n0 = at::randn({2, 3, 4}, d).requires_grad_();
  const Tensor m0 = at::randn({2, 3}, d);
  const auto [h, c, n, m] = mlstm_chunkwise(in.q, in.k, in.v, in.i, in.f, c0, n0, m0);
  CHECK(h.sizes() == at::IntArrayRef({2, 0, 3, 5}));
  CHECK(same_bits(c, c0));
  CHECK(same_bits(n, n0));
  CHECK(same_bits(m, m0));
  const auto g = torch::autograd::grad({(c * 3).sum() + (n * 2).sum()}, {c0, n0});
  CHECK(same_bits(g[0], at::zeros({2, 3, 4, 5}, d) + 3));
  CHECK(same_bits(g[1], at::zeros({2, 3, 4}, d) + 2));
}

TEST_CASE("mLSTM errors name the argument") {
  const Inputs in(2, 5, 3, 4, 6);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "no error";
  };
  const auto names = [&message](const char* argument, const auto& call) {
    const std::string text = message(call);
    INFO(text);
    CHECK(text.find(std::string(": ") + argument + ": expected") != std::string::npos);
  };
  names("k", [&] { mlstm_chunkwise(in.q, in.k.slice(3, 0, 2), in.v, in.i, in.f); });
  names("v", [&] { mlstm_chunkwise(in.q, in.k, in.v.slice(1, 0, 2), in.i, in.f); });
  names("v", [&] { mlstm_chunkwise(in.q, in.k, in.v.to(at::kFloat), in.i, in.f); });
  names("igate", [&] { mlstm_chunkwise(in.q, in.k, in.v, in.i.slice(2, 0, 1), in.f); });
  names("fgate", [&] { mlstm_chunkwise(in.q, in.k, in.v, in.i, in.f.to(at::kInt)); });
  names("c0", [&] {
    mlstm_chunkwise(in.q, in.k, in.v, in.i, in.f, at::zeros({2, 3, 6, 4}, at::kDouble));
  });
  names("n0", [&] {
    mlstm_chunkwise(in.q, in.k, in.v, in.i, in.f, {}, at::zeros({2, 3, 4}, at::kFloat));
  });
  names("m0", [&] {
    mlstm_chunkwise(in.q, in.k, in.v, in.i, in.f, {}, {}, at::zeros({2}, at::kDouble));
  });
  MlstmOptions options;
  options.reset = at::zeros({2, 4}, at::kBool);
  names("reset", [&] { in.run(options); });
  options = {};
  options.cu_seqlens = at::tensor({0, 5}, at::kInt);
  names("cu_seqlens", [&] { in.run(options); });
  options = {};
  options.input_gate = "tanh";
  names("input_gate", [&] { in.run(options); });
  options = {};
  options.chunk_size = -1;
  names("chunk_size", [&] { in.run(options); });
  const Inputs one(1, 5, 3, 4, 6);
  for (const auto& bad : {std::vector<int32_t>{0, 4}, {1, 5}, {0, 3, 2, 5}, {}}) {
    options = {};
    options.cu_seqlens = at::tensor(bad, at::kInt);
    names("cu_seqlens", [&] { one.run(options); });
  }
  Tensor c = at::zeros({2, 3, 4, 6}, at::kDouble), n = at::zeros({2, 3, 4}, at::kDouble),
         m = at::zeros({2, 3}, at::kFloat);
  names("m", [&] {
    mlstm_step(in.q.select(1, 0), in.k.select(1, 0), in.v.select(1, 0), in.i.select(1, 0),
               in.f.select(1, 0), c, n, m);
  });
}
