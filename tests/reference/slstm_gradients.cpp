#include "tests/reference/slstm_gradients.h"

#include <cmath>
#include <limits>

namespace xlstm::reference {
namespace {

using Vector = std::vector<double>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double log_sigmoid(double x) {
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}

/// A unit at one step: its state before, its gates (i' and f' of the sLSTM) and derivatives of log f'.
struct Step {
  double y, c, n, i, f, z, o, dlog_f, dlog_i, c_after, n_after;
};

class Sequence {
 public:
  Sequence(const SlstmProblem& problem, int64_t batch_row, int64_t from, int64_t to, int64_t state,
           int64_t head_index)
      : p(problem),
        batch(batch_row),
        begin(from),
        length(to - from),
        states((state * p.heads + head_index) * p.dh),
        head(head_index),
        lstm(p.cell == "lstm"),
        steps(static_cast<size_t>(length * p.dh)) {}

  void forward() {
    const auto start = [&](const std::vector<Real>& x, double otherwise) {
      Vector out(static_cast<size_t>(p.dh), otherwise);
      for (int64_t u = 0; u < p.dh && !x.empty(); ++u)
        out[static_cast<size_t>(u)] = static_cast<double>(x[static_cast<size_t>(states + u)]);
      return out;
    };
    const double empty = -std::numeric_limits<double>::infinity();
    Vector y = start(p.y0, 0), c = start(p.c0, 0), n = start(lstm ? p.c0 : p.n0, 0),
           m = start(lstm ? std::vector<Real>() : p.m0, empty);
    for (int64_t t = 0; t < length; ++t) {
      if (reset(t)) {
        for (Vector* x : {&y, &c, &n}) x->assign(x->size(), 0);
        m.assign(m.size(), empty);
      }
      const Vector y_before = y;
      for (int64_t u = 0; u < p.dh; ++u) {
        const auto at = static_cast<size_t>(u);
        double g[4];
        for (int64_t gate = 0; gate < 4; ++gate) {
          const int64_t row = (gate * p.heads + head) * p.dh + u;
          g[gate] = static_cast<double>(p.wx[wx_index(t, gate, u)] + p.b[static_cast<size_t>(row)]);
          for (int64_t k = 0; k < p.dh; ++k)
            g[gate] += static_cast<double>(p.r[static_cast<size_t>(row * p.dh + k)]) *
                       y_before[static_cast<size_t>(k)];
        }
        Step& s = step(t, u);
        s.y = y_before[at], s.c = c[at], s.n = n[at];
        s.z = std::tanh(g[2]), s.o = sigmoid(g[3]);
        if (lstm) {
          s.i = sigmoid(g[0]), s.f = sigmoid(g[1]);
          s.dlog_i = 1 - s.i, s.dlog_f = 1 - s.f;
        } else {
          const bool expf = p.cell == "slstm_expf";
          const double log_f = expf ? g[1] : log_sigmoid(g[1]);
          const double next = std::fmax(log_f + m[at], g[0]);
          s.i = std::exp(g[0] - next), s.f = std::exp(log_f + m[at] - next);
          s.dlog_i = 1, s.dlog_f = expf ? 1 : sigmoid(-g[1]);
          m[at] = next;
        }
        s.c_after = c[at] = s.f * c[at] + s.i * s.z;
        s.n_after = n[at] = s.f * n[at] + s.i;
        y[at] = s.o * (lstm ? std::tanh(c[at]) : c[at] / n[at]);
      }
    }
  }

