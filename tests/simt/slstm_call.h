#pragma once
// Calls of the sLSTM kernels in both directions, and comparisons with the references.
#include "cuda/slstm/slstm_plan.h"
#include "tests/simt/runtime.h"
#include "tests/simt/slstm_problem.h"

namespace simt_test {

constexpr DeviceLimits kAmpere{80, 108, 163 * 1024}, kHopper{90, 132, 227 * 1024, true};
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr SlstmCell kCells[] = {SlstmCell::kSlstm, SlstmCell::kSlstmExpf, SlstmCell::kLstm};
constexpr GateOrder kOrders[] = {GateOrder::kFirst, GateOrder::kMiddle, GateOrder::kLast,
                                 GateOrder::kGaps};

/// A mean of the forget gate's pre-activation under which the state neither dies nor grows.
inline double forget_of(SlstmCell cell) { return cell == SlstmCell::kSlstmExpf ? -1 : 1; }

/// Scratch memory of exactly as many bytes as asked for, filled with NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory(bytes + 256 + 16, 0xff), size(bytes) {
    while (reinterpret_cast<uintptr_t>(&memory[first]) % 256 != 0) ++first;
  }
  void* data() { return &memory[first]; }
  void expect_guard_untouched() const {
    for (size_t i = first + size; i < memory.size(); ++i)
      expect(memory[i] == 0xff, "written outside of the workspace", static_cast<long>(i - first));
  }

 private:
  std::vector<unsigned char> memory;
  size_t size, first = 0;
};

/// The kernels' forward results.
struct Forward {
  Forward(Data& x, bool saved) : Forward(x, saved, own_call_) {
    const SlstmProblem problem = s.problem();
    expect(slstm_supported(problem, s.device, saved), "a problem without kernels");
    Scratch scratch(slstm_forward_workspace(problem, s.device));
    slstm_forward(problem, s.device, own_call_, scratch.data(), nullptr);
    scratch.expect_guard_untouched();
    expect_guards();
  }
  /// Without a call, which the caller gets.
  Forward(Data& x, bool saved, xlstm::cuda::SlstmForward& call)
      : s(x.s),
        wx(x.wx),
        y(s.batch, s.time, s.heads, s.dh, s.dtype,
          s.order == GateOrder::kGaps ? Order::kUnaligned : Order::kDense),
        y_last(s.state_numbers()),
        c(s.state_numbers()),
        n(s.state_numbers()),
        m(s.state_numbers()),
        gates(s, s.gates_dtype, s.order),
        checkpoints(saved ? slstm_checkpoint_numbers(s.problem()) : 0) {
    call.in = x.inputs(), call.wx = x.wx.view, call.b = x.b.data();
    if (s.states) call.m0 = x.m0.data();
    call.y = y.view;
    call.y_last = y_last.data(), call.c = c.data();
    if (s.cell != SlstmCell::kLstm) call.n = n.data(), call.m = m.data();
    if (saved) call.checkpoints = checkpoints.data();
    if (saved && !s.recompute) call.gates = gates.view;
  }
  void expect_guards() {
    wx.expect_gaps_untouched();
    y.expect_gaps_untouched("y");
    gates.get();
    gates.expect_gaps_untouched();
    for (const GuardedFloats* floats : {&y_last, &c, &n, &m, &checkpoints})
      floats->expect_guards_untouched("a result");
  }

  const Setting& s;
  const GateTensor& wx;
  StridedTensor y;
  GuardedFloats y_last, c, n, m;
  GateTensor gates;
  GuardedFloats checkpoints;

 private:
  xlstm::cuda::SlstmForward own_call_;
};

/// Of numbers that were rounded to `dtype`: about 2.5 roundings.
inline double tolerance(const Setting& s, Dtype dtype) {
  return s.slack * (dtype == Dtype::kBFloat16 ? 5e-3 : dtype == Dtype::kFloat16 ? 5e-4 : 2e-5);
}
inline double tolerance(const Setting& s) { return tolerance(s, s.dtype); }
/// What y has in the recurrent product: the persistent kernels keep 16 bits of float16's.
inline Dtype product_dtype(const Setting& s) {
  return s.dtype == Dtype::kFloat16 && !s.rounded_product ? Dtype::kFloat32 : s.dtype;
}

inline Numbers numbers(const std::vector<reference_real>& x) { return {x.begin(), x.end()}; }

