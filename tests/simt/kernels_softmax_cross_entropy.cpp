// Cross entropy of rows and its gradient against plain loops over the definition.
#include "cuda/loss/softmax_cross_entropy.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::SoftmaxCrossEntropyParams;

struct Setting {
  int64_t rows = 3, vocab = 50;
  double soft_cap = 0, spread = 3;
  Dtype dtype = Dtype::kFloat32;
  bool in_place = false, scale = false, row_scales = false, gradient = true, ignored = true;
};

class Problem {
 public:
  Problem(const Setting& setting, uint64_t seed)
      : s(setting),
        logits(s.rows * s.vocab),
        loss(s.rows),
        row_scales(s.rows),
        gradient(1, s.rows, 1, s.vocab, s.dtype) {
    std::mt19937 random(static_cast<unsigned>(seed * 100 + s.vocab));
    logits.fill(random, 1, s.spread), row_scales.fill(random, 1, 0.5);
    for (int64_t r = 0; r < s.rows; ++r) {
      targets.push_back(s.ignored && r % 3 == 1 ? -100 : static_cast<int64_t>(random() % s.vocab));
      for (int64_t i = 0; i < s.vocab; ++i) given.push_back(logits[r * s.vocab + i]);
      if (targets.back() == -100) logits[r * s.vocab] = NAN;  // must not matter
    }
  }

  void run_and_compare() {
    SoftmaxCrossEntropyParams p;
    p.rows = s.rows, p.vocab = s.vocab;
    p.logits = logits.data(), p.targets = targets.data();
    p.soft_cap = static_cast<float>(s.soft_cap);
    p.loss = loss.data(), p.dtype = s.dtype;
    if (s.gradient)
      p.gradient = s.in_place ? static_cast<void*>(logits.data()) : gradient.view.data;
    if (s.scale) p.scale = &scale;
    if (s.row_scales) p.row_scales = row_scales.data();
    launch_softmax_cross_entropy(p, nullptr);
    Numbers losses, gradients;
    for (int64_t r = 0; r < s.rows; ++r) add_row(r, losses, gradients);
    compare("loss", loss.slice(0, s.rows), losses, 2e-6);
    loss.expect_guards_untouched("loss"), logits.expect_guards_untouched("logits");
    if (!s.gradient) return;
    const Numbers got = s.in_place ? logits.slice(0, s.rows * s.vocab) : gradient.all();
    compare("gradient", got, gradients,
            s.dtype == Dtype::kBFloat16  ? 3e-3
            : s.dtype == Dtype::kFloat16 ? 5e-4
                                         : 5e-6);
    gradient.expect_gaps_untouched("gradient");
  }

 private:
  void add_row(int64_t r, Numbers& losses, Numbers& gradients) const {
    const bool ignored = targets[static_cast<size_t>(r)] == -100;
    Numbers capped;
    double peak = -INFINITY, sum = 0;
    for (int64_t i = 0; i < s.vocab; ++i) {
      const double x = given[static_cast<size_t>(r * s.vocab + i)];
      capped.push_back(s.soft_cap > 0 ? s.soft_cap * std::tanh(x / s.soft_cap) : x);
      peak = std::fmax(peak, capped.back());
    }
    for (const double x : capped) sum += std::exp(x - peak);
    const double log_sum = peak + std::log(sum);
    losses.push_back(
        ignored ? 0 : log_sum - capped[static_cast<size_t>(targets[static_cast<size_t>(r)])]);
    double factor = s.scale ? static_cast<double>(scale) : 1;
    if (s.row_scales) factor *= row_scales.slice(r, 1)[0];
    for (int64_t i = 0; i < s.vocab; ++i) {
      const double x = capped[static_cast<size_t>(i)];
      const double slope = s.soft_cap > 0 ? 1 - x * x / (s.soft_cap * s.soft_cap) : 1;
      const double hit = i == targets[static_cast<size_t>(r)] ? 1 : 0;
      gradients.push_back(ignored ? 0 : (std::exp(x - log_sum) - hit) * slope * factor);
    }
  }

  const Setting& s;
  GuardedFloats logits, loss, row_scales;
  StridedTensor gradient;
  std::vector<int64_t> targets;
  std::vector<double> given;
  float scale = 0.375F;
};

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Problem(s, seed).run_and_compare();
  } catch (const Mismatch& error) {
    throw Mismatch(std::string(error.what()) + ", vocab " + std::to_string(s.vocab) + " soft cap " +
                   std::to_string(s.soft_cap) + " dtype " +
                   std::to_string(static_cast<int>(s.dtype)));
  }
}

void few(uint64_t seed) {
  run({.vocab = 50, .soft_cap = 5, .in_place = true}, seed);
  run({.vocab = 264, .dtype = Dtype::kBFloat16, .scale = true}, seed);
}

void sizes(uint64_t seed) {
  for (const int64_t vocab : {1, 3, 8, 50, 256, 260, 1000, 2056})
    for (const double cap : {0., 4.}) run({.vocab = vocab, .soft_cap = cap}, seed);
}

void gradients(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
    for (const int64_t vocab : {50, 264}) {
      run({.rows = 7, .vocab = vocab, .dtype = dtype, .scale = true}, seed);
      run({.rows = 7,
           .vocab = vocab,
           .soft_cap = 5,
           .dtype = dtype,
           .scale = true,
           .row_scales = true},
          seed);
    }
  for (const int64_t vocab : {50, 264})
    run({.rows = 7, .vocab = vocab, .soft_cap = 5, .in_place = true, .row_scales = true}, seed);
  run({.rows = 7, .vocab = 264, .gradient = false}, seed);
  run({.rows = 5, .vocab = 300, .spread = 80}, seed);  // exponentials far beyond float32
}

/// What the host cannot check becomes NaN, in that row alone; a NaN among the logits as well.
void bad_rows(uint64_t seed) {
  simt::launch_seed = seed;
  for (const int64_t vocab : {30, 264}) {
    GuardedFloats logits(3 * vocab), loss(3);
    std::mt19937 random(7);
    logits.fill(random, 0, 1);
    StridedTensor gradient(1, 3, 1, vocab, Dtype::kFloat32);
    const int64_t targets[3] = {vocab, 2, 3};
    logits[2 * vocab + vocab - 1] = NAN;
    SoftmaxCrossEntropyParams p;
    p.rows = 3, p.vocab = vocab, p.logits = logits.data(), p.targets = targets;
    p.loss = loss.data(), p.gradient = gradient.view.data;
    launch_softmax_cross_entropy(p, nullptr);
    for (const int64_t row : {0, 2}) {
      expect(std::isnan(loss[row]), "loss of a bad row", row);
      expect(std::isnan(gradient.get(0, row, 0, 0)), "gradient of a bad row", row);
    }
    expect(std::isfinite(loss[1]) && std::isfinite(gradient.get(0, 1, 0, 0)), "a good row");
  }
}

}  // namespace

List<Case> softmax_cross_entropy_cases() {
  static const Case cases[] = {
      {"softmax_cross_entropy: few sizes", few},
      {"softmax_cross_entropy: sizes", sizes},
      {"softmax_cross_entropy: gradients", gradients},
      {"softmax_cross_entropy: bad rows", bad_rows},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
