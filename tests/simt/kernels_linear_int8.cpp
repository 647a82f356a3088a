// Linear maps with a matrix of 8 bits: against sums in float64, and each row of x against the same row alone, to the bit.
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/linear_int8/linear_int8.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::LinearInt8Params;

struct Setting {
  int32_t rows = 1, in = 64, out = 3;
  Dtype dtype = Dtype::kFloat32;
  bool bias = true;
  Dtype bias_dtype = Dtype::kFloat32;

  int32_t columns() const { return (in + 15) / 16 * 16; }
};

/// A matrix as quantize_int8 makes it, that ends where its memory does.
class Matrix {
 public:
  Matrix(const Setting& s, std::mt19937& random)
      : pitch_(s.columns() + 16), memory_(static_cast<size_t>(s.out) * pitch_ + 16) {
    while (reinterpret_cast<uintptr_t>(data()) % 16 != 0) ++first_;
    memory_.resize(static_cast<size_t>(s.out) * pitch_ + first_);
    std::uniform_int_distribution<int> integer(-127, 127);
    std::uniform_real_distribution<float> scale(0.01F, 0.02F);
    for (int32_t o = 0; o < s.out; ++o) {
      for (int32_t i = 0; i < s.in; ++i)
        data()[o * pitch_ + i] = static_cast<int8_t>(integer(random));
      if (s.in > 1) data()[o * pitch_] = -127, data()[o * pitch_ + 1] = 127;
      const float step = scale(random);
      std::memcpy(data() + o * pitch_ + s.columns(), &step, 4);
    }
  }
  int8_t* data() { return memory_.data() + first_; }
  double get(int64_t o, int64_t i) { return data()[o * pitch_ + i]; }
  double scale(int64_t o) {
    float step;
    std::memcpy(&step, data() + (o + 1) * pitch_ - 16, 4);
    return step;
  }

 private:
  int64_t pitch_;
  std::vector<int8_t> memory_;
  size_t first_ = 0;
};

class Problem {
 public:
  Problem(const Setting& setting, uint64_t seed)
      : s(setting),
        random(static_cast<unsigned>(seed * 1000 + s.in + s.out + s.rows)),
        weight(s, random),
        x(1, s.rows, 1, s.columns(), s.dtype),
        bias(1, 1, 1, s.out, s.bias_dtype),
        y(1, s.rows, 1, s.out, s.dtype) {
    bias.fill(random, 0.5, 1);
    x.fill(random, 0, 1);
    for (int64_t m = 0; m < s.rows; ++m)
      for (int64_t i = s.in; i < s.columns(); ++i) x.set(0, m, 0, i, 0);
  }

  void all_rows() {
    launch_linear_int8(params(x, y), nullptr);
    Numbers wanted;
    for (int64_t m = 0; m < s.rows; ++m)
      for (int64_t o = 0; o < s.out; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < s.in; ++i) sum += weight.get(o, i) * x.get(0, m, 0, i);
        wanted.push_back(sum * weight.scale(o) + (s.bias ? bias.get(0, 0, 0, o) : 0));
      }
    compare("y", y.all(), wanted, tolerance());
    y.expect_gaps_untouched("y");
  }

  /// One at a time; bits are told from numbers where these are signed zeros alone.
  void each_row() {
    for (int64_t m = 0; m < s.rows; ++m) {
      StridedTensor one(1, 1, 1, s.columns(), s.dtype), alone(1, 1, 1, s.out, s.dtype);
      for (int64_t i = 0; i < s.columns(); ++i) one.set(0, 0, 0, i, x.get(0, m, 0, i));
      LinearInt8Params p = params(one, alone);
      p.rows = 1;
      launch_linear_int8(p, nullptr);
      expect(alone.all() == y.rows(0, m, 1, 0), "bits of a row alone", static_cast<long>(m));
    }
  }

  /// What is no number in a row of x spoils that row and no other; infinity stays infinite.
  void spoil(int64_t row, float number) {
    launch_linear_int8(params(x, y), nullptr);
    const Numbers before = y.all();
    x.set(0, row, 0, 1, number);  // times 127
    launch_linear_int8(params(x, y), nullptr);
    for (int64_t m = 0; m < s.rows; ++m)
      for (int64_t o = 0; o < s.out; ++o) {
        const double got = y.get(0, m, 0, o);
        if (m != row) {
          expect(got == before[static_cast<size_t>(m * s.out + o)], "other rows", m);
        } else {
          expect(std::isnan(number) ? std::isnan(got) : got == number, "spoiled row", o);
        }
      }
  }

 private:
  double tolerance() const {
    return s.dtype == Dtype::kBFloat16 ? 4e-3 : s.dtype == Dtype::kFloat16 ? 5e-4 : 1e-6;
  }
  LinearInt8Params params(const StridedTensor& in, const StridedTensor& out) {
    LinearInt8Params p;
    p.rows = s.rows, p.columns = s.columns(), p.out = s.out, p.dtype = s.dtype;
    p.weight = weight.data(), p.x = in.view.data, p.y = out.view.data;
    if (s.bias) p.bias = bias.view.data;
    p.bias_dtype = s.bias_dtype;
    return p;
  }

  const Setting s;
  std::mt19937 random;
  Matrix weight;
  StridedTensor x, bias, y;
};

