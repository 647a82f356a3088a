// The sLSTM step by step, with the products between the steps in plain loops; and the references against each other.
#include <algorithm>
#include <functional>

#include "tests/simt/slstm_call.h"

namespace simt_test {
namespace {

using xlstm::cuda::SlstmStep;

/// Numbers of a type for a kernel to write, contiguous.
class Stored {
 public:
  Stored(int64_t count, Dtype dtype)
      : dtype_(dtype),
        count_(count),
        memory_(static_cast<size_t>(count * (dtype == Dtype::kFloat32 ? 4 : 2)) + 8, 0) {}
  void* data() { return memory_.data(); }
  double operator[](int64_t i) const {
    if (dtype_ == Dtype::kFloat32)
      return static_cast<double>(reinterpret_cast<const float*>(memory_.data())[i]);
    const uint16_t bits = reinterpret_cast<const uint16_t*>(memory_.data())[i];
    return static_cast<double>(dtype_ == Dtype::kBFloat16 ? prim::bf16_to_float(bits)
                                                          : prim::f16_to_float(bits));
  }
  void set(int64_t i, float x) {
    if (dtype_ == Dtype::kFloat32) {
      reinterpret_cast<float*>(memory_.data())[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(memory_.data())[i] =
          dtype_ == Dtype::kBFloat16 ? prim::float_to_bf16(x) : prim::float_to_f16(x);
    }
  }

 private:
  Dtype dtype_;
  int64_t count_;
  std::vector<unsigned char> memory_;
};

/// Calls f(sequence, gate, head, unit out, unit in, place in r).
void for_each_weight(
    const Setting& s,
    const std::function<void(int64_t, int64_t, int64_t, int64_t, int64_t, size_t)>& f) {
  for (int64_t n = 0; n < s.sequences(); ++n)
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t head = 0; head < s.heads; ++head)
        for (int64_t out = 0; out < s.dh; ++out)
          for (int64_t in = 0; in < s.dh; ++in)
            f(n, gate, head, out, in,
              static_cast<size_t>(((gate * s.heads + head) * s.dh + out) * s.dh + in));
}

int64_t longest(const Setting& s) {
  int64_t most = s.packed.empty() ? s.time : 0;
  for (size_t n = 0; n + 1 < s.packed.size(); ++n)
    most = std::max<int64_t>(most, s.packed[n + 1] - s.packed[n]);
  return most;
}

/// R y in (N,NH,DH,4) order.
void multiply(const Data& x, const Stored& y, std::vector<float>& product) {
  const Setting& s = x.s;
  product.assign(static_cast<size_t>(4 * s.state_numbers()), 0);
  for_each_weight(s, [&](int64_t n, int64_t gate, int64_t head, int64_t out, int64_t in, size_t r) {
    product[static_cast<size_t>(((n * s.heads + head) * s.dh + out) * 4 + gate)] +=
        static_cast<float>(static_cast<double>(x.input.r[r]) * y[(n * s.heads + head) * s.dh + in]);
  });
}

/// Forward by steps; the results lie where a kernel's would.
void step_forward(Data& x, Forward& results, xlstm::cuda::SlstmForward call) {
  const Setting& s = x.s;
  Stored y(s.state_numbers(), s.dtype);
  if (s.states)
    for (int64_t i = 0; i < s.state_numbers(); ++i) y.set(i, x.y0[static_cast<size_t>(i)]);
  std::vector<float> product(static_cast<size_t>(4 * s.state_numbers()), NAN);
  for (int64_t t = 0; t < longest(s); ++t) {
    if (t > 0 || s.states) multiply(x, y, product);
    SlstmStep step;
    step.t = t, step.y = y.data();
    step.product = {product.data(), 4 * s.heads * s.dh, 0, 1, 4 * s.dh, 4};
    slstm_pointwise_forward(s.problem(), call, step, nullptr);
  }
  results.expect_guards();
}

void step_backward(Data& x, Backward& results, const xlstm::cuda::SlstmBackward& call) {
  const Setting& s = x.s;
  Stored dwx(4 * s.state_numbers(), s.dtype);
  std::vector<float> recurrent(static_cast<size_t>(s.state_numbers()), NAN);
  for (int64_t t = longest(s) - 1; t >= 0; --t) {
    SlstmStep step;
    step.t = t, step.dwx = dwx.data();
    if (t + 1 < longest(s)) step.dy_recurrent = recurrent.data();
    slstm_pointwise_backward(s.problem(), call, step, nullptr);
    std::vector<double> sums(recurrent.size(), 0);
    for_each_weight(s, [&](int64_t n, int64_t gate, int64_t head, int64_t out, int64_t in,
                           size_t r) {
      sums[static_cast<size_t>((n * s.heads + head) * s.dh + in)] +=
          static_cast<double>(x.input.r[r]) * dwx[((n * 4 + gate) * s.heads + head) * s.dh + out];
    });
    recurrent.assign(sums.begin(), sums.end());
  }
  for (int64_t i = 0; i < s.state_numbers(); ++i) {
    const int64_t n = i / (s.heads * s.dh), row = s.packed.empty() ? n : 0,
                  first = s.packed.empty() ? 0 : s.packed[static_cast<size_t>(n)];
    const bool empty = !s.packed.empty() && s.packed[static_cast<size_t>(n + 1)] == first;
    const bool reset = s.resets && x.input.reset[static_cast<size_t>(row * s.time + first)] != 0;
    double product = recurrent[static_cast<size_t>(i)];
    if (s.clip > 0) product = std::min(std::max(product, -s.clip), s.clip);
    results.dy0[i] = empty ? call.dy_last[i] : reset || s.cut ? 0 : static_cast<float>(product);
  }
  results.expect_guards();
}

void run_steps(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Data x(s, seed);
    xlstm::cuda::SlstmForward forward_call;
    Forward forward(x, true, forward_call);
    step_forward(x, forward, forward_call);
    check_forward(s, forward, xlstm::reference::slstm(x.input));
    Losses losses(x, s);
    xlstm::cuda::SlstmBackward backward_call;
    Backward backward(x, forward, losses, backward_call);
    step_backward(x, backward, backward_call);
    check_backward(x, forward, backward, xlstm::reference::slstm_gradients(x.input, losses.wanted));
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + describe(s));
  }
}

