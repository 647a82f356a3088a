// The gates kernel: records, gammas and m against their definitions, every sum and product written out.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_launch.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::GateRecord;
using xlstm::cuda::GatesParams;

struct Setting {
  Cut cut;
  Dtype igate = Dtype::kFloat32, fgate = Dtype::kFloat32;
  bool sigmoid = false, start = true;
  Order order = Order::kDense;
  std::vector<int64_t> resets = {};
  double input = -1, forget = 3, spread = 1;
};

constexpr double kTolerance = 2e-5;
constexpr float kScale = 0.3F;

/// Also where both are NaN. Results below float32's normal numbers may be zero.
void expect_close(double got, double wanted, const char* what, int64_t at) {
  const bool close = std::isnan(wanted)
                         ? std::isnan(got)
                         : std::fabs(got - wanted) <= kTolerance * std::fabs(wanted) + 2e-38;
  if (!close)
    throw Mismatch(std::string("wrong values: ") + what + " at " + std::to_string(at) + ": " +
                   std::to_string(got) + " instead of " + std::to_string(wanted));
}

/// The recurrence of one head of one sequence.
struct Recurrence {
  Numbers forget, input;  ///< logarithms
  Numbers m;              ///< m[t]: before token t; the last one is the result
  std::vector<bool> reset;
  bool sigmoid_gate;

  Recurrence(const Setting& s, const Resets& resets, const StridedTensor& igate,
             const StridedTensor& fgate, double m0, int64_t sequence, int64_t head)
      : sigmoid_gate(s.sigmoid) {
    m.push_back(sigmoid_gate ? 0 : m0);
    for (int64_t t = 0; t < s.cut.tokens(sequence); ++t) {
      const int64_t b = s.cut.row(sequence), token = s.cut.begin(sequence) + t;
      const double i = igate.get(b, token, head), f = fgate.get(b, token, head);
      forget.push_back(clamped(log_sigmoid(f), -1e8));
      input.push_back(clamped(sigmoid_gate ? log_sigmoid(i) : i, -1e30));
      reset.push_back(resets(sequence, t));
      const double decayed = forget[t] + (reset[t] ? 0 : m[t]);
      const bool nan = std::isnan(decayed) || std::isnan(input[t]);
      m.push_back(sigmoid_gate ? 0 : nan ? NAN : std::max(decayed, input[t]));
    }
  }
  static double clamped(double x, double low) { return x < low ? low : x; }

  /// Logarithm of the decay by tokens (s, t], of which `first` is the first that the state of t has seen in its chunk. A
  /// NaN among those makes all of it NaN.
  double decay(int64_t first, int64_t s, int64_t t) const {
    double sum = 0;
    for (int64_t i = first; i <= t; ++i)
      if (i > s || std::isnan(forget[i])) sum += forget[i];
    return sum;
  }
  /// The first token of [begin, t] whose state reaches t.
  int64_t start(int64_t begin, int64_t t) const {
    while (t > begin && !reset[t]) --t;
    return t;
  }
  bool reset_in(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t)
      if (reset[t]) return true;
    return false;
  }
};

double exponent(const GateRecord& from, const GateRecord& to) {
  return (static_cast<double>(from.alpha) - to.peak) +
         (static_cast<double>(from.alpha_rest) - to.peak_rest);
}

void check_chunk(const Recurrence& r, int64_t begin, int64_t end, const GateRecord* records,
                 float gamma) {
  const double m_before = r.m[begin], m_end = r.m[end];
  expect_close(
      gamma,
      r.reset_in(begin, end) ? 0 : std::exp(r.decay(begin, begin - 1, end - 1) + m_before - m_end),
      "gamma", begin);
  for (int64_t t = begin; t < end; ++t) {
    const GateRecord& record = records[t - begin];
    const double m = r.m[t + 1];
    const int64_t start = r.start(begin, t);
    expect(record.start == start - begin, "start", t);
    for (int64_t s = start; s <= t; ++s)
      expect_close(std::exp2(exponent(records[s - begin], record)),
                   std::exp(r.decay(start, s, t) + r.input[s] - m), "weight of a token", t);
    expect_close(record.w,
                 r.reset_in(begin, t + 1)
                     ? 0
                     : kScale * std::exp(r.decay(begin, begin - 1, t) + m_before - m),
                 "w", t);
    const int64_t last = r.start(begin, end - 1);
    expect_close(record.u, t < last ? 0 : std::exp(r.decay(last, t, end - 1) + r.input[t] - m_end),
                 "u", t);
    expect_close(record.floor,
                 r.sigmoid_gate  ? 1
                 : std::isnan(m) ? NAN
                                 : std::exp(std::clamp(-m, -87.0, 80.0)),
                 "floor", t);
  }
}

