#include "tests/reference/mlstm_reference.h"

#include <algorithm>
#include <cmath>

namespace xlstm::reference {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

/// The state before and after a token, and what the token made of it.
struct Step {
  std::vector<double> c_before, n_before, c, n;
  double m = 0, forget = 0, input = 0, product = 0, norm = 1;
  bool normaliser_active = false;
};

std::vector<Step> run(const MlstmInput& in) {
  std::vector<Step> steps(static_cast<size_t>(in.length));
  std::vector<double> c = in.c0, n = in.n0;
  double m = in.sigmoid_input_gate ? 0 : in.m0;
  for (int64_t t = 0; t < in.length; ++t) {
    Step& s = steps[t];
    if (!in.reset.empty() && in.reset[t]) {
      std::fill(c.begin(), c.end(), 0.0);
      std::fill(n.begin(), n.end(), 0.0);
      m = 0;
    }
    s.c_before = c;
    s.n_before = n;
    const double log_forget = log_sigmoid(in.fgate[t]);
    const double log_input = in.sigmoid_input_gate ? log_sigmoid(in.igate[t]) : in.igate[t];
    s.m = in.sigmoid_input_gate ? 0 : std::max(log_forget + m, log_input);
    s.forget = std::exp(log_forget + m - s.m);
    s.input = std::exp(log_input - s.m);
    m = s.m;
    for (int64_t i = 0; i < in.dqk; ++i) {
      const double k = in.k[t * in.dqk + i];
      n[i] = s.forget * n[i] + s.input * k;
      s.product += in.scale * in.q[t * in.dqk + i] * n[i];
      for (int64_t j = 0; j < in.dv; ++j)
        c[i * in.dv + j] = s.forget * c[i * in.dv + j] + s.input * k * in.v[t * in.dv + j];
    }
    s.c = c;
    s.n = n;
    if (in.normalize) {
      const double floor = std::exp(std::min(-s.m, 80.0));
      s.normaliser_active = std::fabs(s.product) > floor;
      s.norm = std::max(std::fabs(s.product), floor) + in.eps;
    }
  }
  return steps;
}

double numerator(const MlstmInput& in, const Step& s, int64_t t, int64_t j) {
  double sum = 0;
  for (int64_t i = 0; i < in.dqk; ++i) sum += in.scale * in.q[t * in.dqk + i] * s.c[i * in.dv + j];
  return sum;
}

}  // namespace

MlstmOutput mlstm_forward(const MlstmInput& in) {
  MlstmOutput out;
  const std::vector<Step> steps = run(in);
  for (const Step& s : steps) {
    out.norm.push_back(s.norm);
    out.product.push_back(s.product);
  }
  for (int64_t t = 0; t < in.length; ++t)
    for (int64_t j = 0; j < in.dv; ++j)
      out.h.push_back(numerator(in, steps[t], t, j) / steps[t].norm);
  out.c = in.length == 0 ? in.c0 : steps.back().c;
  out.n = in.length == 0 ? in.n0 : steps.back().n;
  out.m = in.length == 0 ? (in.sigmoid_input_gate ? 0 : in.m0) : steps.back().m;
  return out;
}

MlstmGradients mlstm_backward(const MlstmInput& in, const std::vector<double>& dh,
                              const std::vector<double>& dc_end,
                              const std::vector<double>& dn_end) {
  const std::vector<Step> steps = run(in);
  MlstmGradients g;
  g.q.resize(in.q.size());
  g.k.resize(in.k.size());
  g.v.resize(in.v.size());
  g.igate.resize(in.igate.size());
  g.fgate.resize(in.fgate.size());
  std::vector<double> dc = dc_end, dn = dn_end;
  for (int64_t t = in.length - 1; t >= 0; --t) {
    const Step& s = steps[t];
    const double *q = &in.q[t * in.dqk], *k = &in.k[t * in.dqk], *v = &in.v[t * in.dv],
                 *dht = &dh[t * in.dv];
    double dnorm = 0;  // d / d norm of sum_j dh_j num_j / norm
    for (int64_t j = 0; j < in.dv; ++j)
      dnorm -= dht[j] * numerator(in, s, t, j) / (s.norm * s.norm);
    const double dproduct = !s.normaliser_active ? 0 : s.product < 0 ? -dnorm : dnorm;
    double dinput = 0, dforget = 0;
    for (int64_t i = 0; i < in.dqk; ++i) {
      double dqi = dproduct * s.n[i], dki = 0;
      dn[i] += dproduct * in.scale * q[i];
      for (int64_t j = 0; j < in.dv; ++j) {
        double& d = dc[i * in.dv + j];
        dqi += dht[j] / s.norm * s.c[i * in.dv + j];
        d += dht[j] / s.norm * in.scale * q[i];
        dki += d * v[j];
        g.v[t * in.dv + j] += s.input * d * k[i];
        dinput += d * k[i] * v[j];
        dforget += d * s.c_before[i * in.dv + j];
        d *= s.forget;
      }
      dki += dn[i];
      dinput += dn[i] * k[i];
      dforget += dn[i] * s.n_before[i];
      dn[i] *= s.forget;
      g.q[t * in.dqk + i] = in.scale * dqi;
      g.k[t * in.dqk + i] = s.input * dki;
    }
    g.igate[t] = dinput * s.input * (in.sigmoid_input_gate ? sigmoid(-in.igate[t]) : 1);
    g.fgate[t] = dforget * s.forget * sigmoid(-in.fgate[t]);
    if (!in.reset.empty() && in.reset[t]) {
      std::fill(dc.begin(), dc.end(), 0.0);
      std::fill(dn.begin(), dn.end(), 0.0);
    }
  }
  g.c0 = dc;
  g.n0 = dn;
  return g;
}

}  // namespace xlstm::reference