void steps(uint64_t seed) {
  for (const SlstmCell cell : kCells)
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
      run_steps({.cell = cell,
                 .batch = 2,
                 .time = 18,
                 .heads = 2,
                 .dh = 5,
                 .dtype = dtype,
                 .order = GateOrder::kLast,
                 .rounded_product = true,
                 .states = true,
                 .resets = dtype == Dtype::kFloat32,
                 .forget = forget_of(cell)},
                seed);
  run_steps({.time = 29, .dh = 7, .states = true, .packed = {0, 3, 3, 28, 29}}, seed);
  run_steps({.batch = 3, .time = 2, .heads = 3, .dh = 40}, seed);
  run_steps({.batch = 2, .time = 4, .dh = 6, .states = true, .cut = true}, seed);
  run_steps({.batch = 2, .time = 4, .dh = 6, .states = true, .clip = 0.1}, seed);
}

// References -----------------------------------------------------------------------------------------------------------

/// Sum of all results times their losses, c and n in units of e^m of the problem itself.
reference_real loss_of(const xlstm::reference::SlstmProblem& p, const SlstmLoss& loss,
                       const std::vector<reference_real>& m) {
  const SlstmSolution got = xlstm::reference::slstm(p);
  reference_real sum = 0;
  for (size_t i = 0; i < got.y.size(); ++i)
    sum += got.y[i] * static_cast<reference_real>(loss.y[i]);
  for (size_t i = 0; i < got.c.size(); ++i) {
    const reference_real unit = p.cell == "lstm" ? 1 : std::exp(got.m[i] - m[i]);
    sum += got.y_last[i] * static_cast<reference_real>(loss.y_last[i]);
    sum += unit * got.c[i] * static_cast<reference_real>(loss.c[i]);
    if (p.cell != "lstm") sum += unit * got.n[i] * static_cast<reference_real>(loss.n[i]);
  }
  return sum;
}

void references(uint64_t seed) {
  for (const SlstmCell cell : kCells)
    for (const bool packed : {false, true}) {
      Setting s{.cell = cell,
                .batch = packed ? 1 : 2,
                .time = packed ? 9 : 8,
                .heads = 2,
                .dh = 3,
                .states = true,
                .resets = true,
                .forget = forget_of(cell)};
      if (packed) s.packed = {0, 4, 9};
      Data x(s, seed);
      Losses losses(x, s);
      const SlstmGradients wanted = xlstm::reference::slstm_gradients(x.input, losses.wanted);
      const std::vector<reference_real> m = xlstm::reference::slstm(x.input).m;
      const auto check = [&](const char* name, std::vector<reference_real>& input,
                             const Numbers& gradient) {
        Numbers differences;
        constexpr reference_real kStep = 1e-5L;
        for (reference_real& number : input) {
          const reference_real at = number;
          number = at + kStep;
          const reference_real up = loss_of(x.input, losses.wanted, m);
          number = at - kStep;
          const reference_real down = loss_of(x.input, losses.wanted, m);
          number = at;
          differences.push_back(static_cast<double>((up - down) / (2 * kStep)));
        }
        compare(name, gradient, differences, 1e-7);
      };
      check("wx of the reference", x.input.wx, wanted.wx);
      check("r of the reference", x.input.r, wanted.r);
      check("b of the reference", x.input.b, wanted.b);
      check("y0 of the reference", x.input.y0, wanted.y0);
      check("c0 of the reference", x.input.c0, wanted.c0);
      if (cell != SlstmCell::kLstm) check("n0 of the reference", x.input.n0, wanted.n0);
    }
}

}  // namespace

List<Case> slstm_pointwise_cases() {
  static const Case cases[] = {
      {"slstm: gradients of the reference are differences of it", references},
      {"slstm: steps", steps},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
