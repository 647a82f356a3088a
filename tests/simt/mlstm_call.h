#pragma once
// Whole passes of the mLSTM as the operators call it, cuda/mlstm/mlstm.h, and their comparison with the recurrence in
// float64.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm.h"
#include "cuda/prim/prim.h"
#include "tests/reference/mlstm_reference.h"
#include "tests/simt/cases.h"

namespace simt_test::passes {

using xlstm::cuda::DeviceLimits;
using xlstm::cuda::Dtype;
using xlstm::cuda::View;

inline const DeviceLimits kAmpere{80, 1,
                                  163 * 1024};  // one multiprocessor: never more than one segment

struct Setting {
  int64_t batch = 1, time = 1, heads = 1, dqk = 16, dv = 16;
  Dtype dtype = Dtype::kBFloat16;
  bool sigmoid = false, normalize = true, states = false, resets = false, strided = false;
  std::vector<int32_t> packed = {};  // cu_seqlens
  int64_t chunk_size = 0;
  bool two_phase = false;
  bool start_gradients = true;  ///< with states: dc0 and dn0 are wanted
  bool extreme =
      false;  ///< gates; q, k and n are positive so that the normaliser's sums do not cancel
  double forget_bias = 3, input_bias = -3, gate_spread = 1;
  DeviceLimits device = kAmpere;
};

/// A (B,T,NH,D) tensor in one of three memory orders, with its values in double.
class Tensor {
 public:
  Tensor(const Setting& s, int64_t width, Dtype dtype, bool gate = false)
      : s_(s), width_(width), dtype_(dtype) {
    view.inner = 1;
    if (!s.strided) {
      view.head = width;
      view.time = s.heads * width;
      view.batch = s.time * view.time;
    } else if (gate) {  // (NH,B,T) with gaps
      view.time = 2;
      view.batch = 2 * s.time + 1;
      view.head = s.batch * view.batch;
    } else {  // (B,NH,T,D) with rows that are not aligned
      view.time = width + 3;
      view.head = s.time * view.time + 1;
      view.batch = s.heads * view.head;
    }
    const int64_t size = s.batch * view.batch + s.time * view.time + s.heads * view.head + width;
    memory_.assign(static_cast<size_t>(size) * (dtype == Dtype::kFloat32 ? 4 : 2), 0xff);  // NaN
    view.data = memory_.data();
  }

  void fill(std::mt19937& random, double mean, double spread, bool positive = false) {
    std::normal_distribution<double> normal(mean, spread);
    for_each([&](int64_t b, int64_t t, int64_t h, int64_t d) {
      const auto x = static_cast<float>(normal(random));
      set(b, t, h, d, positive ? std::fabs(x) : x);
    });
  }
  double get(int64_t b, int64_t t, int64_t h, int64_t d) const {
    const size_t i = index(b, t, h, d);
    if (dtype_ == Dtype::kFloat32) return reinterpret_cast<const float*>(memory_.data())[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(memory_.data())[i];
    return dtype_ == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
  }
  /// Rows [begin, begin + length) of one head.
  std::vector<double> rows(int64_t b, int64_t begin, int64_t length, int64_t h) const {
    std::vector<double> out;
    for (int64_t t = begin; t < begin + length; ++t)
      for (int64_t d = 0; d < width_; ++d) out.push_back(get(b, t, h, d));
    return out;
  }

  Dtype dtype() const { return dtype_; }

  View view;

 private:
  template <class F>
  void for_each(F f) {
    for (int64_t b = 0; b < s_.batch; ++b)
      for (int64_t t = 0; t < s_.time; ++t)
        for (int64_t h = 0; h < s_.heads; ++h)
          for (int64_t d = 0; d < width_; ++d) f(b, t, h, d);
  }
  size_t index(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return static_cast<size_t>(b * view.batch + t * view.time + h * view.head + d * view.inner);
  }
  void set(int64_t b, int64_t t, int64_t h, int64_t d, float value) {
    const size_t i = index(b, t, h, d);
    if (dtype_ == Dtype::kFloat32) {
      reinterpret_cast<float*>(memory_.data())[i] = value;
    } else {
      reinterpret_cast<uint16_t*>(memory_.data())[i] =
          dtype_ == Dtype::kBFloat16 ? prim::float_to_bf16(value) : prim::float_to_f16(value);
    }
  }

  const Setting& s_;
  int64_t width_;
  Dtype dtype_;
  std::vector<unsigned char> memory_;
};

/// Error in the 2-norm over all that was added; NaN and infinities fail at once. `nearby`: the reference for inputs that
/// are rounded a little differently. A gradient that is a difference of equal numbers moves much by that, and no kernel
/// can be closer than a few times as much.
class Error {
 public:
  explicit Error(const char* name) : name_(name) {}
  void add(double got, double wanted, double nearby) {
    expect(std::isfinite(got), name_, count_);
    wrong_ += (got - wanted) * (got - wanted);
    moved_ += (nearby - wanted) * (nearby - wanted);
    size_ += wanted * wanted;
    ++count_;
  }
  void add(const std::vector<double>& got, const std::vector<double>& wanted,
           const std::vector<double>& nearby) {
    expect(got.size() == wanted.size(), name_);
    for (size_t i = 0; i < got.size(); ++i) add(got[i], wanted[i], nearby[i]);
  }
  /// `roundings`: how many times the inputs' rounding an error may be where that is more than the tolerance. It moves
  /// well-conditioned gradients by 0.4 of the tolerance.
  void check(double tolerance, double roundings = 0, const Error* other = nullptr) const {
    const double size = size_ + (other == nullptr ? 0 : other->size_);
    if (std::sqrt(wrong_) >
        std::max(tolerance * std::sqrt(size), roundings * std::sqrt(moved_)) + 1e-30)
      throw Mismatch(std::string("wrong values: ") + name_ + ", relative error " +
                     std::to_string(std::sqrt(wrong_ / size_)) + ", conditioning " +
                     std::to_string(std::sqrt(moved_ / size_)));
  }

