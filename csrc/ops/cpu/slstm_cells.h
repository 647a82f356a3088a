#pragma once
// The cells: what happens to one vector of units at one step (arXiv 2405.04517, eq. 8-18; backward by hand).
// Of the sLSTM's two stabilised gates one is always 1: with d = log f + m_{t-1} - i, f' = 1, i' = e^-d for d >= 0 and
// f' = e^d, i' = 1 below. Both are kept in one number: e = e^-|d|, positive when it is i', with sign bit when it is f'.
#include "csrc/ops/cpu/slstm_vector.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr double kInfinity = __builtin_inf();

template <class Real>
struct Gates {
  Vec<Real> i, f, z, o;
};
template <class Real>
struct State {
  Vec<Real> y, c, n, m;
};

template <class Real>
XLSTM_INLINE Vec<Real> ones() {
  return Vec<Real>{} + Real(1);
}

/// c, n, m of the empty state are 0, 0, -inf.
template <class RealType, bool kExponentialForget>
struct Slstm {
  using Real = RealType;
  using V = Vec<Real>;
  static constexpr bool kNormalized = true;
  static constexpr int kSaved = kExponentialForget ? 3 : 4;

  /// Steps the state; writes what the backward needs into saved[kSaved].
  static XLSTM_INLINE void forward(const Gates<Real>& g, State<Real>& s, V* saved) {
    const V ez = expm1_negative<Real>(absolute<Real>(g.z) * Real(-2)),
            eo = exp_negative<Real>(-absolute<Real>(g.o));
    // Denominators of tanh and the sigmoids lie in [1, 3]: one division serves their product.
    const V dz = ez + Real(2), d_o = eo + Real(1), dzo = dz * d_o;
    V log_f, inverse_zo, not_f{};
    if constexpr (kExponentialForget) {
      log_f = g.f;
      inverse_zo = Real(1) / dzo;
    } else {
      const V ef = exp_negative<Real>(-absolute<Real>(g.f));
      const V df = ef + Real(1), dl = ef + Real(2), dfl = df * dl;
      const V inverse = Real(1) / (dfl * dzo), inverse_fl = inverse * dzo;
      inverse_zo = inverse * dfl;
      // log sigmoid(f) = min(f, 0) - log(1 + e^-|f|)
      log_f = (g.f < Real(0) ? g.f : V{}) - twice_atanh<Real>(ef * inverse_fl * df);
      not_f = (g.f < Real(0) ? ones<Real>() : ef) * inverse_fl * dl;
    }
    const V z = with_sign<Real>(-ez * inverse_zo * d_o, g.z);
    const V o = (g.o < Real(0) ? eo : ones<Real>()) * inverse_zo * dz;

    const V carried = log_f + s.m;
    const V d = carried == Real(-kInfinity)
                    ? carried
                    : carried - g.i;  // an empty state loses even to i = -inf
    const Int<Real> keeps = d >= Real(0);
    const V e = exp_negative<Real>(-absolute<Real>(d));
    const V i = keeps ? e : (g.i == g.i ? ones<Real>() : g.i);
    const V f = keeps ? ones<Real>() : e;
    s.m = carried > g.i ? carried : g.i;
    s.c = f * s.c + i * z;
    s.n = f * s.n + i;
    s.y = o * s.c / s.n;
    saved[0] = keeps ? e : -e;
    saved[1] = z;
    saved[2] = o;
    if constexpr (!kExponentialForget) saved[3] = not_f;
  }

  static XLSTM_INLINE void split(V e, V& i, V& f) {
    const Int<Real> keeps = (Int<Real>)e >= 0;
    i = keeps ? e : ones<Real>();
    f = keeps ? ones<Real>() : absolute<Real>(e);
  }
  /// The step again from the saved gates. aux[0] = 1/n, aux[1] = c/n.
  static XLSTM_INLINE void replay(const V* saved, State<Real>& s, V* aux) {
    V i, f;
    split(saved[0], i, f);
    s.c = f * s.c + i * saved[1];
    s.n = f * s.n + i;
    aux[0] = Real(1) / s.n;
    aux[1] = s.c * aux[0];
    s.y = saved[2] * aux[1];
  }
  /// Gate gradients from dy and the carried dc, dn (of the state after the step; on return of the state before it).
  static XLSTM_INLINE Gates<Real> backward(const V* saved, const V* aux, V c_before, V n_before,
                                           V dy, V& dc, V& dn) {
    V i, f;
    split(saved[0], i, f);
    const V z = saved[1], o = saved[2], dh = dy * o;
    dc += dh * aux[0];
    dn -= dh * aux[0] * aux[1];
    Gates<Real> g;
    g.i = i * (dc * z + dn);
    g.f = f * (dc * c_before + dn * n_before);
    if constexpr (!kExponentialForget) g.f *= saved[3];
    g.z = dc * i * (Real(1) - z * z);
    g.o = dh * aux[1] * (Real(1) - o);
    dc *= f;
    dn *= f;
    return g;
  }
};

/// n and m are not used. saved: sigmoid(i), tanh(z), sigmoid(o), sigmoid(f).
template <class RealType>
struct Lstm {
  using Real = RealType;
  using V = Vec<Real>;
  static constexpr bool kNormalized = false;
  static constexpr int kSaved = 4;

  static XLSTM_INLINE V tanh(V x) {
    const V e = expm1_negative<Real>(absolute<Real>(x) * Real(-2));
    return with_sign<Real>(-e / (e + Real(2)), x);
  }
  static XLSTM_INLINE V sigmoid(V x) {
    const V e = exp_negative<Real>(-absolute<Real>(x));
    return (x < Real(0) ? e : ones<Real>()) / (e + Real(1));
  }
  static XLSTM_INLINE void forward(const Gates<Real>& g, State<Real>& s, V* saved) {
    saved[0] = sigmoid(g.i);
    saved[1] = tanh(g.z);
    saved[2] = sigmoid(g.o);
    saved[3] = sigmoid(g.f);
    s.c = saved[3] * s.c + saved[0] * saved[1];
    s.y = saved[2] * tanh(s.c);
  }
  /// aux[0] = tanh(c)
  static XLSTM_INLINE void replay(const V* saved, State<Real>& s, V* aux) {
    s.c = saved[3] * s.c + saved[0] * saved[1];
    aux[0] = tanh(s.c);
    aux[1] = V{};
    s.y = saved[2] * aux[0];
  }
  static XLSTM_INLINE Gates<Real> backward(const V* saved, const V* aux, V c_before, V, V dy, V& dc,
                                           V&) {
    const V i = saved[0], z = saved[1], o = saved[2], f = saved[3], dh = dy * o;
    dc += dh * (Real(1) - aux[0] * aux[0]);
    Gates<Real> g;
    g.i = dc * z * i * (Real(1) - i);
    g.f = dc * c_before * f * (Real(1) - f);
    g.z = dc * i * (Real(1) - z * z);
    g.o = dh * aux[0] * (Real(1) - o);
    dc *= f;
    return g;
  }
};

/// Calls f with a value of the cell's policy type.
template <class Real, class F>
XLSTM_INLINE void with_cell(SlstmCell cell, const F& f) {
  if (cell == SlstmCell::kSlstm) {
    f(Slstm<Real, false>{});
  } else if (cell == SlstmCell::kSlstmExpf) {
    f(Slstm<Real, true>{});
  } else {
    f(Lstm<Real>{});
  }
}

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
