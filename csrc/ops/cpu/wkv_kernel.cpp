#include "csrc/ops/cpu/recurrence_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class A>
constexpr A kEmpty = A(-1e38);  // exponent of a state that holds nothing

/// State of a vector of channels: numerator a e^p, denominator b e^p.
template <class A>
struct WkvState {
  Vec<A> a, b, p;
};

/// The channels i .. i+n of a row of one of the params' tensors.
template <class A>
struct Channels {
  int64_t i, n;
  Vec<A> get(const void* data, int64_t row, int64_t dim) const {
    return load(static_cast<const A*>(data) + row * dim + i, n);
  }
  void put(void* data, int64_t row, int64_t dim, const Vec<A>& value) const {
    store(static_cast<A*>(data) + row * dim + i, value, n);
  }
};

template <class A>
inline WkvState<A> first_state(const WkvParams& p, const Channels<A>& at, int64_t row) {
  if (p.a0 == nullptr) return {Vec<A>(A(0)), Vec<A>(A(0)), Vec<A>(kEmpty<A>)};
  return {at.get(p.a0, row, p.dim), at.get(p.b0, row, p.dim), at.get(p.p0, row, p.dim)};
}

template <class A>
struct Weights {
  Vec<A> old, now;
};

/// e^{x - max(x, y)}, e^{y - max(x, y)}
template <class A>
inline Weights<A> weights(const Vec<A>& x, const Vec<A>& y) {
  const Vec<A> peak = larger_lanes<A>(x, y);
  return {exp(x - peak), exp(y - peak)};
}

template <class A>
inline void enter(WkvState<A>& s, const Vec<A>& k, const Vec<A>& v, const Vec<A>& w) {
  const Vec<A> decayed = s.p - w;
  const Weights<A> e = weights<A>(decayed, k);
  s.a = e.old * s.a + e.now * v;
  s.b = e.old * s.b + e.now;
  s.p = larger_lanes<A>(decayed, k);
}

template <class A>
void forward_channels(const WkvParams& p, int64_t row, const Channels<A>& at) {
  const Vec<A> w = at.get(p.w, 0, p.dim), u = at.get(p.u, 0, p.dim);
  WkvState<A> s = first_state<A>(p, at, row);
  for (int64_t t = 0; t < p.time; ++t) {
    const int64_t token = row * p.time + t;
    if (p.reset != nullptr && p.reset[token]) s = {Vec<A>(A(0)), Vec<A>(A(0)), Vec<A>(kEmpty<A>)};
    const Vec<A> k = at.get(p.k, token, p.dim), v = at.get(p.v, token, p.dim);
    const Weights<A> e = weights<A>(s.p, u + k);
    at.put(p.y, token, p.dim, (e.old * s.a + e.now * v) / (e.old * s.b + e.now));
    enter(s, k, v, w);
  }
  at.put(p.a, row, p.dim, s.a), at.put(p.b, row, p.dim, s.b), at.put(p.p, row, p.dim, s.p);
}

/// Runs forward once to have the states again, then back. The exponents are constants: nothing depends on them.
template <class A>
void backward_channels(const WkvParams& p, int64_t row, const Channels<A>& at,
                       WkvState<A>* states) {
  const Vec<A> w = at.get(p.w, 0, p.dim), u = at.get(p.u, 0, p.dim), zero(A(0));
  states[0] = first_state<A>(p, at, row);
  for (int64_t t = 0; t < p.time; ++t) {  // states[t] enters token t, states[t + 1] leaves it
    const int64_t token = row * p.time + t;
    if (p.reset != nullptr && p.reset[token]) states[t] = {zero, zero, Vec<A>(kEmpty<A>)};
    states[t + 1] = states[t];
    enter(states[t + 1], at.get(p.k, token, p.dim), at.get(p.v, token, p.dim), w);
  }
  Vec<A> da = at.get(p.da, row, p.dim), db = at.get(p.db, row, p.dim), dw = zero, du = zero;
  for (int64_t t = p.time - 1; t >= 0; --t) {
    const int64_t token = row * p.time + t;
    const WkvState<A>& s = states[t];
    const Vec<A> k = at.get(p.k, token, p.dim), v = at.get(p.v, token, p.dim);
    const Weights<A> in = weights<A>(s.p - w, k);
    Vec<A> dv = da * in.now, dk = (da * v + db) * in.now;
    dw = dw - (da * s.a + db * s.b) * in.old;
    da = da * in.old, db = db * in.old;
    const Weights<A> out = weights<A>(s.p, u + k);
    const Vec<A> norm = out.old * s.b + out.now, y = (out.old * s.a + out.now * v) / norm;
    const Vec<A> dsum = at.get(p.dy, token, p.dim) / norm, dnorm = zero - dsum * y;
    const Vec<A> dgate = (dsum * v + dnorm) * out.now;
    du = du + dgate;
    at.put(p.dk, token, p.dim, dk + dgate);
    at.put(p.dv, token, p.dim, dv + dsum * out.now);
    da = da + dsum * out.old, db = db + dnorm * out.old;
    // What was emptied passes nothing on. Its sums are zero, so that w gets nothing either.
    if (p.reset != nullptr && p.reset[token]) da = db = zero;
  }
  at.put(p.da0, row, p.dim, da), at.put(p.db0, row, p.dim, db);
  at.put(p.dw, row, p.dim, dw), at.put(p.du, row, p.dim, du);
}

template <class A, class F>
void each_vector(const WkvParams& p, const F& f) {
  constexpr int64_t kSize = kLanes<A>;
  const int64_t vectors = (p.dim + kSize - 1) / kSize;
  at::parallel_for(0, p.batch * vectors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % vectors * kSize;
      f(task / vectors, Channels<A>{i, smaller(kSize, p.dim - i)});
    }
  });
}

template <class A>
void run_forward(const WkvParams& p) {
  each_vector<A>(p, [&](int64_t row, const Channels<A>& at) { forward_channels<A>(p, row, at); });
}

template <class A>
void run_backward(const WkvParams& p) {
  each_vector<A>(p, [&](int64_t row, const Channels<A>& at) {
    const Scratch<WkvState<A>> states(p.time + 1);
    backward_channels<A>(p, row, at, states.get());
  });
}

}  // namespace

void wkv(const WkvParams& p) {
  p.dtype == Dtype::kDouble ? run_forward<double>(p) : run_forward<float>(p);
}
void wkv_backward(const WkvParams& p) {
  p.dtype == Dtype::kDouble ? run_backward<double>(p) : run_backward<float>(p);
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
