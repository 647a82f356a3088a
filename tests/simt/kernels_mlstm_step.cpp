// The decoding step, token after token, against the recurrence in float64.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm.h"
#include "tests/reference/mlstm_reference.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::MlstmProblem;
using xlstm::cuda::MlstmRing;
using xlstm::cuda::MlstmStep;
using xlstm::reference::MlstmInput;

constexpr float kEps = 1e-6F;

struct Setting {
  int64_t batch = 1, heads = 1, dqk = 16, dv = 16, tokens = 20;
  Dtype dtype = Dtype::kFloat32, gate_dtype = Dtype::kFloat32;
  bool sigmoid = false, normalize = true, states = true;
  bool lazy = false;  ///< steps that leave the state behind, and a fold at the end
  int32_t ring = MlstmRing::kMaxTokens;
  Order order = Order::kDense;
  int64_t shift = 0;  ///< floats by which C misses alignment
  double input = -1, forget = 3, spread = 1;

  int64_t items() const { return batch * heads; }
  float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(dqk))); }
};

/// The tokens of a batch, (B,tokens,NH,D), and the states that the steps update.
struct Decoding {
  Decoding(const Setting& setting, uint64_t seed)
      : s(setting),
        q(s.batch, s.tokens, s.heads, s.dqk, s.dtype, s.order),
        k(s.batch, s.tokens, s.heads, s.dqk, s.dtype, s.order),
        v(s.batch, s.tokens, s.heads, s.dv, s.dtype, s.order),
        h(s.batch, s.tokens, s.heads, s.dv, s.dtype, s.order),
        igate(s.batch, s.tokens, s.heads, 1, s.gate_dtype, s.order),
        fgate(s.batch, s.tokens, s.heads, 1, s.gate_dtype, s.order),
        c(s.items() * s.dqk * s.dv, s.shift),
        n(s.items() * s.dqk),
        m(s.items()),
        keys(s.items(), s.ring, 1, s.dqk, s.dtype),
        values(s.items(), s.ring, 1, s.dv, s.dtype),
        gates(s.items() * s.ring * 2),
        count(static_cast<size_t>(s.items())) {
    std::mt19937 random(static_cast<unsigned>(100 * seed + s.dqk + s.dv));
    for (StridedTensor* x : {&q, &k, &v}) x->fill(random, 0, 1);
    igate.fill(random, s.input, s.spread);
    fgate.fill(random, s.forget, s.spread);
    const double spread = s.states ? 0.5 : 0;
    c.fill(random, 0, spread), n.fill(random, 0, spread), m.fill(random, 0, 2 * spread);
    for (int64_t item = 0; item < s.items(); ++item) references.push_back(reference_input(item));
  }

  MlstmInput reference_input(int64_t item) {
    const int64_t b = item / s.heads, head = item % s.heads;
    MlstmInput in;
    in.length = s.tokens, in.dqk = s.dqk, in.dv = s.dv;
    in.q = q.rows(b, 0, s.tokens, head), in.k = k.rows(b, 0, s.tokens, head);
    in.v = v.rows(b, 0, s.tokens, head);
    in.igate = igate.rows(b, 0, s.tokens, head), in.fgate = fgate.rows(b, 0, s.tokens, head);
    in.c0 = c.slice(item * s.dqk * s.dv, s.dqk * s.dv), in.n0 = n.slice(item * s.dqk, s.dqk);
    in.m0 = m[item];
    in.sigmoid_input_gate = s.sigmoid, in.normalize = s.normalize;
    in.scale = s.scale(), in.eps = kEps;
    return in;
  }

  MlstmProblem problem() const {
    MlstmProblem problem;
    problem.batch = problem.num_sequences = s.batch, problem.time = 1, problem.num_heads = s.heads;
    problem.dqk = s.dqk, problem.dv = s.dv;
    problem.dtype = s.dtype, problem.igate_dtype = problem.fgate_dtype = s.gate_dtype;
    problem.sigmoid_input_gate = s.sigmoid, problem.normalize = s.normalize;
    problem.scale = s.scale(), problem.eps = kEps;
    return problem;
  }
  MlstmRing ring() {
    MlstmRing ring;
    ring.tokens = s.ring;
    ring.keys = keys.view.data, ring.values = values.view.data;
    ring.gates = gates.data(), ring.count = count.data();
    return ring;
  }

