// The recurrence of gated linear attention in its four uses, and the gradients of its decays, against the definition.
#include "cuda/gated/gated_recurrence.h"

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::GatedRecurrenceParams;
using xlstm::cuda::RecurrenceOrder;

struct Setting {
  int64_t batch = 1, time = 5, heads = 1, dk = 8, dv = 12;
  bool bonus = false, states = true, resets = false;
};

constexpr double kTolerance = 1e-5;

class Problem {
 public:
  Problem(const Setting& setting, uint64_t seed) : s(setting) {
    std::mt19937 random(static_cast<unsigned>(seed * 100 + s.dk + s.time));
    q.fill(random, 0, 1), k.fill(random, 0, 1), v.fill(random, 0, 1), dh.fill(random, 0, 1);
    start.fill(random, 0, 1), dstate.fill(random, 0, 1);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int64_t i = 0; i < keys(); ++i) {  // some rows forget all, some nothing
      const double u = uniform(random);
      a[i] = static_cast<float>(u < 0.05 ? 0 : u < 0.1 ? 1 : std::pow(u, 0.2));
    }
    for (int64_t i = 0; i < s.batch * s.time; ++i)
      reset[i] = s.resets && (i % 7 == 3 || i == s.time);
  }

  void run() {
    reference();
    recurrence(false, false), recurrence(true, false), recurrence(true, true),
        recurrence(false, true);
    decay_gradients();
    check("h", h, wanted_h), check("state", state, wanted_state);
    check("dq", dq, wanted_dq), check("dk", dk, wanted_dk), check("dv", dv, wanted_dv);
    check("dstate0", dstart, wanted_dstart);
    for (int64_t i = 0; i < keys(); ++i)
      expect(a[i] != 0 || dg[i] == 0, "the gradient of a decay to nothing", static_cast<long>(i));
    // dg is the difference of sums of q dq and k dk, and exact to their rounding.
    for (int64_t i = 0; i < keys(); ++i) {
      const double read = q[i] * wanted_dq[static_cast<size_t>(i)];
      dg[i] += static_cast<float>(read), wanted_dg[static_cast<size_t>(i)] += read;
    }
    check("dg + q dq", dg, wanted_dg);
  }

 private:
  int64_t keys() const { return s.batch * s.time * s.heads * s.dk; }
  int64_t values() const { return s.batch * s.time * s.heads * s.dv; }
  int64_t states() const { return s.batch * s.heads * s.dk * s.dv; }
  int64_t at(int64_t b, int64_t t, int64_t head, int64_t width) const {
    return ((b * s.time + t) * s.heads + head) * width;
  }

  /// to_keys: an output for every row of the state (dq, dk); else for every column (h, dv).
  void recurrence(bool to_keys, bool gradient) {
    GatedRecurrenceParams p;
    p.batch = static_cast<int32_t>(s.batch), p.time = static_cast<int32_t>(s.time);
    p.num_heads = static_cast<int32_t>(s.heads);
    p.across = static_cast<int32_t>(to_keys ? s.dv : s.dk);
    p.own = static_cast<int32_t>(to_keys ? s.dk : s.dv);
    p.order = s.bonus    ? RecurrenceOrder::kReadDecayWrite
              : gradient ? RecurrenceOrder::kWriteReadDecay
                         : RecurrenceOrder::kDecayWriteRead;
    p.backwards = gradient;
    GuardedFloats& row = gradient ? q : k;  // X gains row column^T
    GuardedFloats& column = gradient ? dh : v;
    p.write = to_keys ? column.data() : row.data();
    p.weight = to_keys ? row.data() : column.data();
    p.read = (to_keys ? gradient ? &v : &dh : gradient ? &k : &q)->data();
    p.decay = a.data(), p.decays_across = !to_keys;
    p.reset = s.resets ? reset.get() : nullptr;
    p.row = to_keys ? 1 : p.own, p.column = to_keys ? p.across : 1;
    if (s.states) p.start = gradient ? dstate.data() : start.data();
    p.out = (to_keys ? gradient ? &dk : &dq : gradient ? &dv : &h)->data();
    if (!to_keys) p.end = gradient ? dstart.data() : state.data();
    if (to_keys && !gradient && s.states) p.end_with = dstate.data(), p.end_sums = last.data();
    expect(xlstm::cuda::gated_recurrence_supported(p.across, p.own), "a size without kernels");
    gated_recurrence(p, nullptr);
  }

  void decay_gradients() {
    xlstm::cuda::GatedDecayGradientsParams p;
    p.batch = static_cast<int32_t>(s.batch), p.time = static_cast<int32_t>(s.time);
    p.num_heads = static_cast<int32_t>(s.heads), p.width = static_cast<int32_t>(s.dk);
    p.bonus = s.bonus;
    p.q = q.data(), p.k = k.data(), p.dq = dq.data(), p.dk = dk.data();
    p.decay = a.data(), p.reset = s.resets ? reset.get() : nullptr;
    p.last = s.states ? last.data() : nullptr;
    p.dg = dg.data();
    gated_decay_gradients(p, nullptr);
  }

  static void check(const char* name, GuardedFloats& got, const Numbers& wanted) {
    got.expect_guards_untouched(name);
    compare(name, got.slice(0, static_cast<int64_t>(wanted.size())), wanted, kTolerance);
  }

  void reference() {
    wanted_h.resize(values()), wanted_dv.resize(values());
    for (Numbers* x : {&wanted_dq, &wanted_dk, &wanted_dg}) x->resize(keys());
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t head = 0; head < s.heads; ++head) reference(b, head);
  }

  void reference(int64_t b, int64_t head) {
    const int64_t size = s.dk * s.dv, first = (b * s.heads + head) * size;
    std::vector<Numbers> before(s.time), after(s.time);  // S_{t-1} as token t finds it, S_t
    Numbers x(size);
    for (int64_t i = 0; i < size && s.states; ++i) x[i] = start[first + i];
    for (int64_t t = 0; t < s.time; ++t) {
      const int64_t row = at(b, t, head, s.dk), column = at(b, t, head, s.dv);
      if (reset[b * s.time + t]) x.assign(size, 0);
      before[t] = x;
      for (int64_t i = 0; i < s.dk; ++i)
        for (int64_t j = 0; j < s.dv; ++j)
          x[i * s.dv + j] = a[row + i] * x[i * s.dv + j] + double{k[row + i]} * v[column + j];
      after[t] = x;
      const Numbers& read = s.bonus ? before[t] : after[t];
      for (int64_t j = 0; j < s.dv; ++j)
        for (int64_t i = 0; i < s.dk; ++i) {
          wanted_h[column + j] += q[row + i] * read[i * s.dv + j];
          wanted_dq[row + i] += dh[column + j] * read[i * s.dv + j];
        }
    }
    wanted_state.insert(wanted_state.end(), x.begin(), x.end());
    Numbers gradient(size);
    for (int64_t i = 0; i < size && s.states; ++i) gradient[i] = dstate[first + i];
    for (int64_t t = s.time - 1; t >= 0; --t) step_back(b, head, t, before[t], gradient);
    wanted_dstart.insert(wanted_dstart.end(), gradient.begin(), gradient.end());
  }

  /// From the gradient of S_t, but for what token t reads of it, to that of S_{t-1}.
  void step_back(int64_t b, int64_t head, int64_t t, const Numbers& before, Numbers& gradient) {
    const int64_t row = at(b, t, head, s.dk), column = at(b, t, head, s.dv);
    for (int64_t i = 0; i < s.dk; ++i)
      for (int64_t j = 0; j < s.dv; ++j) {
        double& g = gradient[i * s.dv + j];
        const double own = double{q[row + i]} * dh[column + j];
        if (!s.bonus) g += own;
        wanted_dk[row + i] += g * v[column + j];
        wanted_dv[column + j] += g * k[row + i];
        g *= a[row + i];
        wanted_dg[row + i] += g * before[i * s.dv + j];
        if (s.bonus) g += own;
        if (reset[b * s.time + t]) g = 0;
      }
  }

  const Setting& s;
  GuardedFloats q{keys()}, k{keys()}, a{keys()}, dq{keys()}, dk{keys()}, dg{keys()};
  GuardedFloats v{values()}, dh{values()}, h{values()}, dv{values()};
  GuardedFloats start{states()}, state{states()}, dstate{states()}, dstart{states()};
  GuardedFloats last{s.batch * s.heads * s.dk};
  std::unique_ptr<bool[]> reset{new bool[static_cast<size_t>(s.batch * s.time)]};
  Numbers wanted_h, wanted_dv, wanted_dq, wanted_dk, wanted_dg, wanted_state, wanted_dstart;
};

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Problem(s, seed).run();
  } catch (const Mismatch& error) {
    throw Mismatch(std::string(error.what()) + ", T " + std::to_string(s.time) + " heads " +
                   std::to_string(s.dk) + " x " + std::to_string(s.dv) + " bonus " +
                   std::to_string(s.bonus) + " states " + std::to_string(s.states) + " resets " +
                   std::to_string(s.resets));
  }
}

