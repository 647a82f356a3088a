#pragma once
// Random mLSTM problems, and the comparison of any implementation with the recurrence of tests/reference/mlstm_reference.h.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <string>

#include "csrc/ops/mlstm.h"
#include "csrc/ops/mlstm_arguments.h"
#include "tests/reference/mlstm_reference.h"
#include "tests/support/catch.h"

namespace xlstm::test {

using at::Tensor;
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

inline std::vector<double> numbers(const Tensor& x) {
  const Tensor flat = x.detach().to(at::kDouble).contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

inline reference::MlstmInput reference_input(const Problem& p, int64_t b, int64_t head) {
  reference::MlstmInput in;
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
inline void check_close(const std::string& name, const Tensor& got,
                        const std::vector<double>& expected, double tolerance,
                        double terms = 1e-3) {
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

inline ops::MlstmArguments arguments(const Problem& p) {
  ops::MlstmArguments a{p.q, p.k, p.v, p.igate, p.fgate, {}, {}, {}, {}, {}, "exp", true, {}, 0, 0};
  if (p.c.states) {
    a.c0 = p.c0;
    a.n0 = p.n0;
    a.m0 = p.m0;
  }
  const auto options = p.options();
  a.reset = options.reset;
  a.input_gate = options.input_gate;
  a.normalize = options.normalize;
  a.eps = options.eps;
  a.chunk_size = options.chunk_size;
  return a;
}

/// Sets the number of threads for a scope.
class Threads {
 public:
  explicit Threads(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }

 private:
  int before_;
};

/// What an implementation makes of a problem: h, c, n, m, product, and with dh, dc, dn the gradients of q, k, v, igate, fgate and,
/// where the case has states, c0 and n0.
struct MlstmResult {
  Tensor h, c, n, m, product;
  std::vector<Tensor> gradients;
};

/// run: Problem -> MlstmResult
template <class Run>
void check_case(const Case& which, const Run& run, double tolerance = 1e-10) {
  Problem p(which);
  INFO("T " << which.time << " heads " << which.dqk << " x " << which.dv << " chunk " << which.chunk
            << " states " << which.states << " resets " << which.resets << " sigmoid "
            << which.sigmoid << " normalize " << which.normalize);
  const MlstmResult got = run(p);
  for (int64_t b = 0; b < which.batch; ++b) {
    for (int64_t head = 0; head < which.heads; ++head) {
      const auto in = reference_input(p, b, head);
      const auto out = reference::mlstm_forward(in);
      check_close("h", got.h.select(0, b).select(1, head), out.h, tolerance);
      check_close("c", got.c.select(0, b).select(0, head), out.c, tolerance);
      check_close("n", got.n.select(0, b).select(0, head), out.n, tolerance);
      check_close("m", got.m.select(0, b).select(0, head), {out.m}, tolerance);
      if (which.normalize)
        check_close("product", got.product.select(0, b).select(1, head), out.product, tolerance);
      const auto g = reference::mlstm_backward(in, numbers(p.dh.select(0, b).select(1, head)),
                                               numbers(p.dc.select(0, b).select(0, head)),
                                               numbers(p.dn.select(0, b).select(0, head)));
      // Where the gates single out one token, dq and dk are differences of equal terms dh v / norm.
      double terms = 1e-3;
      for (const double norm : out.norm) terms = std::max(terms, 1 / norm);
      const std::vector<double>* expected[] = {&g.q, &g.k, &g.v, &g.igate, &g.fgate};
      const char* names[] = {"dq", "dk", "dv", "digate", "dfgate"};
      for (int i = 0; i < 5; ++i)
        check_close(names[i], got.gradients[i].select(0, b).select(1, head), *expected[i],
                    tolerance, terms);
      if (!which.states) continue;
      check_close("dc0", got.gradients[5].select(0, b).select(0, head), g.c0, tolerance, terms);
      check_close("dn0", got.gradients[6].select(0, b).select(0, head), g.n0, tolerance, terms);
    }
  }
}

}  // namespace xlstm::test
