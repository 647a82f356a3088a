#include "tests/reference/slstm_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace xlstm::reference {
namespace {

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

Real sigmoid(Real x) { return 1 / (1 + std::exp(-x)); }
Real log_sigmoid(Real x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

struct Unit {
  Real y = 0, c = 0, n = 0, m = -kInfinity;
};

Unit next(const std::string& cell, const Unit& s, const Real (&g)[4]) {
  Unit after;
  if (cell == "lstm") {
    after.c = sigmoid(g[1]) * s.c + sigmoid(g[0]) * std::tanh(g[2]);
    after.y = sigmoid(g[3]) * std::tanh(after.c);
    after.n = after.m = 0;
    return after;
  }
  const Real log_f = cell == "slstm" ? log_sigmoid(g[1]) : g[1];
  after.m = std::max(log_f + s.m, g[0]);
  const Real i = std::exp(g[0] - after.m), f = std::exp(log_f + s.m - after.m);
  after.c = f * s.c + i * std::tanh(g[2]);
  after.n = f * s.n + i;
  after.y = sigmoid(g[3]) * after.c / after.n;
  return after;
}

void run_sequence(const SlstmProblem& p, int64_t batch, int64_t begin, int64_t end, int64_t state,
                  int64_t head, SlstmSolution& out) {
  std::vector<Unit> units(p.dh);
  for (int64_t u = 0; u < p.dh; ++u) {
    const int64_t at = (state * p.heads + head) * p.dh + u;
    if (p.y0.empty()) continue;
    units[u] = {p.y0[at], p.c0[at], p.n0[at], p.m0[at]};
  }
  for (int64_t t = begin; t < end; ++t) {
    if (!p.reset.empty() && p.reset[batch * p.time + t]) units.assign(p.dh, Unit{});
    std::vector<Unit> after(p.dh);
    for (int64_t u = 0; u < p.dh; ++u) {
      Real g[4];
      for (int64_t gate = 0; gate < 4; ++gate) {
        const int64_t row = (gate * p.heads + head) * p.dh + u;
        g[gate] = p.wx[(((batch * p.time + t) * 4 + gate) * p.heads + head) * p.dh + u] + p.b[row];
        for (int64_t k = 0; k < p.dh; ++k) g[gate] += p.r[row * p.dh + k] * units[k].y;
      }
      after[u] = next(p.cell, units[u], g);
      out.y[((batch * p.time + t) * p.heads + head) * p.dh + u] = after[u].y;
    }
    units = after;
  }
  for (int64_t u = 0; u < p.dh; ++u) {
    const int64_t at = (state * p.heads + head) * p.dh + u;
    out.y_last[at] = units[u].y;
    out.c[at] = units[u].c;
    out.n[at] = p.cell == "lstm" ? 0 : units[u].n;
    out.m[at] = p.cell == "lstm" ? 0 : units[u].m;
  }
}

}  // namespace

SlstmSolution slstm(const SlstmProblem& p) {
  const bool packed = !p.cu_seqlens.empty();
  const int64_t states = packed ? static_cast<int64_t>(p.cu_seqlens.size()) - 1 : p.batch;
  SlstmSolution out;
  out.y.assign(p.batch * p.time * p.heads * p.dh, 0);
  for (auto* state : {&out.y_last, &out.c, &out.n, &out.m})
    state->assign(states * p.heads * p.dh, 0);
  for (int64_t s = 0; s < states; ++s)
    for (int64_t head = 0; head < p.heads; ++head)
      packed ? run_sequence(p, 0, p.cu_seqlens[s], p.cu_seqlens[s + 1], s, head, out)
             : run_sequence(p, s, 0, p.time, s, head, out);
  return out;
}

}  // namespace xlstm::reference