  void step(int64_t token) {
    MlstmStep call;
    call.q = at(q, token), call.k = at(k, token), call.v = at(v, token), call.h = at(h, token);
    call.igate = at(igate, token), call.fgate = at(fgate, token);
    call.c = c.data(), call.n = n.data(), call.m = m.data();
    if (s.lazy) {
      mlstm_step_lazy(problem(), call, ring(), nullptr);
      for (const int32_t tokens : count)
        expect(tokens == (token + 1) % s.ring, "tokens in the ring", token);
    } else {
      mlstm_step(problem(), call, nullptr);
    }
  }
  /// Brings the state up to date; again, which changes nothing.
  void finish() {
    MlstmStep call;
    call.c = c.data(), call.n = n.data(), call.m = m.data();
    for (int i = 0; s.lazy && i < 2; ++i) mlstm_fold(problem(), call, ring(), nullptr);
  }
  static xlstm::cuda::View at(const StridedTensor& x, int64_t token) {
    xlstm::cuda::View view = x.view;
    view.data = x.token(token);
    view.time = 0;
    return view;
  }

  const Setting& s;
  StridedTensor q, k, v, h, igate, fgate;
  GuardedFloats c, n, m;
  StridedTensor keys, values;
  GuardedFloats gates;
  std::vector<int32_t> count;
  std::vector<MlstmInput> references;
};

double tolerance(Dtype dtype) {  // of h: float32 until it is rounded
  return dtype == Dtype::kBFloat16 ? 5e-3 : dtype == Dtype::kFloat16 ? 5e-4 : 2e-5;
}

void append(Numbers& to, const Numbers& from) { to.insert(to.end(), from.begin(), from.end()); }

/// States count in units of e^m; the kernel's m is rounded to float32, and its states with it.
void check(Decoding& x) {
  const Setting& s = x.s;
  Numbers h, h_wanted, c, c_wanted, n, n_wanted, m, m_wanted;
  for (int64_t item = 0; item < s.items(); ++item) {
    const auto wanted = mlstm_forward(x.references[static_cast<size_t>(item)]);
    append(h, x.h.rows(item / s.heads, 0, s.tokens, item % s.heads));
    append(h_wanted, wanted.h);
    append(c, x.c.slice(item * s.dqk * s.dv, s.dqk * s.dv));
    append(n, x.n.slice(item * s.dqk, s.dqk));
    const double unit = std::exp(wanted.m - x.m[item]);
    for (const double value : wanted.c) c_wanted.push_back(unit * value);
    for (const double value : wanted.n) n_wanted.push_back(unit * value);
    m.push_back(x.m[item]), m_wanted.push_back(wanted.m);
  }
  compare_each("m", m, m_wanted, 1e-6 * static_cast<double>(s.tokens));
  compare("h", h, h_wanted, tolerance(s.dtype));
  compare("c", c, c_wanted, 2e-5);
  compare("n", n, n_wanted, 2e-5);
  for (const StridedTensor* tensor :
       {&x.q, &x.k, &x.v, &x.h, &x.igate, &x.fgate, &x.keys, &x.values})
    tensor->expect_gaps_untouched("a strided tensor");
  for (const GuardedFloats* floats : {&x.c, &x.n, &x.m, &x.gates})
    floats->expect_guards_untouched("a state");
}

bool thread_build() { return simt::build_kind() == simt::Build::kThread; }
bool plain() { return simt::build_kind() == simt::Build::kPlain; }

void run_one(Setting s, uint64_t seed) {
  simt::launch_seed = seed;
  if (thread_build()) s.tokens = std::min<int64_t>(s.tokens, 3);
  try {
    Decoding x(s, seed);
    for (int64_t token = 0; token < s.tokens; ++token) x.step(token);
    x.finish();
    check(x);
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + std::string(s.lazy ? ", lazy" : "") + std::string(" step B ") +
                   std::to_string(s.batch) + " NH " + std::to_string(s.heads) + " DQK " +
                   std::to_string(s.dqk) + " DV " + std::to_string(s.dv) + " dtype " +
                   std::to_string(static_cast<int>(s.dtype)) + " sigmoid " +
                   std::to_string(s.sigmoid) + " normalize " + std::to_string(s.normalize) +
                   " order " + std::to_string(static_cast<int>(s.order)) + " forget " +
                   std::to_string(s.forget));
  }
}

