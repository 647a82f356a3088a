// The small kernels around the backward pass, each against plain loops: prep, segment scan, gate gradients.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_launch.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::GateGradientParams;
using xlstm::cuda::GateRecord;
using xlstm::cuda::PrepParams;
using xlstm::cuda::SegmentScanParams;

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

// prep ------------------------------------------------------------------------------------------------------------------

struct PrepSetting {
  Cut cut;
  int64_t width = 16;
  Dtype dtype = Dtype::kFloat32;
  Order order = Order::kDense;
  bool normalize = true;
  bool expanded = false;               ///< dh is one number, all strides 0
  double nan_product = 0, nan_dh = 0;  ///< NaN: token 1 of head 0 has one there
};

class Prep {
 public:
  Prep(const PrepSetting& setting, uint64_t seed)
      : s(setting),
        g_dtype(s.dtype == Dtype::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32),
        h(s.cut.batch, s.cut.time, s.cut.heads, s.width, s.dtype, s.order),
        dh(s.cut.batch, s.cut.time, s.cut.heads, s.width, s.dtype, s.order),
        g(s.cut.batch, s.cut.time, s.cut.heads, s.width, g_dtype),
        product(s.cut.batch, s.cut.time, s.cut.heads, 1, Dtype::kFloat32),
        z(s.cut.positions()),
        records(static_cast<size_t>(s.cut.positions())) {
    std::mt19937 random(static_cast<unsigned>(100 * seed + s.width));
    h.fill(random, 0, 1), dh.fill(random, 0.5, 1), product.fill(random, 0, 2);
    std::uniform_real_distribution<float> floor(0, 3);
    for (GateRecord& r : records) r.floor = floor(random);
    product.set(0, 1, 0, 0, s.nan_product);
    if (std::isnan(s.nan_dh)) dh.set(0, 1, 0, s.width - 1, NAN);
  }

  void launch() {
    PrepParams p;
    p.chunks = s.cut.chunks();
    p.h = h.operand(), p.dh = dh.operand(), p.g = g.operand();
    if (s.expanded) p.dh.batch = p.dh.time = p.dh.head = p.dh.inner = 0, p.dh.vector = false;
    p.records = records.data();
    p.product = static_cast<const float*>(product.view.data);
    p.normalize = s.normalize, p.eps = 0.125F;
    p.z = z.data();
    launch_prep(p, nullptr);
  }

  void check() {
    for (int64_t sequence = 0; sequence < s.cut.sequences(); ++sequence) {
      for (int64_t head = 0; head < s.cut.heads; ++head) {
        for (int64_t t = 0; t < s.cut.tokens(sequence); ++t) check_token(sequence, head, t);
        for (int64_t t = s.cut.tokens(sequence); t % s.cut.length != 0; ++t)
          expect(z[s.cut.position(sequence, head, t)] == 0, "z beyond the end", t);
      }
    }
    compare("G", got_g, wanted_g, g_dtype == Dtype::kBFloat16 ? 3e-3 : 1e-6);
    compare("z", got_z, wanted_z, 2e-6);
    g.expect_gaps_untouched("G"), z.expect_guards_untouched("z");
    if (s.normalize) expect(active > 0 && inactive > 0, "floors that matter");
  }

 private:
  void check_token(int64_t sequence, int64_t head, int64_t t) {
    const int64_t b = s.cut.row(sequence), token = s.cut.begin(sequence) + t;
    const int64_t position = s.cut.position(sequence, head, t);
    const double ell = product.get(b, token, head),
                 floor = records[static_cast<size_t>(position)].floor;
    const double norm =
        s.normalize ? (std::fabs(ell) > floor ? std::fabs(ell) : floor) + 0.125 : 1.0;
    const bool nan = s.normalize && std::isnan(ell);
    double dot = 0;
    for (int64_t d = 0; d < s.width; ++d) {
      const double upstream = s.expanded ? dh.get(0, 0, 0) : dh.get(b, token, head, d);
      const double got = g.get(b, token, head, d);
      if (nan || std::isnan(upstream)) {
        expect(std::isnan(got), "NaN reaches G", d);
      } else {
        got_g.push_back(got), wanted_g.push_back(upstream / norm);
      }
      dot += upstream / norm * h.get(b, token, head, d);
    }
    const bool is_active = s.normalize && std::fabs(ell) > floor;
    (is_active ? active : inactive) += 1;
    if (nan) return;
    if (is_active && std::isnan(dot)) {
      expect(std::isnan(z[position]), "NaN reaches z", t);
    } else if (!std::isnan(dot)) {
      got_z.push_back(z[position]), wanted_z.push_back(!is_active ? 0 : ell < 0 ? dot : -dot);
    }
  }