void check_beyond(const GateRecord& r, int64_t length) {
  expect(r.w == 0 && r.u == 0 && r.alpha == -1e38F && r.alpha_rest == 0 && r.peak == 0 &&
             r.peak_rest == 0 && r.start == length && std::isfinite(r.floor),
         "beyond the end");
}

/// One launch, and its results against the definitions.
class Gates {
 public:
  Gates(const Setting& setting, uint64_t seed)
      : s(setting),
        igate(s.cut.batch, s.cut.time, s.cut.heads, 1, s.igate, s.order),
        fgate(s.cut.batch, s.cut.time, s.cut.heads, 1, s.fgate, s.order),
        m0(s.cut.sequences() * s.cut.heads),
        m(s.cut.sequences() * s.cut.heads),
        gamma(s.cut.heads * s.cut.slots()),
        resets(s.cut, s.resets) {
    std::mt19937 random(static_cast<unsigned>(100 * seed + s.cut.time));
    igate.fill(random, s.input, s.spread);
    fgate.fill(random, s.forget, s.spread);
    m0.fill(random, 0, 3);
    // One record on either side must stay as it is.
    GateRecord untouched{};
    untouched.start = -7;
    records.assign(static_cast<size_t>(s.cut.positions() + 2), untouched);
    ends.resize(static_cast<size_t>(s.cut.heads * s.cut.slots()));
  }

  void launch() {
    GatesParams p;
    p.chunks = s.cut.chunks();
    p.igate = igate.view, p.fgate = fgate.view;
    p.igate_dtype = s.igate, p.fgate_dtype = s.fgate;
    p.sigmoid_input_gate = s.sigmoid;
    p.scale = kScale;
    if (s.start) p.m0 = m0.data();
    if (!s.resets.empty()) resets.give_to(p);
    p.ends = ends.data(), p.records = records.data() + 1, p.gamma = gamma.data(), p.m = m.data();
    launch_gates(p, nullptr);
  }

  void check() {
    const Cut& cut = s.cut;
    for (int64_t sequence = 0; sequence < cut.sequences(); ++sequence) {
      for (int64_t head = 0; head < cut.heads; ++head) check_head(sequence, head);
    }
    expect(records.front().start == -7 && records.back().start == -7, "written outside of records");
    gamma.expect_guards_untouched("gamma"), m.expect_guards_untouched("m");
  }

  const Setting& s;
  StridedTensor igate, fgate;
  GuardedFloats m0, m, gamma;
  Resets resets;
  std::vector<GateRecord> records;
  std::vector<xlstm::cuda::GateRun> ends;

 private:
  void check_head(int64_t sequence, int64_t head) {
    const Cut& cut = s.cut;
    const int64_t item = sequence * cut.heads + head, tokens = cut.tokens(sequence);
    const Recurrence r(s, resets, igate, fgate, s.start ? m0[item] : 0.0, sequence, head);
    for (int64_t begin = 0; begin < tokens; begin += cut.length) {
      const int64_t end = std::min(begin + cut.length, tokens);
      const int64_t position = cut.position(sequence, head, begin);
      check_chunk(r, begin, end, &records[static_cast<size_t>(1 + position)],
                  gamma[position / cut.length]);
      for (int64_t t = end; t < begin + cut.length; ++t)
        check_beyond(records[static_cast<size_t>(1 + position + t - begin)], cut.length);
    }
    const double wanted = r.m.back();
    expect(std::isnan(wanted) ? std::isnan(m[item])
                              : std::fabs(m[item] - wanted) <= 1e-6 * (1 + std::fabs(wanted)),
           "m", item);
  }
};

std::string describe(const Setting& s) {
  return ", gates T " + std::to_string(s.cut.time) + " L " + std::to_string(s.cut.length) +
         " sigmoid " + std::to_string(s.sigmoid) + " resets " + std::to_string(s.resets.size()) +
         " packed " + std::to_string(s.cut.packed.size()) + " input " + std::to_string(s.input) +
         " forget " + std::to_string(s.forget);
}

void run(Setting s, uint64_t seed) {
  simt::launch_seed = seed;
  for (const bool sigmoid : {false, true}) {
    s.sigmoid = sigmoid;
    try {
      Gates gates(s, seed);
      gates.launch();
      gates.check();
      gates.igate.expect_gaps_untouched("igate");
    } catch (const Mismatch& error) {
      throw Mismatch(error.what() + describe(s));
    }
  }
}