void run(Setting s, uint64_t seed) {
  run_one(s, seed);
  if (thread_build()) return;  // ring_lengths has all barriers of the lazy step
  s.lazy = true;
  run_one(s, seed);
}

/// Up to the largest heads of the paper; one tile of C and several, whole and ragged.
void sizes(uint64_t seed) {
  run({.batch = 2, .heads = 3, .dqk = 16, .dv = 16, .tokens = 40}, seed);
  run({.batch = 2, .heads = 2, .dqk = 24, .dv = 40}, seed);
  run({.heads = 2, .dqk = 33, .dv = 70}, seed);
  run({.heads = 2, .dqk = 1, .dv = 1}, seed);
  run({.heads = 2, .dqk = 64, .dv = 128}, seed);
  run({.dqk = 600, .dv = 33, .tokens = 5}, seed);
  if (thread_build()) return;  // slow there, and no other barriers
  run({.dqk = 256, .dv = 512, .tokens = plain() ? 20 : 2}, seed);
  run({.dqk = 1280, .dv = 1280, .tokens = plain() ? 3 : 1}, seed);
}

/// Blocks that do a whole head, and wide tiles of few columns left over.
void many_heads(uint64_t seed) {
  const int64_t tokens = plain() ? 4 : 1;
  run({.batch = 16, .heads = 16, .dqk = 24, .dv = 136, .tokens = tokens}, seed);
  if (thread_build()) return;
  run({.batch = 64, .heads = 4, .dqk = 16, .dv = 16, .tokens = tokens}, seed);
  run({.batch = 32, .heads = 8, .dqk = 16, .dv = 67, .tokens = tokens}, seed);
  run({.batch = 32, .heads = 2, .dqk = 16, .dv = 320, .tokens = tokens}, seed);
}

/// A head's numbers do not depend on how many heads there are, to the last bit.
void batches_agree(uint64_t seed) {
  if (thread_build()) return;  // slow there, and no other barriers
  simt::launch_seed = seed;
  const Setting few{.heads = 1, .dqk = 80, .dv = 136, .tokens = 3, .lazy = true, .ring = 2};
  Setting many = few;
  many.batch = 100;
  Decoding x(few, seed), y(many, seed);
  const int64_t b = 57;  // of the batch
  for (const auto& [from, to] : {std::pair{&y.q, &x.q},
                                 {&y.k, &x.k},
                                 {&y.v, &x.v},
                                 {&y.igate, &x.igate},
                                 {&y.fgate, &x.fgate}}) {
    const int64_t width = to == &x.v ? few.dv : to == &x.q || to == &x.k ? few.dqk : 1;
    const Numbers numbers = from->rows(b, 0, few.tokens, 0);
    for (int64_t i = 0; i < few.tokens * width; ++i)
      to->set(0, i / width, 0, i % width, numbers[static_cast<size_t>(i)]);
  }
  std::copy_n(y.c.data() + b * few.dqk * few.dv, few.dqk * few.dv, x.c.data());
  std::copy_n(y.n.data() + b * few.dqk, few.dqk, x.n.data());
  std::copy_n(y.m.data() + b, 1, x.m.data());
  for (int64_t token = 0; token < few.tokens; ++token) x.step(token), y.step(token);
  x.finish(), y.finish();
  expect(x.h.rows(0, 0, few.tokens, 0) == y.h.rows(b, 0, few.tokens, 0), "h of a batch", b);
  const int64_t size = few.dqk * few.dv;
  expect(x.c.slice(0, size) == y.c.slice(b * size, size), "C of a batch", b);
  expect(x.n.slice(0, few.dqk) == y.n.slice(b * few.dqk, few.dqk), "n of a batch", b);
}

/// Rows of more than one piece of a warp and of more than are in shared memory, in all types, with a fold.
void long_rows(uint64_t seed) {
  if (thread_build()) return;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const int64_t dqk : {384, 520, 525})
      run({.heads = 2, .dqk = dqk, .dv = 36, .tokens = 3, .dtype = dtype, .ring = 2}, seed);
  }
}