  const PrepSetting& s;
  Dtype g_dtype;
  StridedTensor h, dh, g, product;
  GuardedFloats z;
  std::vector<GateRecord> records;
  Numbers got_g, wanted_g, got_z, wanted_z;
  int64_t active = 0, inactive = 0;
};

void run_prep(const PrepSetting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Prep prep(s, seed);
    prep.launch();
    prep.check();
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + std::string(", prep T ") + std::to_string(s.cut.time) + " DV " +
                   std::to_string(s.width) + " dtype " + std::to_string(static_cast<int>(s.dtype)) +
                   " order " + std::to_string(static_cast<int>(s.order)));
  }
}

void prep(uint64_t seed) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t width : {1, 16, 40, 70, 256, 300})
      run_prep({.cut = {.time = 20, .heads = 2}, .width = width, .dtype = dtype}, seed);
    for (const Order order : {Order::kAligned, Order::kUnaligned, Order::kInner})
      run_prep({.cut = {.batch = 2, .time = 20, .heads = 2},
                .width = 40,
                .dtype = dtype,
                .order = order},
               seed);
    run_prep({.cut = {.time = 20, .heads = 2}, .width = 40, .dtype = dtype, .normalize = false},
             seed);
    run_prep({.cut = {.time = 20, .heads = 2}, .width = 40, .dtype = dtype, .expanded = true},
             seed);
  }
  // Pieces of 16 bytes, and rows with gaps.
  for (const int64_t width : {8, 24, 384, 512, 832})
    run_prep({.cut = {.batch = 2, .time = 37, .heads = 2},
              .width = width,
              .dtype = Dtype::kBFloat16,
              .order = width == 384 ? Order::kAligned : Order::kDense},
             seed);
  run_prep(
      {.cut = {.time = 20, .heads = 2}, .width = 64, .dtype = Dtype::kBFloat16, .normalize = false},
      seed);
  for (const int64_t length : {64, 128, 256}) {
    for (const int64_t time : {17, 63, 64, 65, 200})
      run_prep({.cut = {.batch = 2, .time = time, .heads = 2, .length = length}}, seed);
    const Cut cut{.time = 200, .length = length, .packed = {0, 0, 2, 64, 65, 65, 130, 200, 200}};
    run_prep({.cut = cut}, seed);
  }
  const Cut small{.time = 20, .heads = 2};
  run_prep({.cut = small, .nan_product = NAN}, seed);
  run_prep({.cut = small, .width = 300, .nan_product = 100, .nan_dh = NAN}, seed);
}

// segment scan ----------------------------------------------------------------------------------------------------------

void run_scan(int32_t items, int32_t segments, int64_t size, bool reverse, bool has_start,
              uint64_t seed) {
  std::mt19937 random(static_cast<unsigned>(seed + 10));
  GuardedFloats start(items * size), gamma(items * segments), sums(items * segments * size);
  start.fill(random, 0, 1), gamma.fill(random, 0.5, 0.3), sums.fill(random, 0, 1);
  gamma[0] = 0;
  Numbers wanted(static_cast<size_t>(items * segments * size));
  for (int32_t item = 0; item < items; ++item) {
    for (int64_t i = 0; i < size; ++i) {
      double entering = has_start ? start[item * size + i] : 0.0F;
      for (int32_t step = 0; step < segments; ++step) {
        const int64_t segment = item * segments + (reverse ? segments - 1 - step : step);
        wanted[static_cast<size_t>(segment * size + i)] = entering;
        entering = gamma[segment] * entering + sums[segment * size + i];
      }
    }
  }
  SegmentScanParams p;
  p.items = items, p.segments = segments, p.reverse = reverse, p.size = size;
  p.start = has_start ? start.data() : nullptr;
  p.gamma = gamma.data(), p.sums = sums.data();
  launch_segment_scan(p, nullptr);
  compare("segment scan", sums.slice(0, items * segments * size), wanted, 1e-6);
  sums.expect_guards_untouched("sums");
}