inline void check_forward(const Setting& s, const Forward& got, const SlstmSolution& wanted) {
  const Dtype product = product_dtype(s);
  const double states = tolerance(s, product);
  compare("y", got.y.all(), numbers(wanted.y), tolerance(s));
  const int64_t count = s.state_numbers();
  compare("y_last", got.y_last.slice(0, count), numbers(wanted.y_last), states);
  if (s.cell == SlstmCell::kLstm) {
    compare("c", got.c.slice(0, count), numbers(wanted.c), states);
    return;
  }
  // States count in units of e^m; an empty one has m = -inf.
  Numbers c, n, m, m_wanted;
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    const double m_got = got.m.slice(i, 1)[0];
    const bool empty = std::isinf(static_cast<double>(wanted.m[at]));
    expect(!empty || m_got == static_cast<double>(wanted.m[at]), "m of an empty state",
           static_cast<long>(i));
    const double unit = empty ? 1 : std::exp(static_cast<double>(wanted.m[at]) - m_got);
    c.push_back(unit * static_cast<double>(wanted.c[at]));
    n.push_back(unit * static_cast<double>(wanted.n[at]));
    m.push_back(empty ? 0 : m_got),
        m_wanted.push_back(empty ? 0 : static_cast<double>(wanted.m[at]));
  }
  // A sum of pre-activations, whose errors are those of all terms of the product.
  const double sums = product == Dtype::kBFloat16 ? 2e-2 : product == Dtype::kFloat16 ? 2e-3 : 1e-5;
  compare_each("m", m, m_wanted, s.slack * sums);
  compare("c", got.c.slice(0, count), c, states);
  compare("n", got.n.slice(0, count), n, states);
}

inline std::string describe(const Setting& s) {
  const auto map = plan_slstm(s.problem(), s.device, xlstm::cuda::Direction::kForward);
  return std::string(", ") + name_of(s.cell) + " B " + std::to_string(s.batch) + " T " +
         std::to_string(s.time) + " NH " + std::to_string(s.heads) + " DH " + std::to_string(s.dh) +
         " dtype " + std::to_string(static_cast<int>(s.dtype)) + " exchange " +
         std::to_string(static_cast<int>(map.exchange)) + " blocks " + std::to_string(map.blocks) +
         " splits " + std::to_string(map.splits) + " order " +
         std::to_string(static_cast<int>(s.order)) + " forget " + std::to_string(s.forget);
}

/// Gradients of the results, for the kernels and the reference.
struct Losses {
  Losses(Data& x, const Setting& setting)
      : s(setting),
        dy(s.batch, s.time, s.heads, s.dh, s.dtype, Order::kAligned),
        dy_last(s.state_numbers()),
        dc(s.state_numbers()),
        dn(s.state_numbers()) {
    dy.fill(x.random, 0, s.loss_of_y ? 1 : 0);
    if (s.same_loss) dy.view.batch = dy.view.time = dy.view.head = dy.view.inner = 0;
    for (GuardedFloats* floats : {&dy_last, &dc, &dn})
      floats->fill(x.random, 0, s.loss_of_states ? 1 : 0);
    const int64_t count = s.state_numbers();
    wanted = {dy.all(), dy_last.slice(0, count), dc.slice(0, count), dn.slice(0, count), s.clip,
              s.cut};
  }
  void give_to(xlstm::cuda::SlstmBackward& call) {
    if (s.loss_of_y) call.dy = dy.view;
    call.recurrent_clip = static_cast<float>(s.clip), call.recurrent_cut = s.cut;
    if (!s.loss_of_states) return;
    call.dy_last = dy_last.data(), call.dc = dc.data();
    if (s.cell != SlstmCell::kLstm) call.dn = dn.data();
  }

  const Setting& s;
  StridedTensor dy;
  GuardedFloats dy_last, dc, dn;
  SlstmLoss wanted;
};

/// The kernels' gradients; those of r and b summed here.
struct Backward {
  Backward(Data& x, Forward& forward, Losses& losses)
      : s(x.s),
        dwx(s, s.dtype, s.order),
        dy0(s.state_numbers()),
        dc0(s.state_numbers()),
        dn0(s.state_numbers()) {
    xlstm::cuda::SlstmBackward call = arguments(x, forward, losses);
    const SlstmProblem problem = s.problem();
    Scratch scratch(slstm_backward_workspace(problem, s.device));
    slstm_backward(problem, s.device, call, scratch.data(), nullptr);
    scratch.expect_guard_untouched();
    expect_guards();
  }
  /// Without a call.
  Backward(Data& x, Forward& forward, Losses& losses, xlstm::cuda::SlstmBackward& call)
      : s(x.s),
        dwx(s, s.dtype, s.order),
        dy0(s.state_numbers()),
        dc0(s.state_numbers()),
        dn0(s.state_numbers()) {
    call = arguments(x, forward, losses);
  }
  xlstm::cuda::SlstmBackward arguments(Data& x, Forward& forward, Losses& losses) {
    xlstm::cuda::SlstmBackward call;
    call.in = x.inputs();
    call.gates = forward.gates.view, call.checkpoints = forward.checkpoints.data();
    losses.give_to(call);
    call.dwx = dwx.view;
    if (!s.initial_gradients) return call;
    call.dy0 = dy0.data(), call.dc0 = dc0.data();
    if (s.cell != SlstmCell::kLstm) call.dn0 = dn0.data();
    return call;
  }
  void expect_guards() {
    dwx.get();
    dwx.expect_gaps_untouched();
    for (const GuardedFloats* floats : {&dy0, &dc0, &dn0})
      floats->expect_guards_untouched("a gradient");
  }