 private:
  const char* name_;
  double wrong_ = 0, moved_ = 0, size_ = 0;
  long count_ = 0;
};

/// Numbers as they may be after one rounding.
inline void perturb(std::vector<double>& numbers, Dtype dtype, std::mt19937& random) {
  const double unit = dtype == Dtype::kBFloat16 ? 0x1p-9 : 0x1p-17;  // one plane or two
  std::uniform_real_distribution<double> error(-unit, unit);
  for (double& x : numbers) x *= 1 + error(random);
}

inline std::vector<float> random_state(std::mt19937& random, int64_t count, double spread) {
  std::normal_distribution<double> normal(0, spread);
  std::vector<float> state(static_cast<size_t>(count));
  for (float& x : state) x = static_cast<float>(normal(random));
  return state;
}

template <class From>
std::vector<double> slice(const std::vector<From>& all, int64_t begin, int64_t count) {
  return {all.begin() + begin, all.begin() + begin + count};
}

/// Everything one call reads and writes.
struct Call {
  explicit Call(const Setting& setting, uint64_t seed)
      : s(setting),
        q(s, s.dqk, s.dtype),
        k(s, s.dqk, s.dtype),
        v(s, s.dv, s.dtype),
        h(s, s.dv, s.dtype),
        dh(s, s.dv, s.dtype),
        dq(s, s.dqk, s.dtype),
        dk(s, s.dqk, s.dtype),
        dv(s, s.dv, s.dtype),
        igate(s, 1, Dtype::kFloat32, true),
        fgate(s, 1, Dtype::kFloat32, true),
        digate(s, 1, Dtype::kFloat32, true),
        dfgate(s, 1, Dtype::kFloat32, true),
        sequences(s.packed.empty() ? s.batch : static_cast<int64_t>(s.packed.size()) - 1),
        c_size(s.dqk * s.dv) {
    std::mt19937 random(static_cast<unsigned>(7 * seed + s.time + s.dqk));
    for (Tensor* x : {&q, &k}) x->fill(random, 0, 1, s.extreme);
    for (Tensor* x : {&v, &dh}) x->fill(random, 0, 1);
    igate.fill(random, s.input_bias, s.gate_spread);
    fgate.fill(random, s.forget_bias, s.gate_spread);
    const int64_t items = sequences * s.heads;
    c.assign(items * c_size, NAN), n.assign(items * s.dqk, NAN), m.assign(items, NAN);
    product.assign(s.batch * s.time * s.heads, NAN);
    dc0.assign(items * c_size, NAN), dn0.assign(items * s.dqk, NAN);
    if (s.states) {
      c0 = random_state(random, items * c_size, 0.5), n0 = random_state(random, items * s.dqk, 0.5);
      if (s.extreme)
        for (float& x : n0) x = std::fabs(x);
      m0 = random_state(random, items, 1);
      dc = random_state(random, items * c_size, 0.5), dn = random_state(random, items * s.dqk, 0.5);
    }
    reset.assign(s.batch * s.time, false);
    if (s.resets)
      for (int64_t i = 0; i < s.batch * s.time; ++i)
        reset[i] = i % 64 == 0 ? i % 128 == 0 : i % 37 == 5 || i % 37 == 6;
    problem = {s.batch,     s.time,  s.heads,         s.dqk,           s.dv,
               sequences,   s.dtype, Dtype::kFloat32, Dtype::kFloat32, s.sigmoid,
               s.normalize, scale(), 1e-6F,           s.chunk_size,    s.two_phase};
    in.q = q.view, in.k = k.view, in.v = v.view, in.igate = igate.view, in.fgate = fgate.view;
    if (s.states) in.c0 = c0.data(), in.n0 = n0.data(), in.m0 = m0.data();
    if (s.resets) {
      in.reset = reinterpret_cast<const bool*>(reset.data());
      in.reset_batch = s.time, in.reset_time = 1;
    }
    if (!s.packed.empty()) in.cu_seqlens = s.packed.data();
  }
  float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(s.dqk))); }

  void forward() {
    std::vector<unsigned char> workspace(mlstm_forward_workspace(problem, s.device) + 256, 0xff);
    xlstm::cuda::MlstmForward call;
    call.in = in;
    call.h = h.view, call.c = c.data(), call.n = n.data(), call.m = m.data();
    call.product = product.data();
    mlstm_forward(problem, s.device, call, aligned(workspace), nullptr);
  }
  void backward() {
    xlstm::cuda::MlstmBackward call;
    call.in = in;
    call.h = h.view, call.dh = dh.view, call.product = product.data();
    if (s.states) {
      call.dc = dc.data(), call.dn = dn.data();
      if (s.start_gradients) call.dc0 = dc0.data(), call.dn0 = dn0.data();
    }
    call.dq = dq.view, call.dk = dk.view, call.dv = dv.view;
    call.digate = digate.view, call.dfgate = dfgate.view;
    std::vector<unsigned char> workspace(mlstm_backward_workspace(problem, s.device, call) + 256,
                                         0xff);
    mlstm_backward(problem, s.device, call, aligned(workspace), nullptr);
  }
  static void* aligned(std::vector<unsigned char>& memory) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  }

  xlstm::reference::MlstmInput reference_input(int64_t sequence, int64_t head) const {
    const auto [b, begin, length] = range(sequence);
    const int64_t item = sequence * s.heads + head;
    xlstm::reference::MlstmInput r;
    r.length = length, r.dqk = s.dqk, r.dv = s.dv;
    r.q = q.rows(b, begin, length, head), r.k = k.rows(b, begin, length, head);
    r.v = v.rows(b, begin, length, head);
    r.igate = igate.rows(b, begin, length, head), r.fgate = fgate.rows(b, begin, length, head);
    r.c0 = s.states ? slice(c0, item * c_size, c_size) : std::vector<double>(c_size);
    r.n0 = s.states ? slice(n0, item * s.dqk, s.dqk) : std::vector<double>(s.dqk);
    r.m0 = s.states ? m0[item] : 0;
    for (int64_t t = 0; t < length; ++t) r.reset.push_back(reset[b * s.time + begin + t] != 0);
    r.sigmoid_input_gate = s.sigmoid, r.normalize = s.normalize;
    r.scale = scale(), r.eps = 1e-6F;
    return r;
  }
  struct Range {
    int64_t batch, begin, length;
  };
  Range range(int64_t sequence) const {
    if (s.packed.empty()) return {sequence, 0, s.time};
    return {0, s.packed[sequence], s.packed[sequence + 1] - s.packed[sequence]};
  }

  const Setting& s;
  Tensor q, k, v, h, dh, dq, dk, dv, igate, fgate, digate, dfgate;
  int64_t sequences, c_size;
  std::vector<float> c0, n0, m0, c, n, m, product, dc, dn, dc0, dn0;
  std::vector<char> reset;
  xlstm::cuda::MlstmProblem problem;
  xlstm::cuda::MlstmInputs in;
};