void run(const Setting& s, uint64_t seed, bool each = false) {
  simt::launch_seed = seed;
  try {
    Problem problem(s, seed);
    problem.all_rows();
    if (each) problem.each_row();
  } catch (const Mismatch& error) {
    throw Mismatch(std::string(error.what()) + ", rows " + std::to_string(s.rows) + " in " +
                   std::to_string(s.in) + " out " + std::to_string(s.out) + " dtype " +
                   std::to_string(static_cast<int>(s.dtype)));
  }
}

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

void few(uint64_t seed) {
  for (const Dtype dtype : kDtypes) {
    run({.rows = 3, .in = 17, .out = 19, .dtype = dtype}, seed);
    run({.rows = 9, .in = 530, .out = 5, .dtype = dtype, .bias = false}, seed);
  }
}

void sizes(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    for (const int32_t in : {1, 15, 16, 17, 64, 1000})
      for (const int32_t out : {1, 3, 64, 130})
        for (const int32_t rows : {1, 2, 5, 8, 16}) {
          const bool bias = (in + out + rows) % 3 != 0;
          run({rows, in, out, dtype, bias, kDtypes[rows % 3]}, seed, out == 3);
        }
}

/// Several rounds of loads by every warp.
void long_rows(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    for (const int32_t rows : {1, 5, 16})
      run({.rows = rows, .in = rows == 5 ? 9001 : 4096, .out = 130, .dtype = dtype}, seed,
          rows == 5);
}

void numbers(uint64_t seed) {
  simt::launch_seed = seed;
  for (const Dtype dtype : kDtypes)
    for (const int32_t rows : {3, 11})
      for (const float number : {INFINITY, -INFINITY, NAN})
        Problem({.rows = rows, .in = 40, .out = 18, .dtype = dtype}, seed).spoil(rows - 2, number);
}

/// float32 numbers whose sum cancels all but what their last bits are worth.
void last_bits(uint64_t seed) {
  simt::launch_seed = seed;
  std::vector<int8_t> memory(64);
  int8_t* weight = memory.data();
  while (reinterpret_cast<uintptr_t>(weight) % 16 != 0) ++weight;
  const float step = 0.5F;
  weight[0] = 127, weight[7] = -127;
  std::memcpy(weight + 16, &step, 4);
  StridedTensor x(1, 1, 1, 16, Dtype::kFloat32), y(1, 1, 1, 1, Dtype::kFloat32);
  for (int64_t i = 0; i < 16; ++i) x.set(0, 0, 0, i, 0);
  x.set(0, 0, 0, 0, 1.0F + 0x1p-23F), x.set(0, 0, 0, 7, 1.0F);
  LinearInt8Params p;
  p.rows = 1, p.columns = 16, p.out = 1;
  p.weight = weight, p.x = x.view.data, p.y = y.view.data;
  launch_linear_int8(p, nullptr);
  compare("y", y.all(), {0x1p-23 * 127 / 2}, 1e-6);
}

void no_rows(uint64_t) {
  launch_linear_int8(LinearInt8Params{}, nullptr);
  LinearInt8Params p;
  p.rows = 17;
  bool thrown = false;
  try {
    launch_linear_int8(p, nullptr);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect(thrown, "17 rows");
}

}  // namespace

List<Case> linear_int8_cases() {
  static const Case cases[] = {
      {"linear_int8: few sizes", few},       {"linear_int8: no rows and too many", no_rows},
      {"linear_int8: inf and NaN", numbers}, {"linear_int8: last bits of float32", last_bits},
      {"linear_int8: sizes", sizes},         {"linear_int8: long rows", long_rows},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 4 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