void segment_scan(uint64_t seed) {
  simt::launch_seed = seed;
  for (const int64_t size : {1, 255, 256, 600, 4100})
    for (const int32_t segments : {1, 2, 7})
      for (const bool reverse : {false, true})
        for (const bool has_start : {false, true})
          run_scan(3, segments, size, reverse, has_start, seed);
}

// gate gradients --------------------------------------------------------------------------------------------------------

struct GradientSetting {
  Cut cut;
  Dtype igate = Dtype::kFloat32, fgate = Dtype::kFloat32;
  bool sigmoid = false, start = true;
  Order order = Order::kDense;
  std::vector<int64_t> resets = {};
  int32_t tiles = 1;
  int32_t anchor = 0;  ///< slots between anchors, 0: none
  bool end = false;    ///< final states and their gradients
  double forget = 1, spread = 2;
};

class GateGradients {
 public:
  GateGradients(const GradientSetting& setting, uint64_t seed)
      : s(setting),
        igate(s.cut.batch, s.cut.time, s.cut.heads, 1, s.igate, s.order),
        fgate(s.cut.batch, s.cut.time, s.cut.heads, 1, s.fgate, s.order),
        digate(s.cut.batch, s.cut.time, s.cut.heads, 1, s.igate, s.order),
        dfgate(s.cut.batch, s.cut.time, s.cut.heads, 1, s.fgate, s.order),
        dots_r(s.tiles * s.cut.positions()),
        dots_c(s.tiles * s.cut.positions()),
        c0(items() * kStateSize),
        dc0(items() * kStateSize),
        n0(items() * kNSize),
        dn0(items() * kNSize),
        end_c(items() * kStateSize),
        end_dc(items() * kStateSize),
        end_n(items() * kNSize),
        end_dn(items() * kNSize),
        anchor_dots(kAnchorTiles * s.cut.heads * anchors() * xlstm::cuda::kAnchorWarps),
        resets(s.cut, s.resets) {
    std::mt19937 random(static_cast<unsigned>(100 * seed + s.cut.time));
    igate.fill(random, 0, s.spread), fgate.fill(random, s.forget, s.spread);
    for (GuardedFloats* x :
         {&dots_r, &dots_c, &c0, &dc0, &n0, &dn0, &end_c, &end_dc, &end_n, &end_dn, &anchor_dots})
      x->fill(random, 0, 1);
  }

  void launch() {
    GateGradientParams p;
    p.chunks = s.cut.chunks();
    p.igate = igate.view, p.fgate = fgate.view, p.digate = digate.view, p.dfgate = dfgate.view;
    p.igate_dtype = s.igate, p.fgate_dtype = s.fgate;
    p.sigmoid_input_gate = s.sigmoid;
    if (!s.resets.empty()) resets.give_to(p);
    p.dots_r = dots_r.data(), p.dots_c = dots_c.data(), p.tiles = s.tiles;
    if (s.anchor > 0) {
      p.chunks.anchor = s.anchor;
      p.anchors.dots = anchor_dots.data();
      p.anchors.count = static_cast<int32_t>(anchors());
      p.anchor_tiles = kAnchorTiles;
    }
    p.state_size = kStateSize, p.n_size = kNSize;
    if (s.start) p.start = {c0.data(), dc0.data(), n0.data(), dn0.data()};
    if (s.end) p.end = {end_c.data(), end_dc.data(), end_n.data(), end_dn.data()};
    launch_gate_gradients(p, nullptr);
  }

