#pragma once
// The cells: what happens to one unit at one step, and its derivatives. Once for the persistent kernels, the pointwise ones
// and the emulator. Equations: csrc/ops/slstm.h.
#include "cuda/numbers.cuh"
#include "cuda/slstm/slstm.h"

namespace xlstm::cuda {

/// kFast: as accurate as bfloat16 inputs need.
template <bool kFast>
struct GateMaths {
  static constexpr float kLog2e = 1.44269504F;

  /// e^-x for x >= 0
  static DEVICE_FUNCTION float exp_of_negative(float x) {
    return kFast ? prim::ex2(-kLog2e * x) : expf(-x);
  }
  static DEVICE_FUNCTION float inverse(float x) { return kFast ? prim::rcp(x) : 1.0F / x; }
  /// log(1 + x) for x from 0 to 1. Fast: a polynomial through Chebyshev's nodes, 3e-7 of the result; no branch.
  static DEVICE_FUNCTION float log1p(float x) {
    if (!kFast) return log1pf(x);
    constexpr float kTerms[] = {0.99999982F, -0.49997449F, 0.33276176F, -0.24499612F,
                                0.17757024F, -0.10785368F, 0.04421419F, -0.00857468F};
    float sum = kTerms[7];
#pragma unroll
    for (int i = 6; i >= 0; --i) sum = sum * x + kTerms[i];
    return sum * x;
  }
  static DEVICE_FUNCTION float tanh(float x) { return kFast ? prim::tanh_approx(x) : tanhf(x); }
  /// 1 / (1 + e^-x). Where e^-x would overflow x is large and negative.
  static DEVICE_FUNCTION float sigmoid(float x) {
    const float e = exp_of_negative(x < 0 ? -x : x), r = inverse(1.0F + e);
    return x < 0 ? e * r : r;
  }
};

/// Of one unit and sequence. The empty state: 0, 0, -infinity.
struct CellState {
  float c, n, m;
};
DEVICE_FUNCTION CellState empty_state() { return {0, 0, prim::float_of(0xff800000U)}; }

/// Pre-activations g: i, f, z, o.
struct CellGates {
  float g[4];
};

/// What a step came to.
struct CellStep {
  float i, f, z, o;  ///< gates as they act: i' and f' of the sLSTM
  float slope;       ///< derivative of log f' by its pre-activation
  CellState after;
  float hidden;     ///< y = o hidden
  float inverse_n;  ///< of the state after; the LSTM: not used
};

/// Of the state in units of its e^m; dn of the LSTM stays 0.
struct CellGradient {
  float dc, dn;
};

/// All of a step's derivatives that depend on no gradient. m is constant.
struct CellSlopes {
  float f_c, f_n;   ///< of the forget gate's pre-activation, from dc and dn
  float forget;     ///< of the state before, from that after
  float hidden;     ///< dn gets minus this times what dc gets; the LSTM: 0
  float y;          ///< of c, from y
  float i, z;       ///< of the input gate's pre-activation: i (dc z + dn)
  float o;          ///< of the output gate's, from y
  float candidate;  ///< of z's, from dc
};

/// Gradients of the pre-activations from that of y; `d` is of the state after the step and becomes that of the state
/// before it.
DEVICE_FUNCTION CellGates cell_gradients(const CellSlopes& s, float dy, CellGradient& d) {
  const float dc = dy * s.y;
  d.dc += dc;
  d.dn -= dc * s.hidden;
  CellGates out;
  out.g[0] = s.i * (d.dc * s.z + d.dn);
  out.g[1] = d.dc * s.f_c + d.dn * s.f_n;
  out.g[2] = d.dc * s.candidate;
  out.g[3] = dy * s.o;
  d.dc *= s.forget;
  d.dn *= s.forget;
  return out;
}

/// sLSTM. One of the stabilised gates is always 1: with d = log f + m - i the other is e^-|d|.
template <bool kFast, bool kExponentialForget>
struct SlstmPolicy {
  using Maths = GateMaths<kFast>;
  static constexpr int kStates = 3;

  static DEVICE_FUNCTION CellStep step(const CellGates& gates, const CellState& s) {
    const float gi = gates.g[0], gf = gates.g[1];
    CellStep r;
    float log_f = gf;
    r.slope = 1;
    if constexpr (!kExponentialForget) {
      // log sigmoid(f) = min(f, 0) - log(1 + e^-|f|); its derivative is sigmoid(-f).
      const float e = Maths::exp_of_negative(gf < 0 ? -gf : gf), inverse = Maths::inverse(1.0F + e);
      log_f = (gf < 0 ? gf : 0.0F) - Maths::log1p(e);
      r.slope = gf < 0 ? inverse : e * inverse;
    }
    const float carried = log_f + s.m, empty = prim::float_of(0xff800000U);
    // An empty state loses even to i = -infinity.
    const float d = carried == empty ? empty : carried - gi;
    const bool keeps = d >= 0;
    const float e = Maths::exp_of_negative(keeps ? d : -d);
    r.i = keeps ? e : gi == gi ? 1.0F : gi;
    r.f = keeps ? 1.0F : e;
    r.z = Maths::tanh(gates.g[2]);
    r.o = Maths::sigmoid(gates.g[3]);
    r.after.m = carried > gi ? carried : gi;
    r.after.c = r.f * s.c + r.i * r.z;
    r.after.n = r.f * s.n + r.i;
    r.inverse_n = Maths::inverse(r.after.n);
    r.hidden = r.after.c * r.inverse_n;
    return r;
  }

  static DEVICE_FUNCTION CellSlopes slopes(const CellStep& r, const CellState& before) {
    const float f = r.f * r.slope;
    return {f * before.c,
            f * before.n,
            r.f,
            r.hidden,
            r.o * r.inverse_n,
            r.i,
            r.z,
            r.o * r.hidden * (1.0F - r.o),
            r.i * (1.0F - r.z * r.z)};
  }
};

template <bool kFast>
struct LstmPolicy {
  using Maths = GateMaths<kFast>;
  static constexpr int kStates = 1;

  static DEVICE_FUNCTION CellStep step(const CellGates& gates, const CellState& s) {
    CellStep r;
    r.i = Maths::sigmoid(gates.g[0]);
    r.f = Maths::sigmoid(gates.g[1]);
    r.z = Maths::tanh(gates.g[2]);
    r.o = Maths::sigmoid(gates.g[3]);
    r.slope = 1.0F - r.f;
    r.after = {r.f * s.c + r.i * r.z, 0, 0};
    r.hidden = Maths::tanh(r.after.c);
    r.inverse_n = 1;
    return r;
  }
  static DEVICE_FUNCTION CellSlopes slopes(const CellStep& r, const CellState& before) {
    return {before.c * r.f * r.slope,
            0,
            r.f,
            0,
            r.o * (1.0F - r.hidden * r.hidden),
            r.i * (1.0F - r.i),
            r.z,
            r.o * r.hidden * (1.0F - r.o),
            r.i * (1.0F - r.z * r.z)};
  }
};

/// The policy of a cell; kFast for one plane per number.
template <SlstmCell kCell, bool kFast>
struct CellPolicyOf {
  using Type = SlstmPolicy<kFast, kCell == SlstmCell::kSlstmExpf>;
};
template <bool kFast>
struct CellPolicyOf<SlstmCell::kLstm, kFast> {
  using Type = LstmPolicy<kFast>;
};
template <SlstmCell kCell, bool kFast>
using CellPolicy = typename CellPolicyOf<kCell, kFast>::Type;

}  // namespace xlstm::cuda
