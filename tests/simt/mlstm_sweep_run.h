#pragma once
// Launches of the sweep kernels alone, all four uses, and their comparison with the recurrence in float64.
#include <string>
#include <vector>

#include "tests/simt/mlstm_sweep_problem.h"
#include "tests/simt/runtime.h"

namespace simt_test::sweep {

struct Tolerance {
  double value, dots;
};
inline Tolerance tolerance(Dtype dtype) {
  return dtype == Dtype::kBFloat16  ? Tolerance{5e-3, 1e-2}
         : dtype == Dtype::kFloat16 ? Tolerance{5e-4, 2e-5}  // results are rounded to 11 bits
                                    : Tolerance{2e-5, 2e-5};
}

/// The functions of mlstm_launch.h under test.
struct Kernels {
  void (*launch)(Use, const SweepParams&, const DeviceLimits&, Stream);
  bool (*covers)(Use, int contraction, Dtype, const DeviceLimits&);
  int (*tile_columns)(int contraction, int columns, Dtype, const DeviceLimits&);
};

/// One launch: its params, its results, and their comparison.
struct Sweep {
  Sweep(const Kernels& kernels_, const Problem& problem, Use use_)
      : kernels(kernels_),
        x(problem),
        use(use_),
        name(use == Use::kH    ? "h"
             : use == Use::kDv ? "dv"
             : use == Use::kDq ? "dq"
                               : "dk"),
        out(x.s, use == Use::kH || use == Use::kDv ? x.s.dv : x.s.dqk, x.s.dtype) {
    const Setting& s = x.s;
    const bool reverse = use == Use::kDv || use == Use::kDk;
    const Operand &q = x.q.operand, &k = x.k.operand, &v = x.v.operand, &g = x.g.operand;
    p.chunks = x.chunks;
    p.a = use == Use::kH ? q : use == Use::kDv ? k : use == Use::kDq ? g : v;
    p.b = use == Use::kH ? k : use == Use::kDv ? q : use == Use::kDq ? v : g;
    p.x = use == Use::kH ? v : use == Use::kDv ? g : use == Use::kDq ? k : q;
    p.out = out.operand;
    p.scale = s.scale();
    p.records = x.records.data(), p.gamma = x.gamma.data();
    p.normalize = s.normalize, p.eps = 1e-6F;
    p.dqk = static_cast<int32_t>(s.dqk), p.dv = static_cast<int32_t>(s.dv);
    if (s.states || s.segments > 1) {
      p.start_c = reverse ? x.start_dc.data() : x.start_c.data();
      p.start_n = reverse ? x.start_dn.data() : x.start_n.data();
    }
    const int64_t items = static_cast<int64_t>(x.heads.size());
    end_c.assign(items * s.dqk * s.dv, NAN), end_n.assign(items * s.dqk, NAN);
    if (use == Use::kH || use == Use::kDv) p.end_c = end_c.data();
    if (use == Use::kH || use == Use::kDk) p.end_n = end_n.data();
    product.assign(s.batch * s.time * s.heads, NAN);
    if (use == Use::kH) p.product = product.data();
    if (use == Use::kH || use == Use::kDv) return;
    if (s.normalize) p.z = x.z.data();
    p.dot = use == Use::kDq ? q : k;
    tile_columns = kernels.tile_columns(p.a.width, p.x.width, s.dtype, s.device);
    tiles = (s.dqk + tile_columns - 1) / tile_columns;
    dots.assign(tiles * s.heads * x.chunks.slots * s.chunk, NAN);
    p.dots = dots.data();
  }