  void check() {
    for (int64_t sequence = 0; sequence < s.cut.sequences(); ++sequence)
      for (int64_t head = 0; head < s.cut.heads; ++head) check_head(sequence, head);
    const auto rounding = [](Dtype dtype) {
      return dtype == Dtype::kBFloat16 ? 4e-3 : dtype == Dtype::kFloat16 ? 5e-4 : 1e-6;
    };
    compare("digate", got_i, wanted_i, rounding(s.igate));
    compare("dfgate", got_f, wanted_f, rounding(s.fgate));
    digate.expect_gaps_untouched("digate"), dfgate.expect_gaps_untouched("dfgate");
  }

 private:
  static constexpr int64_t kStateSize = 24 * 40, kNSize = 24;
  static constexpr int32_t kAnchorTiles = 2;
  int64_t items() const { return s.cut.sequences() * s.cut.heads; }
  int64_t anchors() const { return s.anchor == 0 ? 1 : s.cut.slots() / s.anchor + 1; }

  double dot(GuardedFloats& a, GuardedFloats& b, int64_t size, int64_t item) {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i)
      sum += static_cast<double>(a[item * size + i]) * b[item * size + i];
    return sum;
  }
  double state_dot(GuardedFloats& c, GuardedFloats& dc, GuardedFloats& n, GuardedFloats& dn,
                   int64_t item) {
    return dot(c, dc, kStateSize, item) + dot(n, dn, kNSize, item);
  }
  double tiles_sum(GuardedFloats& dots, int64_t position) {
    double sum = 0;
    for (int32_t tile = 0; tile < s.tiles; ++tile) sum += dots[tile * s.cut.positions() + position];
    return sum;
  }

  /// Where the sum starts anew, and with what.
  struct Restart {
    int64_t token;
    double value;
  };
  std::vector<Restart> restarts(int64_t sequence, int64_t head) {
    const int64_t item = sequence * s.cut.heads + head, length = s.cut.length;
    std::vector<Restart> found;
    for (int64_t t = 0; t < s.cut.tokens(sequence); ++t) {
      const int64_t slot = s.cut.first_slot(sequence) + t / length;
      if (resets(sequence, t)) {
        found.push_back({t, 0});
      } else if (t == 0) {
        found.push_back({0, s.start ? state_dot(c0, dc0, n0, dn0, item) : 0});
      } else if (t % length == 0 && s.anchor > 0 && slot % s.anchor == 0) {
        double sum = 0;
        for (int64_t tile = 0; tile < kAnchorTiles; ++tile)
          for (int64_t part = 0; part < xlstm::cuda::kAnchorWarps; ++part)
            sum += anchor_dots[((tile * s.cut.heads + head) * anchors() + slot / s.anchor) *
                                   xlstm::cuda::kAnchorWarps +
                               part];
        found.push_back({t, sum});
      }
    }
    return found;
  }

  void check_head(int64_t sequence, int64_t head) {
    const int64_t item = sequence * s.cut.heads + head;
    std::vector<Restart> runs = restarts(sequence, head);
    runs.push_back(
        {s.cut.tokens(sequence), s.end ? state_dot(end_c, end_dc, end_n, end_dn, item) : 0});
    for (size_t i = 0; i + 1 < runs.size(); ++i) {
      check_run(sequence, head, runs[i], runs[i + 1]);
      if (runs[i].value == 0)
        expect(got_f[got_f.size() - static_cast<size_t>(runs[i + 1].token - runs[i].token)] == 0,
               "exact zero without a state before", runs[i].token);
    }
  }

  /// The sum from the run's start and the sum back from its end, each weighted by the variance of the other.
  void check_run(int64_t sequence, int64_t head, const Restart& from, const Restart& to) {
    const int64_t b = s.cut.row(sequence), first = s.cut.position(sequence, head, 0);
    std::vector<double> step, variance;
    for (int64_t t = from.token; t < to.token; ++t) {
      const double c = tiles_sum(dots_c, first + t), r = tiles_sum(dots_r, first + t);
      step.push_back(c - r), variance.push_back(c * c + r * r);
      const int64_t token = s.cut.begin(sequence) + t;
      got_i.push_back(digate.get(b, token, head)), got_f.push_back(dfgate.get(b, token, head));
      wanted_i.push_back(s.sigmoid ? c * sigmoid(-igate.get(b, token, head)) : c);
    }
    const auto sum = [](const std::vector<double>& x, size_t begin, size_t end) {
      double total = 0;
      for (size_t i = begin; i < end; ++i) total += x[i];
      return total;
    };
    for (size_t i = 0; i < step.size(); ++i) {
      const double before = sum(variance, 0, i), after = sum(variance, i, step.size());
      const double forward = from.value + sum(step, 0, i),
                   backward = to.value - sum(step, i, step.size());
      const double estimate = (forward * after + backward * before) / (before + after);
      const int64_t token = s.cut.begin(sequence) + from.token + static_cast<int64_t>(i);
      wanted_f.push_back(estimate * sigmoid(-fgate.get(b, token, head)));
    }
  }

  const GradientSetting& s;
  StridedTensor igate, fgate, digate, dfgate;
  GuardedFloats dots_r, dots_c, c0, dc0, n0, dn0, end_c, end_dc, end_n, end_dn, anchor_dots;
  Resets resets;
  Numbers got_i, wanted_i, got_f, wanted_f;
};