/// First and last tokens of chunks and warps, their neighbours, and runs of resets.
const std::vector<int64_t> kResets = {0,  5,  6,  7,   31,  32,  63,  64,  65,
                                      66, 96, 97, 127, 128, 191, 192, 193, 199};

void lengths(uint64_t seed) {
  for (const int64_t time : {1, 17, 63, 64, 65, 127, 200}) {
    for (const int64_t length : {64, 128, 256}) {
      const Cut cut{.batch = 2, .time = time, .heads = 2, .length = length};
      run({.cut = cut}, seed);
      run({.cut = cut, .start = false, .resets = kResets}, seed);
    }
  }
  run({.cut = {.time = 1100, .heads = 1}}, seed);  // more chunks than warps
  run({.cut = {.time = 2100, .heads = 1, .length = 256}, .resets = {70, 1023, 1500}}, seed);
  run({.cut = {.time = 2600, .heads = 1}, .resets = {0, 70, 2590}},
      seed);  // more chunks than lanes
}

void packed(uint64_t seed) {
  for (const int64_t length : {64, 128}) {
    const auto cut = [&](std::vector<int32_t> sequences) {
      return Cut{
          .time = sequences.back(), .heads = 2, .length = length, .packed = std::move(sequences)};
    };
    run({.cut = cut({0, 0, 1, 64, 65, 65, 130, 200, 200})}, seed);
    run({.cut = cut({0, 100, 228, 229})}, seed);
    run({.cut = cut({0, 3, 6, 150}), .resets = kResets}, seed);
    run({.cut = cut({0, 700}), .start = false}, seed);
  }
}

void dtypes_and_strides(uint64_t seed) {
  const Cut cut{.batch = 2, .time = 70, .heads = 3};
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    run({.cut = cut, .igate = dtype, .order = Order::kUnaligned}, seed);
    run({.cut = cut, .fgate = dtype, .order = Order::kInner}, seed);
    run({.cut = cut, .igate = dtype, .fgate = dtype, .order = Order::kAligned}, seed);
  }
}

void extremes(uint64_t seed) {
  struct Shape {
    double input, forget, spread;
  };
  for (const Shape& g :
       {Shape{-1, 80, 1}, Shape{0, -80, 20}, Shape{200, 0, 100}, Shape{1000, -3, 100},
        Shape{-1000, 3, 300}, Shape{-300, -300, 100}, Shape{0, -10000, 3000}, Shape{0, 0, 40}}) {
    const Cut cut{.time = 200, .heads = 2, .length = 128};
    run({.cut = cut, .input = g.input, .forget = g.forget, .spread = g.spread}, seed);
    run({.cut = cut, .resets = kResets, .input = g.input, .forget = g.forget, .spread = g.spread},
        seed);
  }
}

/// NaN goes where the recurrence takes it and no further than the next reset; infinite gates are closed or open ones.
void special_values(uint64_t seed) {
  simt::launch_seed = seed;
  for (const double value : std::initializer_list<double>{NAN, -INFINITY, -1e20}) {
    for (const bool forget : {false, true}) {
      for (const bool sigmoid : {false, true}) {
        for (const bool resets : {false, true}) {
          Setting s{.cut = {.time = 250, .heads = 2}, .sigmoid = sigmoid};
          if (resets) s.resets = {80, 180};
          Gates gates(s, seed);
          (forget ? gates.fgate : gates.igate).set(0, 70, 1, 0, value);
          (forget ? gates.fgate : gates.igate).set(0, 190, 0, 0, value);
          gates.launch();
          gates.check();
        }
      }
    }
  }
  const Setting s{.cut = {.time = 3, .heads = 1, .packed = {0, 0, 3}}};
  Gates gates(s, seed);
  gates.m0[0] = gates.m0[1] = -INFINITY;  // an empty state may say so
  gates.launch();
  gates.m0[0] = gates.m0[1] = -1e30F;
  gates.check();
}

}  // namespace

List<Case> mlstm_gates_cases() {
  static const Case cases[] = {
      {"mlstm gates: lengths", lengths},
      {"mlstm gates: packed", packed},
      {"mlstm gates: dtypes and strides", dtypes_and_strides},
      {"mlstm gates: extremes", extremes},
      {"mlstm gates: NaN and infinite", special_values},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
