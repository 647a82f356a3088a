// mlstm_chunkwise and its gradients against the recurrence of tests/reference/mlstm_reference.h.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <string>

#include "csrc/ops/mlstm.h"
#include "tests/reference/mlstm_reference.h"
#include "tests/support/catch.h"

namespace {

using at::Tensor;
using xlstm::ops::mlstm_chunkwise;
using xlstm::ops::MlstmOptions;

struct Case {
  int64_t batch = 2, time = 37, heads = 3, dqk = 5, dv = 7;
  bool states = true, resets = true, sigmoid = false, normalize = true;
  int64_t chunk = 0;
  double gate_size = 1, eps = 1e-6;
};

struct Problem {
  explicit Problem(const Case& which) : c(which) {
    at::manual_seed(17);
    const auto d = at::TensorOptions().dtype(at::kDouble);
    q = at::randn({c.batch, c.time, c.heads, c.dqk}, d);
    k = at::randn({c.batch, c.time, c.heads, c.dqk}, d);
    v = at::randn({c.batch, c.time, c.heads, c.dv}, d);
    igate = at::randn({c.batch, c.time, c.heads}, d) * c.gate_size;
    fgate = at::randn({c.batch, c.time, c.heads}, d) * c.gate_size + 1;
    c0 = at::randn({c.batch, c.heads, c.dqk, c.dv}, d);
    n0 = at::randn({c.batch, c.heads, c.dqk}, d);
    m0 = at::randn({c.batch, c.heads}, d);
    if (!c.states)
      for (Tensor* x : {&c0, &n0, &m0}) x->zero_();
    reset = at::rand({c.batch, c.time}, d) < 0.15;
    dh = at::randn({c.batch, c.time, c.heads, c.dv}, d);
    dc = at::randn({c.batch, c.heads, c.dqk, c.dv}, d);
    dn = at::randn({c.batch, c.heads, c.dqk}, d);
  }

  MlstmOptions options() const {
    MlstmOptions o;
    if (c.resets) o.reset = reset;
    o.input_gate = c.sigmoid ? "sigmoid" : "exp";
    o.normalize = c.normalize;
    o.eps = c.eps;
    o.chunk_size = c.chunk;
    return o;
  }