void few(uint64_t seed) {
  for (const bool bonus : {false, true})
    run({.batch = 2, .time = 20, .heads = 2, .dk = 36, .dv = 12, .bonus = bonus, .resets = true},
        seed);
}

/// Every number of lanes, with a column more than fits a block.
void widths(uint64_t seed) {
  for (const bool bonus : {false, true}) {
    run({.time = 3, .dk = 4, .dv = 132, .bonus = bonus}, seed);
    run({.time = 35, .dk = 64, .dv = 68, .bonus = bonus, .states = false, .resets = true}, seed);
    run({.time = 18, .dk = 128, .dv = 256, .bonus = bonus, .resets = true}, seed);
    run({.time = 5, .dk = 100, .dv = 516, .bonus = bonus}, seed);
  }
  run({.time = 3, .dk = 1024, .dv = 8}, seed);
}

void lengths(uint64_t seed) {
  for (const int64_t time : {1, 15, 16, 17, 33})
    for (const bool states : {false, true})
      run({.batch = 3,
           .time = time,
           .heads = 2,
           .dk = 16,
           .dv = 8,
           .states = states,
           .resets = true},
          seed);
}

void refused(uint64_t) {
  using xlstm::cuda::gated_recurrence_supported;
  expect(!gated_recurrence_supported(6, 8), "6 rows");
  expect(!gated_recurrence_supported(8, 6), "6 columns");
  expect(!gated_recurrence_supported(1028, 8), "1028 rows");
  expect(!gated_recurrence_supported(8, 1028), "1028 columns");
}

}  // namespace

List<Case> gated_recurrence_cases() {
  static const Case cases[] = {
      {"gated_recurrence: few sizes", few},
      {"gated_recurrence: lengths", lengths},
      {"gated_recurrence: widths", widths},
      {"gated_recurrence: what is refused", refused},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
