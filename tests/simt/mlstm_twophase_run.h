#pragma once
// Launches of the state and out kernels alone, and their comparison with the recurrence in float64.
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_launch.h"
#include "tests/simt/mlstm_sweep_problem.h"
#include "tests/simt/runtime.h"

namespace simt_test::twophase {

using namespace xlstm::cuda;  // NOLINT(google-build-using-namespace)
using sweep::Difference;
using sweep::Head;
using sweep::Numbers;
using sweep::Problem;
using sweep::Setting;
using sweep::Tensor;

/// Sum of the squares of the terms that scale q_t . n_t is made of, one per element of k in every token's share of n. The
/// terms are rounded one by one, so that their sum is exact to a part of the root of this and not of itself.
inline Numbers product_terms(const Head& head) {
  const auto& in = head.in;
  Numbers n(in.n0), sums;
  for (double& x : n) x *= x;
  double before = in.sigmoid_input_gate ? 0 : in.m0;
  for (int64_t t = 0; t < in.length; ++t) {
    if (in.reset[t]) n.assign(n.size(), 0), before = 0;
    const double i = in.sigmoid_input_gate ? sweep::log_sigmoid(in.igate[t]) : in.igate[t];
    const double forget = std::exp(sweep::log_sigmoid(in.fgate[t]) + before - head.m[t]);
    const double input = std::exp(i - head.m[t]);
    double sum = 0;
    for (int64_t d = 0; d < in.dqk; ++d) {
      const double k = input * in.k[t * in.dqk + d], q = in.scale * in.q[t * in.dqk + d];
      n[d] = forget * forget * n[d] + k * k;
      sum += q * q * n[d];
    }
    sums.push_back(sum);
    before = head.m[t];
  }
  return sums;
}

/// One call of every kernel: both directions of the states, all four uses.
class Run {
 public:
  explicit Run(const Problem& problem)
      : x(problem),
        s(x.s),
        h(s, s.dv, s.dtype),
        dq(s, s.dqk, s.dtype),
        dk(s, s.dqk, s.dtype),
        dv(s, s.dv, s.dtype),
        // Of float16 only the results are rounded to 11 bits.
        exact(s.dtype == Dtype::kBFloat16 ? 5e-3 : 2e-5),
        rounded(s.dtype == Dtype::kFloat16 ? 5e-4 : exact) {
    planes = s.dtype == Dtype::kBFloat16 ? 1 : 2;
    product.assign(s.batch * s.time * s.heads, NAN);
  }

  void run_and_compare() {
    for (const bool reverse : {false, true}) {
      if (s.segments > 1) compare_segment_sums(reverse);
      write_states(reverse);
      out(reverse ? Use::kDv : Use::kH, reverse ? dv : h);
      out(reverse ? Use::kDk : Use::kDq, reverse ? dk : dq);
    }
  }

 private:
  int64_t items() const { return static_cast<int64_t>(x.heads.size()); }
  int64_t c_size() const { return s.dqk * s.dv; }
  static int64_t padded(int64_t width) { return (width + 63) / 64 * 64; }
  int64_t first_slot(int64_t item) const {
    const auto sequence = static_cast<int32_t>(item / s.heads);
    return item % s.heads * x.chunks.slots + sequence_at(x.chunks, sequence).first_slot;
  }

  StateParams state_params(bool reverse) const {
    StateParams p;
    p.chunks = x.chunks;
    p.reverse = reverse;
    p.b = (reverse ? x.q : x.k).operand;
    p.x = (reverse ? x.g : x.v).operand;
    p.records = x.records.data();
    p.gamma = x.gamma.data();
    p.z = reverse ? x.z.data() : nullptr;
    p.dqk = static_cast<int32_t>(s.dqk), p.dv = static_cast<int32_t>(s.dv);
    return p;
  }