/// Folds when the ring is full and at every other length; shorter rings.
void ring_lengths(uint64_t seed) {
  run_one({.heads = 1, .dqk = 33, .dv = 70, .tokens = 2, .lazy = true}, seed);
  for (const bool sigmoid : {false, true}) {
    for (int64_t tokens = 1; tokens <= (plain() ? 50 : 2); tokens += tokens < 18 ? 1 : 7) {
      run_one({.heads = 2, .dqk = 24, .dv = 20, .tokens = tokens, .sigmoid = sigmoid, .lazy = true},
              seed);
    }
    for (const int32_t ring : {1, 2, 5, 11})
      run_one({.heads = 2,
               .dqk = 24,
               .dv = 20,
               .tokens = plain() ? 13 : 2,
               .sigmoid = sigmoid,
               .lazy = true,
               .ring = ring},
              seed);
  }
}

void gates(uint64_t seed) {
  for (const bool sigmoid : {false, true}) {
    for (const bool normalize : {true, false}) {
      for (const bool states : {true, false}) {
        run({.heads = 2, .dv = 40, .sigmoid = sigmoid, .normalize = normalize, .states = states},
            seed);
      }
    }
  }
}

void dtypes_and_strides(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const Order order : {Order::kDense, Order::kAligned, Order::kUnaligned, Order::kInner}) {
      run({.batch = 2,
           .heads = 2,
           .dqk = 24,
           .dv = 40,
           .dtype = dtype,
           .gate_dtype = order == Order::kDense ? dtype : Dtype::kFloat32,
           .order = order},
          seed);
    }
  }
  run({.batch = 2, .heads = 2, .dqk = 24, .dv = 40, .gate_dtype = Dtype::kBFloat16, .shift = 1},
      seed);
}

void extremes(uint64_t seed) {
  struct Gates {
    double input, forget, spread;
  };
  for (const Gates& g : {Gates{-1, 80, 1}, Gates{0, -80, 20}, Gates{200, 0, 100}, Gates{1000, 3, 5},
                         Gates{-300, -300, 100}, Gates{0, -10000, 3000}}) {
    for (const bool sigmoid : {false, true}) {
      run({.heads = 2,
           .sigmoid = sigmoid,
           .input = g.input,
           .forget = g.forget,
           .spread = g.spread},
          seed);
    }
  }
}

/// A NaN gate makes NaN of all that its head computes and nothing of what others do; an empty state has m = -inf.
void special_values(uint64_t seed) {
  simt::launch_seed = seed;
  for (const bool sigmoid : {false, true}) {
    for (const bool forget : {false, true}) {
      const Setting s{.batch = 2, .heads = 2, .dv = 70, .tokens = 1, .sigmoid = sigmoid};
      Decoding x(s, seed), same(s, seed);
      (forget ? x.fgate : x.igate).set(1, 0, 0, 0, NAN);
      x.step(0), same.step(0);
      for (int64_t item = 0; item < s.items(); ++item) {
        const bool bad = item == 2;
        const auto numbers = [&](Decoding& d) {
          Numbers all = d.h.rows(item / 2, 0, 1, item % 2);
          append(all, d.c.slice(item * s.dqk * s.dv, s.dqk * s.dv));
          append(all, d.n.slice(item * s.dqk, s.dqk));
          if (!sigmoid) all.push_back(d.m[item]);
          return all;
        };
        const Numbers got = numbers(x), clean = numbers(same);
        for (size_t i = 0; i < got.size(); ++i)
          expect(bad ? std::isnan(got[i]) : got[i] == clean[i], "NaN gate", static_cast<long>(i));
      }
    }
  }
  Setting s{.dv = 40, .states = false};
  Decoding x(s, seed);
  x.references[0].m0 = -1e30;
  x.m[0] = -INFINITY;
  for (int64_t token = 0; token < s.tokens; ++token) x.step(token);
  check(x);
}

}  // namespace

List<Case> mlstm_step_cases() {
  static const Case cases[] = {
      {"mlstm step: sizes", sizes},
      {"mlstm step: many heads", many_heads},
      {"mlstm step: one head and many", batches_agree},
      {"mlstm step: long rows", long_rows},
      {"mlstm step: ring", ring_lengths},
      {"mlstm step: gates", gates},
      {"mlstm step: dtypes and strides", dtypes_and_strides},
      {"mlstm step: extreme gates", extremes},
      {"mlstm step: NaN and empty", special_values},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