  const Setting& s;
  GateTensor dwx;
  GuardedFloats dy0, dc0, dn0;
};

/// y_{t-1} as it enters token t: rows of (B,T,NH,DH).
inline Numbers entering(const Data& x, const Forward& forward) {
  const Setting& s = x.s;
  Numbers out(static_cast<size_t>(s.batch * s.time * s.heads * s.dh), 0);
  const int64_t width = s.heads * s.dh;
  for (int64_t n = 0; n < s.sequences(); ++n) {
    const int64_t row = s.packed.empty() ? n : 0,
                  begin = s.packed.empty() ? 0 : s.packed[static_cast<size_t>(n)],
                  end = s.packed.empty() ? s.time : s.packed[static_cast<size_t>(n + 1)];
    for (int64_t t = begin; t < end; ++t) {
      if (s.resets && x.input.reset[static_cast<size_t>(row * s.time + t)] != 0) continue;
      for (int64_t i = 0; i < width; ++i)
        out[static_cast<size_t>((row * s.time + t) * width + i)] =
            t > begin  ? forward.y.get(row, t - 1, i / s.dh, i % s.dh)
            : s.states ? static_cast<double>(x.y0[static_cast<size_t>(n * width + i)])
                       : 0;
    }
  }
  return out;
}

/// What a caller does that did not keep the pre-activations.
inline void compute_gates_anew(const Data& x, Forward& forward) {
  const Setting& s = x.s;
  const Numbers y = entering(x, forward);
  Numbers gates(x.input.wx.begin(), x.input.wx.end());
  const int64_t rows = 4 * s.heads * s.dh;
  for (int64_t i = 0; i < s.batch * s.time * rows; ++i) {
    const int64_t token = i / rows, row = i % rows, head = row / s.dh % s.heads;
    double& sum = gates[static_cast<size_t>(i)];
    sum += static_cast<double>(x.input.b[static_cast<size_t>(row)]);
    for (int64_t k = 0; k < s.dh; ++k)
      sum += static_cast<double>(x.input.r[static_cast<size_t>(row * s.dh + k)]) *
             y[static_cast<size_t>((token * s.heads + head) * s.dh + k)];
  }
  forward.gates.set(gates);
}

inline void check_backward(Data& x, const Forward& forward, Backward& got,
                           const SlstmGradients& wanted) {
  const Setting& s = x.s;
  const double close = 2 * tolerance(s);
  const Numbers dwx = got.dwx.get(), y = entering(x, forward);
  compare("dwx", dwx, wanted.wx, close);
  Numbers dr(wanted.r.size()), db(wanted.b.size());
  for (int64_t token = 0; token < s.batch * s.time; ++token)
    for (int64_t row = 0; row < 4 * s.heads * s.dh; ++row) {
      const double g = dwx[static_cast<size_t>(token * 4 * s.heads * s.dh + row)];
      db[static_cast<size_t>(row)] += g;
      const int64_t head = row / s.dh % s.heads;
      for (int64_t k = 0; k < s.dh; ++k)
        dr[static_cast<size_t>(row * s.dh + k)] +=
            g * y[static_cast<size_t>((token * s.heads + head) * s.dh + k)];
    }
  compare("dr", dr, wanted.r, close);
  compare("db", db, wanted.b, close);
  if (!s.initial_gradients) return;
  const int64_t count = s.state_numbers();
  compare("dy0", got.dy0.slice(0, count), wanted.y0, close);
  compare("dc0", got.dc0.slice(0, count), wanted.c0, close);
  if (s.cell != SlstmCell::kLstm) compare("dn0", got.dn0.slice(0, count), wanted.n0, close);
}

/// Both directions against the references.
inline void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Data x(s, seed);
    Forward forward(x, true);
    check_forward(s, forward, xlstm::reference::slstm(x.input));
    if (s.recompute) compute_gates_anew(x, forward);
    Losses losses(x, s);
    Backward backward(x, forward, losses);
    check_backward(x, forward, backward, xlstm::reference::slstm_gradients(x.input, losses.wanted));
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + describe(s));
  }
}

inline bool plain() { return simt::build_kind() == simt::Build::kPlain; }

}  // namespace simt_test