  /// What a segment adds to the state that enters it is the state that enters the next one, or the last.
  void compare_segment_sums(bool reverse) const {
    const int64_t count = items() * s.segments;
    std::vector<float> sum_c(count * c_size(), NAN), sum_n(count * s.dqk, NAN), decay(count, NAN);
    StateParams p = state_params(reverse);
    p.segment_c = sum_c.data(), p.segment_n = sum_n.data(), p.segment_gamma = decay.data();
    launch_state(p, s.device, nullptr);
    Difference c("segments"), n("segments, n");
    for (int64_t item = 0; item < items(); ++item) {
      const Head& head = x.heads[item];
      for (int64_t i = 0; i < s.segments; ++i) {
        const int64_t at = item * s.segments + i;
        const bool last = i == (reverse ? 0 : s.segments - 1);
        const auto check = [&](const std::vector<float>& sums, const std::vector<float>& starts,
                               const Numbers& ends, int64_t size, Difference& difference) {
          for (int64_t j = 0; j < size; ++j)
            difference.add(decay[at] * starts[at * size + j] + sums[at * size + j],
                           last ? ends[j] : starts[(reverse ? at - 1 : at + 1) * size + j]);
        };
        check(sum_c, reverse ? x.start_dc : x.start_c, reverse ? head.gradients.c0 : head.c_end,
              c_size(), c);
        check(sum_n, reverse ? x.start_dn : x.start_n, reverse ? head.gradients.n0 : head.n_end,
              s.dqk, n);
      }
    }
    c.check(exact);
    n.check(exact);
  }

  void write_states(bool reverse) {
    const int64_t slots = s.heads * x.chunks.slots;
    std::vector<float> end_c(items() * c_size(), NAN), end_n(items() * s.dqk, NAN);
    states.assign(slots * planes * padded(s.dqk) * padded(s.dv), 0xffff);
    state_n.assign(slots * padded(s.dqk), NAN);
    StateParams p = state_params(reverse);
    p.start_c = (reverse ? x.start_dc : x.start_c).data();
    p.start_n = (reverse ? x.start_dn : x.start_n).data();
    if (!s.states && s.segments == 1) p.start_c = p.start_n = nullptr;  // they are zero
    p.end_c = end_c.data(), p.end_n = end_n.data();
    p.states = states.data(), p.state_n = state_n.data();
    launch_state(p, s.device, nullptr);
    Difference c(reverse ? "dc0" : "c"), n(reverse ? "dn0" : "n");
    for (int64_t item = 0; item < items(); ++item) {
      const Head& head = x.heads[item];
      c.add(end_c, item * c_size(), reverse ? head.gradients.c0 : head.c_end);
      n.add(end_n, item * s.dqk, reverse ? head.gradients.n0 : head.n_end);
    }
    c.check(exact);
    n.check(exact);
    check_padding();
  }

  /// Padding of used slots is zero, unused slots are as they were.
  void check_padding() const {
    std::vector<bool> used(s.heads * x.chunks.slots, false);
    for (int64_t item = 0; item < items(); ++item)
      for (int64_t t = 0; t < x.heads[item].in.length; t += s.chunk)
        used[first_slot(item) + t / s.chunk] = true;
    const int64_t rows = padded(s.dqk), columns = padded(s.dv);
    for (int64_t i = 0; i < static_cast<int64_t>(states.size()); ++i) {
      const bool is_used = used[i / (columns * rows * planes)];
      if (!is_used) expect(states[i] == 0xffff, "state of an unused slot", i);
      if (is_used && (i % columns >= s.dv || i / columns % rows >= s.dqk))
        expect((states[i] & 0x7fff) == 0, "padding of a state", i);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(state_n.size()); ++i)
      if (used[i / rows] && i % rows >= s.dqk) expect(state_n[i] == 0, "padding of n", i);
  }

  void out(Use use, Tensor& result) {
    const Operand &q = x.q.operand, &k = x.k.operand, &v = x.v.operand, &g = x.g.operand;
    SweepParams p;
    p.chunks = x.chunks;
    p.a = use == Use::kH ? q : use == Use::kDv ? k : use == Use::kDq ? g : v;
    p.b = use == Use::kH ? k : use == Use::kDv ? q : use == Use::kDq ? v : g;
    p.x = use == Use::kH ? v : use == Use::kDv ? g : use == Use::kDq ? k : q;
    p.out = result.operand;
    p.scale = s.scale();
    p.records = x.records.data(), p.gamma = x.gamma.data();
    p.normalize = s.normalize, p.eps = 1e-6F;
    p.dqk = static_cast<int32_t>(s.dqk), p.dv = static_cast<int32_t>(s.dv);
    p.states = states.data(), p.state_n = state_n.data();
    if (use == Use::kH) p.product = product.data();
    const int64_t tile = out_tile_columns(s.dtype, s.device);
    tiles = (s.dqk + tile - 1) / tile;
    if (use == Use::kDq || use == Use::kDk) {
      p.z = x.z.data();
      p.dot = use == Use::kDq ? q : k;
      dots.assign(tiles * s.heads * x.chunks.slots * s.chunk, NAN);
      p.dots = dots.data();
    }
    launch_out(use, p, s.device, nullptr);
    compare(use, result);
  }