  void backward(const SlstmLoss& loss, SlstmGradients& out) {
    const auto size = static_cast<size_t>(p.dh);
    Vector carried(size), dc(size), dn(size);
    for (size_t u = 0; u < size; ++u) {
      const size_t at = static_cast<size_t>(states) + u;
      carried[u] = loss.y_last[at], dc[u] = loss.c[at], dn[u] = lstm ? 0 : loss.n[at];
    }
    for (int64_t t = length - 1; t >= 0; --t) {
      Vector before(size, 0);
      for (int64_t u = 0; u < p.dh; ++u) {
        const auto at = static_cast<size_t>(u);
        const Step& s = step(t, u);
        const double dy = carried[at] + loss.y[static_cast<size_t>(token(t) * p.dh + u)];
        double hidden;
        if (lstm) {
          hidden = std::tanh(s.c_after);
          dc[at] += dy * s.o * (1 - hidden * hidden);
        } else {
          hidden = s.c_after / s.n_after;
          dc[at] += dy * s.o / s.n_after;
          dn[at] -= dy * s.o * hidden / s.n_after;
        }
        const double g[4] = {s.i * s.dlog_i * (dc[at] * s.z + dn[at]),
                             s.f * s.dlog_f * (dc[at] * s.c + dn[at] * s.n),
                             dc[at] * s.i * (1 - s.z * s.z), dy * hidden * s.o * (1 - s.o)};
        dc[at] *= s.f, dn[at] *= s.f;
        for (int64_t gate = 0; gate < 4; ++gate) {
          const int64_t row = (gate * p.heads + head) * p.dh + u;
          out.wx[wx_index(t, gate, u)] = g[gate];
          out.b[static_cast<size_t>(row)] += g[gate];
          for (int64_t k = 0; k < p.dh; ++k) {
            const auto weight = static_cast<size_t>(row * p.dh + k);
            out.r[weight] += g[gate] * step(t, k).y;
            before[static_cast<size_t>(k)] += g[gate] * static_cast<double>(p.r[weight]);
          }
        }
      }
      for (double& x : before) {
        if (loss.cut) x = 0;
        if (loss.clip > 0) x = std::fmin(loss.clip, std::fmax(-loss.clip, x));
      }
      carried = before;
      if (!reset(t)) continue;
      for (Vector* x : {&carried, &dc, &dn}) x->assign(size, 0);
    }
    for (size_t u = 0; u < size; ++u) {
      const size_t at = static_cast<size_t>(states) + u;
      out.y0[at] = carried[u], out.c0[at] = dc[u], out.n0[at] = dn[u];
    }
  }

 private:
  bool reset(int64_t t) const {
    return !p.reset.empty() && p.reset[static_cast<size_t>(batch * p.time + begin + t)] != 0;
  }
  int64_t token(int64_t t) const { return (batch * p.time + begin + t) * p.heads + head; }
  size_t wx_index(int64_t t, int64_t gate, int64_t u) const {
    return static_cast<size_t>((((batch * p.time + begin + t) * 4 + gate) * p.heads + head) * p.dh +
                               u);
  }
  Step& step(int64_t t, int64_t u) { return steps[static_cast<size_t>(t * p.dh + u)]; }

  const SlstmProblem& p;
  const int64_t batch, begin, length, states, head;
  const bool lstm;
  std::vector<Step> steps;
};

}  // namespace

SlstmGradients slstm_gradients(const SlstmProblem& p, const SlstmLoss& loss) {
  const bool packed = !p.cu_seqlens.empty();
  const int64_t count = packed ? static_cast<int64_t>(p.cu_seqlens.size()) - 1 : p.batch;
  SlstmGradients out;
  out.wx.assign(p.wx.size(), 0), out.r.assign(p.r.size(), 0), out.b.assign(p.b.size(), 0);
  for (Vector* x : {&out.y0, &out.c0, &out.n0})
    x->assign(static_cast<size_t>(count * p.heads * p.dh), 0);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const auto at = static_cast<size_t>(s);
      Sequence sequence(p, packed ? 0 : s, packed ? p.cu_seqlens[at] : 0,
                        packed ? p.cu_seqlens[at + 1] : p.time, s, head);
      sequence.forward();
      sequence.backward(loss, out);
    }
  }
  return out;
}

}  // namespace xlstm::reference