  void run_and_compare() {
    const Setting& s = x.s;
    kernels.launch(use, p, s.device, nullptr);
    const Tolerance limit = tolerance(s.dtype);
    Difference value(name), end("end state"), product_error("product"), dot("dots");
    for (size_t item = 0; item < x.heads.size(); ++item) {
      const auto i = static_cast<int64_t>(item);
      const Head& head = x.heads[item];
      const auto& gradients = head.gradients;
      const Numbers& wanted = use == Use::kH    ? head.h
                              : use == Use::kDv ? gradients.v
                              : use == Use::kDq ? gradients.q
                                                : gradients.k;
      compare_values(i, wanted, value);
      if (use == Use::kH) end.add(end_c, i * s.dqk * s.dv, head.c_end);
      if (use == Use::kH) end.add(end_n, i * s.dqk, head.n_end);
      if (use == Use::kDv) end.add(end_c, i * s.dqk * s.dv, gradients.c0);
      if (use == Use::kDk) end.add(end_n, i * s.dqk, gradients.n0);
      if (use == Use::kH) compare_product(i, product_error);
      if (use == Use::kDq) compare_dots(i, head.in.q, gradients.q, head.direct.q, dot);
      if (use == Use::kDk) compare_dots(i, head.in.k, gradients.k, head.direct.k, dot);
    }
    value.check(limit.value);
    end.check(s.dtype == Dtype::kFloat16 ? 2e-5 : limit.value);
    product_error.check(limit.dots);
    dot.check(limit.dots);
    const int64_t numbers = static_cast<int64_t>(s.batch * s.time * s.heads * out.operand.width);
    expect(out.bytes_written() <= numbers * (s.dtype == Dtype::kFloat32 ? 4 : 2),
           "stores outside the output");
  }

  /// dq and dk are the numerator's part and the normaliser's, which cancel where one token outweighs the others.
  void compare_values(int64_t item, const Numbers& wanted, Difference& error) const {
    const Numbers got = out.rows(item / x.s.heads, item % x.s.heads);
    const auto& direct = x.heads[item].direct;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (use == Use::kH || use == Use::kDv) {
        error.add(got[i], wanted[i]);
      } else {
        const double numerator = use == Use::kDq ? direct.q[i] : direct.k[i];
        error.add(got[i], wanted[i], squares(wanted[i], numerator));
      }
    }
  }
  static double squares(double sum, double term) {
    return term * term + (sum - term) * (sum - term);
  }

  void compare_product(int64_t item, Difference& error) const {
    const Setting& s = x.s;
    const int64_t row = s.packed.empty() ? item / s.heads * s.time : s.begin(item / s.heads);
    for (int64_t t = 0; t < x.heads[item].in.length; ++t)
      error.add(product[(row + t) * s.heads + item % s.heads], x.heads[item].product[t]);
  }

  void compare_dots(int64_t item, const Numbers& a, const Numbers& b, const Numbers& direct,
                    Difference& error) const {
    const Setting& s = x.s;
    const int64_t slot = item % s.heads * x.chunks.slots +
                         sequence_at(x.chunks, static_cast<int32_t>(item / s.heads)).first_slot;
    const int64_t length = x.heads[item].in.length;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t base = (tile * s.heads * x.chunks.slots + slot) * s.chunk;
      for (int64_t t = 0; t < length; ++t) {
        double sum = 0, terms = 0;
        for (int64_t j = tile * tile_columns; j < std::min(s.dqk, (tile + 1) * tile_columns); ++j) {
          const int64_t i = t * s.dqk + j;
          sum += a[i] * b[i];
          terms += squares(a[i] * b[i], a[i] * direct[i]);
        }
        error.add(dots[base + t], sum, terms);
      }
      for (int64_t t = length; t % s.chunk != 0; ++t)
        expect(dots[base + t] == 0, "dots beyond the end");
    }
  }

  const Kernels& kernels;
  const Problem& x;
  Use use;
  const char* name;
  Tensor out;
  SweepParams p;
  std::vector<float> end_c, end_n, product, dots;
  int64_t tile_columns = 1, tiles = 0;
};

/// Runs the four uses that the kernels cover and compares their results.
inline void run(const Kernels& kernels, const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  const Problem problem(s, seed);
  for (const Use use : {Use::kH, Use::kDv, Use::kDq, Use::kDk}) {
    const auto contraction = static_cast<int>(use == Use::kH || use == Use::kDv ? s.dqk : s.dv);
    if (!kernels.covers(use, contraction, s.dtype, s.device)) continue;
    try {
      Sweep(kernels, problem, use).run_and_compare();
    } catch (const Mismatch& error) {
      throw Mismatch(std::string(s.name) + ", use " + std::to_string(static_cast<int>(use)) + ": " +
                     error.what());
    }
  }
}

}  // namespace simt_test::sweep