  void compare(Use use, const Tensor& result) const {
    const char* const names[] = {"h", "dv", "dq", "dk"};
    Difference value(names[static_cast<int>(use)]), other(use == Use::kH ? "product" : "dots");
    for (int64_t item = 0; item < items(); ++item) {
      const Head& head = x.heads[item];
      const auto &sum = head.gradients, &direct = head.direct;
      const Numbers got = result.rows(item / s.heads, item % s.heads);
      if (use == Use::kH) compare_forward(item, got, value, other);
      if (use == Use::kDv) value.add(got, 0, sum.v);
      if (use == Use::kDq) compare_sums(item, got, head.in.q, sum.q, direct.q, value, other);
      if (use == Use::kDk) compare_sums(item, got, head.in.k, sum.k, direct.k, value, other);
    }
    value.check(rounded);
    other.check(exact);
    expect(result.bytes_written() <= s.batch * s.time * s.heads * result.operand.width *
                                         (s.dtype == Dtype::kFloat32 ? 4 : 2),
           "stores outside the output");
  }

  /// h = a / N moves by h dN / N with N, whose error is relative to its terms.
  void compare_forward(int64_t item, const Numbers& got, Difference& h_error,
                       Difference& product_error) const {
    const Head& head = x.heads[item];
    const Numbers terms = product_terms(head);
    const int64_t row = s.packed.empty() ? item / s.heads * s.time : s.begin(item / s.heads);
    for (int64_t t = 0; t < head.in.length; ++t) {
      product_error.add(product[(row + t) * s.heads + item % s.heads], head.product[t], terms[t]);
      const bool active = s.normalize && std::fabs(head.product[t]) > head.floor_at(t);
      const double condition = active ? terms[t] / (head.norm[t] * head.norm[t]) : 0;
      for (int64_t i = t * s.dv; i < (t + 1) * s.dv; ++i)
        h_error.add(got[i], head.h[i], head.h[i] * head.h[i] * (1 + condition));
    }
  }

  /// dq and dk are the numerator's part and the normaliser's, which cancel where one token outweighs the others; a dot is
  /// the sum of such elements times those of q or k.
  void compare_sums(int64_t item, const Numbers& got, const Numbers& operand, const Numbers& sum,
                    const Numbers& direct, Difference& value, Difference& dot) const {
    const int64_t length = x.heads[item].in.length, base = first_slot(item) * s.chunk;
    const int64_t per_tile = s.heads * x.chunks.slots * s.chunk;
    for (int64_t t = 0; t == 0 || t % s.chunk != 0 || t < length; ++t) {
      if (length == 0) break;
      double total = 0, wanted = 0, squares_a = 0, squares_b = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) total += dots[tile * per_tile + base + t];
      if (t >= length) {
        expect(total == 0, "dots beyond the end", t);
        continue;
      }
      for (int64_t i = t * s.dqk; i < (t + 1) * s.dqk; ++i) {
        const double rest = sum[i] - direct[i], square = direct[i] * direct[i] + rest * rest;
        value.add(got[i], sum[i], square);
        wanted += operand[i] * sum[i];
        squares_a += operand[i] * operand[i];
        squares_b += std::max(square, sum[i] * sum[i]);
      }
      dot.add(total, wanted, squares_a * squares_b);
    }
  }

  const Problem& x;
  const Setting& s;
  Tensor h, dq, dk, dv;
  const double exact, rounded;  // tolerances
  int64_t planes = 1, tiles = 1;
  std::vector<uint16_t> states;
  std::vector<float> state_n, product, dots;
};

inline void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    const Problem problem(s, seed);
    Run(problem).run_and_compare();
  } catch (const Mismatch& error) {
    throw Mismatch(std::string(s.name) + ", T " + std::to_string(s.time) + ", type " +
                   std::to_string(static_cast<int>(s.dtype)) + ": " + error.what());
  }
}

}  // namespace simt_test::twophase