struct Tolerance {
  double value, forget;
};
inline Tolerance tolerance(Dtype dtype) {
  // float16 is computed as float32 is, but its results are rounded to 11 bits.
  return dtype == Dtype::kBFloat16  ? Tolerance{5e-3, 1e-2}
         : dtype == Dtype::kFloat16 ? Tolerance{5e-4, 5e-4}
                                    : Tolerance{2e-5, 2e-5};
}

/// The reference's results for one head of one sequence.
struct Expected {
  xlstm::reference::MlstmOutput out;
  xlstm::reference::MlstmGradients gradients;
};
inline Expected expected(const Call& call, int64_t sequence, int64_t head, bool nearby) {
  const Setting& s = call.s;
  const auto [b, begin, length] = call.range(sequence);
  const int64_t item = sequence * s.heads + head;
  auto in = call.reference_input(sequence, head);
  std::vector<double> dh = call.dh.rows(b, begin, length, head);
  const auto state = [&](const std::vector<float>& x, int64_t size) {
    return s.states ? slice(x, item * size, size) : std::vector<double>(size);
  };
  std::vector<double> dc = state(call.dc, call.c_size), dn = state(call.dn, s.dqk);
  std::mt19937 random(static_cast<unsigned>(item));
  if (nearby)
    for (std::vector<double>* x : {&in.q, &in.k, &in.v, &in.c0, &in.n0, &dh, &dc, &dn})
      perturb(*x, s.dtype, random);
  return {mlstm_forward(in), mlstm_backward(in, dh, dc, dn)};
}