void run_gradients(const GradientSetting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    GateGradients gradients(s, seed);
    gradients.launch();
    gradients.check();
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + std::string(", gate gradients T ") + std::to_string(s.cut.time) +
                   " L " + std::to_string(s.cut.length) + " sigmoid " + std::to_string(s.sigmoid) +
                   " resets " + std::to_string(s.resets.size()) + " packed " +
                   std::to_string(s.cut.packed.size()));
  }
}

const std::vector<int64_t> kResets = {5, 6, 7, 31, 32, 63, 64, 65, 127, 128, 255, 256, 257, 400};

void gate_gradients(uint64_t seed) {
  if (simt::build_kind() == simt::Build::kThread) {  // slow there: what has every barrier
    const Cut packed{.time = 200, .length = 64, .packed = {0, 0, 1, 200}};
    run_gradients({.cut = packed, .resets = {5, 63, 64}, .tiles = 2, .anchor = 1, .end = true},
                  seed);
    return;
  }
  for (const int64_t time : {1, 17, 63, 64, 65, 127, 200, 512}) {
    for (const bool start : {false, true}) {
      const Cut cut{.batch = 2, .time = time, .heads = 2};
      run_gradients({.cut = cut, .start = start}, seed);
      run_gradients({.cut = cut, .sigmoid = true, .start = start, .resets = kResets, .tiles = 3},
                    seed);
      run_gradients({.cut = cut, .start = start, .anchor = 2, .end = true}, seed);
    }
  }
  run_gradients({.cut = {.time = 70, .length = 128}, .resets = {0}}, seed);
  for (const int32_t anchor : {1, 3, 8}) {
    const Cut cut{.batch = 2, .time = 1100, .heads = 2};
    run_gradients({.cut = cut, .anchor = anchor}, seed);
    run_gradients({.cut = cut, .resets = kResets, .tiles = 2, .anchor = anchor, .end = true}, seed);
  }
  for (const int64_t length : {64, 256}) {
    const Cut cut{
        .time = 700, .heads = 2, .length = length, .packed = {0, 0, 1, 64, 65, 65, 130, 700, 700}};
    const auto anchor = static_cast<int32_t>(512 / length);
    run_gradients({.cut = cut, .anchor = anchor}, seed);
    run_gradients({.cut = cut, .resets = kResets, .tiles = 2, .anchor = anchor}, seed);
  }
  for (const Dtype dtype : kDtypes) {
    for (const Order order : {Order::kAligned, Order::kUnaligned, Order::kInner}) {
      const Cut cut{.batch = 2, .time = 70, .heads = 2};
      run_gradients({.cut = cut, .igate = dtype, .sigmoid = true, .order = order}, seed);
      run_gradients({.cut = cut, .fgate = dtype, .order = order}, seed);
    }
  }
  for (const double forget : {-10000.0, -80.0, 80.0})
    run_gradients({.cut = {.time = 130}, .sigmoid = true, .forget = forget, .spread = 30}, seed);
}

}  // namespace

List<Case> mlstm_prep_cases() {
  static const Case cases[] = {
      {"mlstm prep", prep},
      {"mlstm segment scan", segment_scan},
      {"mlstm gate gradients", gate_gradients},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