  Case c;
  Tensor q, k, v, igate, fgate, c0, n0, m0, reset, dh, dc, dn;
};

std::vector<double> numbers(const Tensor& x) {
  const Tensor flat = x.detach().to(at::kDouble).contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

xlstm::reference::MlstmInput reference_input(const Problem& p, int64_t b, int64_t head) {
  xlstm::reference::MlstmInput in;
  in.length = p.c.time;
  in.dqk = p.c.dqk;
  in.dv = p.c.dv;
  in.q = numbers(p.q.select(0, b).select(1, head));
  in.k = numbers(p.k.select(0, b).select(1, head));
  in.v = numbers(p.v.select(0, b).select(1, head));
  in.igate = numbers(p.igate.select(0, b).select(1, head));
  in.fgate = numbers(p.fgate.select(0, b).select(1, head));
  in.c0 = numbers(p.c0.select(0, b).select(0, head));
  in.n0 = numbers(p.n0.select(0, b).select(0, head));
  in.m0 = numbers(p.m0.select(0, b).select(0, head))[0];
  if (p.c.resets)
    for (const double r : numbers(p.reset.select(0, b))) in.reset.push_back(r != 0);
  in.sigmoid_input_gate = p.c.sigmoid;
  in.normalize = p.c.normalize;
  in.scale = 1 / std::sqrt(static_cast<double>(p.c.dqk));
  in.eps = p.c.eps;
  return in;
}

/// Largest difference, relative to the largest expected number or, where more, to `terms`: the size of the terms that
/// cancel in it.
void check_close(const std::string& name, const Tensor& got, const std::vector<double>& expected,
                 double tolerance, double terms = 1e-3) {
  const std::vector<double> values = numbers(got);
  REQUIRE(values.size() == expected.size());
  double error = 0, size = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double difference = std::fabs(values[i] - expected[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    size = std::max(size, std::fabs(expected[i]));
  }
  INFO(name << ": error " << error << ", size " << size);
  CHECK(error <= tolerance * std::max(size, terms));
}

void check_case(const Case& which, double tolerance = 1e-10) {
  Problem p(which);
  INFO("T " << which.time << " chunk " << which.chunk << " states " << which.states << " resets "
            << which.resets << " sigmoid " << which.sigmoid << " normalize " << which.normalize);
  std::vector<Tensor> inputs{p.q, p.k, p.v, p.igate, p.fgate};
  if (which.states) inputs.insert(inputs.end(), {p.c0, p.n0});
  for (Tensor& x : inputs) x.requires_grad_();
  std::optional<Tensor> c0, n0, m0;
  if (which.states) {
    c0 = p.c0;
    n0 = p.n0;
    m0 = p.m0;
  }
  const auto [h, c, n, m] =
      mlstm_chunkwise(p.q, p.k, p.v, p.igate, p.fgate, c0, n0, m0, p.options());
  const auto grads = torch::autograd::grad({h, c, n}, inputs, {p.dh, p.dc, p.dn}, {}, false, true);
  for (int64_t b = 0; b < which.batch; ++b) {
    for (int64_t head = 0; head < which.heads; ++head) {
      const auto in = reference_input(p, b, head);
      const auto out = xlstm::reference::mlstm_forward(in);
      check_close("h", h.select(0, b).select(1, head), out.h, tolerance);
      check_close("c", c.select(0, b).select(0, head), out.c, tolerance);
      check_close("n", n.select(0, b).select(0, head), out.n, tolerance);
      check_close("m", m.select(0, b).select(0, head), {out.m}, tolerance);
      const auto g = xlstm::reference::mlstm_backward(
          in, numbers(p.dh.select(0, b).select(1, head)),
          numbers(p.dc.select(0, b).select(0, head)), numbers(p.dn.select(0, b).select(0, head)));
      // Where the gates single out one token, dq and dk are differences of equal terms dh v / norm.
      double terms = 1e-3;
      for (const double norm : out.norm) terms = std::max(terms, 1 / norm);
      const std::vector<double>* expected[] = {&g.q, &g.k, &g.v, &g.igate, &g.fgate};
      const char* names[] = {"dq", "dk", "dv", "digate", "dfgate"};
      for (int i = 0; i < 5; ++i)
        check_close(names[i], grads[i].select(0, b).select(1, head), *expected[i], tolerance,
                    terms);
      if (!which.states) continue;
      check_close("dc0", grads[5].select(0, b).select(0, head), g.c0, tolerance, terms);
      check_close("dn0", grads[6].select(0, b).select(0, head), g.n0, tolerance, terms);
    }
  }
}

/// Sets the number of threads for a scope.
class Threads {
 public:
  explicit Threads(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }

 private:
  int before_;
};

}  // namespace

TEST_CASE("mlstm_chunkwise equals the recurrence, gradients included") {
  for (const bool states : {false, true})
    for (const bool resets : {false, true})
      for (const int64_t time : {0, 1, 31, 70})
        for (const int64_t chunk : {0, 1, 3, 16})
          check_case({.time = time, .states = states, .resets = resets, .chunk = chunk});
}

TEST_CASE("mlstm_chunkwise with the sigmoid input gate") {
  for (const bool normalize : {false, true})
    for (const int64_t chunk : {0, 5})
      check_case({.sigmoid = true, .normalize = normalize, .chunk = chunk});
  check_case({.time = 150, .states = false, .sigmoid = true, .chunk = 64});
}

TEST_CASE("mlstm_chunkwise with odd sizes") {
  check_case({.batch = 0});
  check_case({.heads = 0});
  check_case({.dqk = 1, .dv = 1});
  check_case({.dqk = 1, .dv = 9});
  check_case({.dqk = 9, .dv = 1});
  check_case({.batch = 1, .time = 100, .heads = 1, .dqk = 33, .dv = 65, .chunk = 100});
}

TEST_CASE("mlstm_chunkwise with extreme gates") {
  for (const double size : {30.0, 1e3, 1e4})
    check_case({.time = 64, .chunk = 16, .gate_size = size, .eps = 0}, 1e-9);
}

TEST_CASE("mlstm_chunkwise split into segments equals the recurrence") {
  const Threads threads(7);  // smaller calls than these would run on one
  Case c{.batch = 1, .time = 301, .heads = 1, .dqk = 64, .dv = 60, .chunk = 16};
  for (const bool resets : {false, true}) {
    for (const bool sigmoid : {false, true}) {
      c.resets = resets;
      c.sigmoid = sigmoid;
      c.states = resets != sigmoid;
      check_case(c);
    }
  }
  check_case({.batch = 3, .time = 110, .heads = 1, .dqk = 64, .dv = 60, .chunk = 8});
}

TEST_CASE("mlstm_chunkwise computes states a second time where all would not fit") {
  // 300 * 301 * 8 bytes per state and a chunk of one token: more than 64 MB from 93 tokens on.
  check_case(
      {.batch = 1, .time = 110, .heads = 1, .dqk = 300, .dv = 300, .resets = false, .chunk = 1});
}

TEST_CASE("mlstm_chunkwise in float32 with extreme gates") {
  Problem p({.time = 80, .chunk = 16, .gate_size = 1e4});
  p.fgate.select(1, 20).fill_(-std::numeric_limits<double>::infinity());
  p.igate.select(1, 21).fill_(-std::numeric_limits<double>::infinity());
  const auto low = [](const Tensor& x) { return x.to(at::kFloat); };
  const auto wide = [&low](const Tensor& x) { return low(x).to(at::kDouble); };
  const Tensor h64 =
      std::get<0>(mlstm_chunkwise(wide(p.q), wide(p.k), wide(p.v), wide(p.igate), wide(p.fgate),
                                  wide(p.c0), wide(p.n0), wide(p.m0), p.options()));
  const Tensor h32 =
      std::get<0>(mlstm_chunkwise(low(p.q), low(p.k), low(p.v), low(p.igate), low(p.fgate),
                                  low(p.c0), low(p.n0), low(p.m0), p.options()));
  REQUIRE(h32.isfinite().all().item<bool>());
  check_close("h", h32, numbers(h64), 1e-5);
}

TEST_CASE("mlstm_chunkwise takes any strides") {
  Problem p({});
  const auto transposed = [](const Tensor& x) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  };
  const auto spread = [](const Tensor& x) {
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() *= 2;
    return at::empty(sizes, x.options()).fill_(NAN).slice(-1, 0, sizes.back(), 2).copy_(x);
  };
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto cast = [type](const Tensor& x) { return x.to(type); };
    const Tensor q = cast(p.q), k = cast(p.k), v = cast(p.v), i = cast(p.igate), f = cast(p.fgate);
    const auto plain = mlstm_chunkwise(q, k, v, i, f, {}, {}, {}, p.options());
    const auto strided = mlstm_chunkwise(transposed(q), spread(k), spread(transposed(v)),
                                         transposed(i), spread(f), {}, {}, {}, p.options());
    check_close("h", std::get<0>(strided), numbers(std::get<0>(plain)), 1e-6);
    check_close("c", std::get<1>(strided), numbers(std::get<1>(plain)), 1e-6);
  }
}