inline void compare(const Call& call) {
  const Setting& s = call.s;
  Error h("h"), c("c"), n("n"), m("m"), dq("dq"), dk("dk"), dv("dv"), di("digate"), df("dfgate"),
      dc0("dc0"), dn0("dn0");
  for (int64_t sequence = 0; sequence < call.sequences; ++sequence) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const auto [b, begin, length] = call.range(sequence);
      const int64_t item = sequence * s.heads + head;
      const Expected exact = expected(call, sequence, head, false),
                     near = expected(call, sequence, head, true);
      const auto rows = [&, b = b, begin = begin, length = length](const Tensor& x) {
        return x.rows(b, begin, length, head);
      };
      const auto state = [&](const std::vector<float>& x, int64_t size) {
        return slice(x, item * size, size);
      };
      h.add(rows(call.h), exact.out.h, near.out.h);
      c.add(state(call.c, call.c_size), exact.out.c, near.out.c);
      n.add(state(call.n, s.dqk), exact.out.n, near.out.n);
      m.add(call.m[item], exact.out.m, exact.out.m);
      dq.add(rows(call.dq), exact.gradients.q, near.gradients.q);
      dk.add(rows(call.dk), exact.gradients.k, near.gradients.k);
      dv.add(rows(call.dv), exact.gradients.v, near.gradients.v);
      di.add(rows(call.digate), exact.gradients.igate, near.gradients.igate);
      df.add(rows(call.dfgate), exact.gradients.fgate, near.gradients.fgate);
      if (!s.states || !s.start_gradients) continue;
      dc0.add(state(call.dc0, call.c_size), exact.gradients.c0, near.gradients.c0);
      dn0.add(state(call.dn0, s.dqk), exact.gradients.n0, near.gradients.n0);
    }
  }
  const Tolerance limit = tolerance(s.dtype);
  // With extreme gates one token has all the weight, or none: what the scores and gates get is then the rounding of a
  // difference of equal numbers, of the size of dv.
  const Error* size = s.extreme ? &dv : nullptr;
  // h, P, G and S are rounded on the way to what the normaliser has a part in. The forget gates' gradients are sums of
  // such numbers over tokens.
  constexpr double kRoundings = 4, kForgetRoundings = 6;
  for (const Error* e : {&h, &c, &n, &dv, &dc0}) e->check(limit.value);
  dn0.check(limit.value, kRoundings);
  for (const Error* e : {&dq, &dk, &di}) e->check(limit.value, kRoundings, size);
  df.check(limit.forget, kForgetRoundings, size);
  m.check(1e-6);
}

inline std::string describe(const Setting& s) {
  const auto number = [](const char* name, auto value) {
    return std::string(" ") + name + " " + std::to_string(value);
  };
  return number("B", s.batch) + number("T", s.time) + number("NH", s.heads) + number("DQK", s.dqk) +
         number("DV", s.dv) + number("dtype", static_cast<int>(s.dtype)) +
         number("sigmoid", s.sigmoid) + number("normalize", s.normalize) +
         number("states", s.states) + number("resets", s.resets) + number("strided", s.strided) +
         number("packed", s.packed.size()) + number("chunk_size", s.chunk_size) +
         number("two_phase", s.two_phase) + number("capability", s.device.compute_capability);
}

inline void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Call call(s, seed);
    call.forward();
    call.backward();
    compare(call);
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + describe(s));
  }
}

inline bool thread_build() { return simt::build_kind() == simt::Build::kThread; }

}  // namespace simt_test::passes
