// Head-wise norm, of given rows and of sums that it makes: values and all gradients against the definition in float64.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/norm/headwise_norm.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::HeadwiseNormBackward;
using xlstm::cuda::HeadwiseNormForward;
using xlstm::cuda::HeadwiseNormInputs;
using xlstm::cuda::NormParameter;
using xlstm::cuda::NormTerm;
using xlstm::cuda::RowView;

constexpr double kEps = 1e-3;

struct Setting {
  int64_t batch = 1, time = 3;
  int64_t heads = 2, dim = 16;
  Dtype dtype = Dtype::kFloat32, parameters = Dtype::kFloat32;
  bool weight = true, bias = true, skip = true, gate = true;
  bool rms = false, sigmoid = false;
  Order order = Order::kDense;  ///< of x: kAligned, kUnaligned are (B,NH,T,DH) with gaps
  bool gaps = false;            ///< between the rows of skip, gate and dy
  bool skip_by_one = false;     ///< skip's rows have an outer stride alone
  double mean = 0;              ///< of x
  bool sum = false;             ///< x is the sum of two terms, and has a further gradient
  Dtype terms[2] = {Dtype::kFloat32, Dtype::kFloat32};
  int32_t multiprocessors = 108;  ///< 0: as if the GPU were full, whatever the rows

  int64_t rows() const { return batch * time; }
  int64_t channels() const { return heads * dim; }
};

Order row_order(const Setting& s) { return s.gaps ? Order::kAligned : Order::kDense; }

/// Inputs, outputs and, of one channel after the other, what the definition says in float64.
class Problem {
 public:
  Problem(const Setting& setting, uint64_t seed)
      : s(setting),
        x(s.batch, s.time, s.heads, s.dim, s.dtype, s.order),
        skip(rows(row_order(s))),
        gate(rows(row_order(s))),
        dy(rows(row_order(s))),
        y(rows()),
        dx(rows()),
        dskip(rows()),
        dgate(rows()),
        weight(parameter()),
        bias(parameter()),
        skip_weight(parameter()),
        dweight(parameter()),
        dbias(parameter()),
        dskip_weight(parameter()),
        terms{{s.batch, s.time, 1, s.channels(), s.terms[0], row_order(s)},
              {s.batch, s.time, 1, s.channels(), s.terms[1], row_order(s)}},
        dsum(rows(row_order(s))) {
    std::mt19937 random(static_cast<unsigned>(seed * 1000 + s.dim * 10 + s.rows()));
    if (!s.sum) x.fill(random, s.mean, 1);
    for (StridedTensor* tensor :
         {&skip, &gate, &dy, &bias, &skip_weight, &terms[0], &terms[1], &dsum})
      tensor->fill(random, 0.25, 1);
    weight.fill(random, 1, 0.5);
  }

  void forward() {
    HeadwiseNormForward call{inputs(), y.view.data};
    if (s.sum) {
      for (int i = 0; i < 2; ++i) call.terms[i] = {view(terms[i]), s.terms[i]};
    }
    headwise_norm_forward(call, nullptr);
    if (s.sum) check_sum();
    Numbers wanted;
    each_row([&](int64_t b, int64_t t) {
      for (int64_t h = 0; h < s.heads; ++h) {
        const Numbers normed = norm(b, t, h).first;
        for (int64_t i = 0; i < s.dim; ++i) {
          const double value = before_gate(b, t, h * s.dim + i, normed[static_cast<size_t>(i)]);
          wanted.push_back(value * activation(b, t, h * s.dim + i));
        }
      }
    });
    compare("y", y.all(), wanted, tolerance());
  }

  void backward() {
    HeadwiseNormBackward call;
    call.in = inputs();
    call.dy = view(dy), call.dx = dx.view.data;
    if (s.sum) call.dsum = view(dsum);
    if (s.gate) call.dgate = dgate.view.data;
    if (s.weight) call.dweight = dweight.view.data;
    if (s.bias) call.dbias = dbias.view.data;
    if (s.skip) call.dskip = dskip.view.data, call.dskip_weight = dskip_weight.view.data;
    GuardedFloats partials(headwise_norm_partials(call.in));
    call.partials = partials.data();
    headwise_norm_backward(call, nullptr);
    partials.expect_guards_untouched("partial sums");
    check_gradients();
  }

 private:
  StridedTensor rows(Order order = Order::kDense) const {
    return {s.batch, s.time, 1, s.channels(), s.dtype, order};
  }
  StridedTensor parameter() const { return {1, 1, 1, s.channels(), s.parameters}; }
  double tolerance() const {
    const Dtype types[] = {s.dtype, s.parameters};
    double worst = 2e-6;
    for (const Dtype type : types)
      worst = std::max(worst, type == Dtype::kBFloat16 ? 4e-3 : type == Dtype::kFloat16 ? 5e-4 : 0);
    return worst * std::max(1.0, std::fabs(s.mean) / 4);  // x - mean is known no better
  }

  /// Dense rows have one stride.
  RowView view(const StridedTensor& tensor) const {
    if (tensor.view.batch == s.time * tensor.view.time)
      return {tensor.view.data, s.rows(), tensor.view.time, 0};
    return {tensor.view.data, s.time, tensor.view.time, tensor.view.batch};
  }
  RowView skip_view() const {
    if (!s.skip_by_one) return view(skip);
    return {skip.view.data, 1, 0, skip.view.time};
  }
  HeadwiseNormInputs inputs() const {
    HeadwiseNormInputs in;
    in.rows = s.rows();
    in.heads = static_cast<int32_t>(s.heads), in.dim = static_cast<int32_t>(s.dim);
    in.dtype = s.dtype;
    in.eps = static_cast<float>(kEps);
    in.rms = s.rms, in.sigmoid_gate = s.sigmoid;
    in.num_multiprocessors = s.multiprocessors;
    in.x = view(x), in.x_head = x.view.head;
    if (s.weight) in.weight = {weight.view.data, s.parameters};
    if (s.bias) in.bias = {bias.view.data, s.parameters};
    if (s.skip) in.skip = skip_view(), in.skip_weight = {skip_weight.view.data, s.parameters};
    if (s.gate) in.gate = view(gate);
    return in;
  }

  /// What the norm then is taken of.
  void check_sum() const {
    Numbers wanted;
    each_row([&](int64_t b, int64_t t) {
      for (int64_t c = 0; c < s.channels(); ++c)
        wanted.push_back(terms[0].get(b, t, 0, c) + terms[1].get(b, t, 0, c));
    });
    compare("sum", x.all(), wanted, tolerance());
  }

  template <class F>
  void each_row(F f) const {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t t = 0; t < s.time; ++t) f(b, t);
  }
  double of_channel(const StridedTensor& tensor, int64_t c) const { return tensor.get(0, 0, 0, c); }

  /// norm(x) of one head, and 1 / its size.
  std::pair<Numbers, double> norm(int64_t b, int64_t t, int64_t h) const {
    Numbers out = x.rows(b, t, 1, h);
    const double count = static_cast<double>(s.dim);
    double mean = 0, squares = 0;
    for (const double number : out) mean += s.rms ? 0 : number / count;
    for (const double number : out) squares += (number - mean) * (number - mean) / count;
    const double rstd = 1 / std::sqrt(squares + kEps);
    for (double& number : out) number = (number - mean) * rstd;
    return {out, rstd};
  }
  double before_gate(int64_t b, int64_t t, int64_t c, double normed) const {
    double value = normed * (s.weight ? of_channel(weight, c) : 1);
    if (s.bias) value += of_channel(bias, c);
    if (s.skip) value += of_channel(skip_weight, c) * skip.get(b, t, 0, c);
    return value;
  }
  double activation(int64_t b, int64_t t, int64_t c) const {
    if (!s.gate) return 1;
    const double g = gate.get(b, t, 0, c);
    return s.sigmoid ? sigmoid(g) : g * sigmoid(g);
  }
  double slope(int64_t b, int64_t t, int64_t c) const {
    const double g = gate.get(b, t, 0, c), p = sigmoid(g);
    return s.sigmoid ? p * (1 - p) : p + g * p * (1 - p);
  }

  void check_gradients() {
    Numbers wanted_dx, wanted_dskip, wanted_dgate, sums[3];
    for (Numbers& sum : sums) sum.assign(static_cast<size_t>(s.channels()), 0.0);
    each_row([&](int64_t b, int64_t t) {
      for (int64_t h = 0; h < s.heads; ++h) {
        const auto [normed, rstd] = norm(b, t, h);
        Numbers g;
        double mean_g = 0, mean_gx = 0;
        for (int64_t i = 0; i < s.dim; ++i) {
          const int64_t c = h * s.dim + i;
          const auto at = static_cast<size_t>(c);
          const double x_hat = normed[static_cast<size_t>(i)], up = dy.get(b, t, 0, c);
          const double d = up * activation(b, t, c);
          if (s.gate) wanted_dgate.push_back(up * before_gate(b, t, c, x_hat) * slope(b, t, c));
          wanted_dskip.push_back(d * of_channel(skip_weight, c));
          sums[0][at] += d * x_hat, sums[1][at] += d, sums[2][at] += d * skip.get(b, t, 0, c);
          g.push_back(d * (s.weight ? of_channel(weight, c) : 1));
          mean_g += s.rms ? 0 : g.back() / static_cast<double>(s.dim);
          mean_gx += g.back() * x_hat / static_cast<double>(s.dim);
        }
        for (size_t i = 0; i < g.size(); ++i)
          wanted_dx.push_back(rstd * (g[i] - mean_g - normed[i] * mean_gx) +
                              (s.sum ? dsum.get(b, t, 0, h * s.dim + static_cast<int64_t>(i)) : 0));
      }
    });
    compare("dx", dx.all(), wanted_dx, tolerance());
    if (s.gate) compare("dgate", dgate.all(), wanted_dgate, tolerance());
    if (s.weight) compare("dweight", dweight.all(), sums[0], tolerance());
    if (s.bias) compare("dbias", dbias.all(), sums[1], tolerance());
    if (!s.skip) return;
    compare("dskip", dskip.all(), wanted_dskip, tolerance());
    compare("dskip_weight", dskip_weight.all(), sums[2], tolerance());
  }

  const Setting& s;
  StridedTensor x, skip, gate, dy, y, dx, dskip, dgate;
  StridedTensor weight, bias, skip_weight, dweight, dbias, dskip_weight;
  StridedTensor terms[2], dsum;
};

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Problem problem(s, seed);
    problem.forward();
    problem.backward();
  } catch (const Mismatch& error) {
    throw Mismatch(std::string(error.what()) + ", norm B " + std::to_string(s.batch) + " T " +
                   std::to_string(s.time) + " NH " + std::to_string(s.heads) + " DH " +
                   std::to_string(s.dim) + " dtype " + std::to_string(static_cast<int>(s.dtype)) +
                   " weight " + std::to_string(s.weight) + " bias " + std::to_string(s.bias) +
                   " skip " + std::to_string(s.skip) + " gate " + std::to_string(s.gate) + " rms " +
                   std::to_string(s.rms) + " order " + std::to_string(static_cast<int>(s.order)) +
                   " sum " + std::to_string(s.sum) + " multiprocessors " +
                   std::to_string(s.multiprocessors));
  }
}

bool plain() { return simt::build_kind() == simt::Build::kPlain; }

/// Every barrier: sums within a warp, over warps and over the groups of a block.
void few(uint64_t seed) {
  run({.time = 2, .heads = 1, .dim = 5}, seed);
  run({.time = 5, .heads = 1, .dim = 264, .weight = false, .skip = false}, seed);
  run({.time = 2,
       .heads = 1,
       .dim = 6147,
       .weight = false,
       .bias = false,
       .skip = false,
       .gate = false,
       .rms = true},
      seed);
}

/// One row per thread, groups within a warp, of whole warps, the whole block, one to three pieces a thread, and wider.
/// Four numbers are a piece; 2048, 4096 and 6144 the most of one, two and three.
void widths(uint64_t seed) {
  for (const int32_t multiprocessors : {0, 108}) {
    for (const int64_t dim :
         {1, 4, 5, 8, 12, 24, 36, 100, 256, 264, 384, 388, 520, 768, 1024, 2048}) {
      if (!plain() && dim != 5 && dim != 264 && dim != 384) continue;
      run({.time = dim < 100 ? 5 : 2, .dim = dim, .multiprocessors = multiprocessors}, seed);
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) {
        run({.time = 2,
             .heads = 1,
             .dim = dim,
             .dtype = dtype,
             .rms = true,
             .multiprocessors = multiprocessors},
            seed);
      }
    }
  }
  for (const int64_t dim : {2052, 2051, 4096, 4100, 4104, 6144, 6145, 6148, 8192, 8200}) {
    if (!plain() && dim != 4096 && dim != 6145) continue;
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
      run({.time = 2, .heads = 1, .dim = dim, .dtype = dtype, .rms = dim == 4104}, seed);
  }
}

/// Groups of a block that have no row; blocks of several rows a group, and of one.
void strips(uint64_t seed) {
  for (const int32_t multiprocessors : {0, 1, 108}) {
    for (const int64_t dim : {48, 96, 384}) {
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
        run({.time = 45, .dim = dim, .dtype = dtype, .multiprocessors = multiprocessors}, seed);
    }
  }
}

/// Rows of one stride beside rows of two, and rows whose strides have nothing in common.
void cuts(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    run({.batch = 3, .dim = 24, .dtype = dtype, .gaps = true}, seed);
    run({.batch = 3, .dim = 24, .dtype = dtype, .order = Order::kAligned}, seed);
    run({.batch = 3, .dim = 24, .dtype = dtype, .order = Order::kAligned, .skip_by_one = true},
        seed);
  }
}

void many_rows(uint64_t seed) {
  run({.batch = 2, .time = 150, .heads = 3, .dim = 16}, seed);
  run({.batch = 1, .time = plain() ? 9000 : 1100, .heads = 128, .dim = 4}, seed);
}

void combinations(uint64_t seed) {
  for (int present = 0; present < 16; ++present) {
    for (const bool rms : {false, true}) {
      run({.dim = present % 2 == 0 ? 40 : 9,
           .weight = (present & 1) != 0,
           .bias = (present & 2) != 0,
           .skip = (present & 4) != 0,
           .gate = (present & 8) != 0,
           .rms = rms,
           .sigmoid = present % 3 == 0},
          seed);
    }
  }
}

void dtypes_and_strides(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const Order order : {Order::kDense, Order::kAligned, Order::kUnaligned}) {
      for (const int64_t dim : {24, 13}) {
        run({.batch = 2,
             .dim = dim,
             .dtype = dtype,
             .parameters = order == Order::kDense ? dtype : Dtype::kFloat32,
             .order = order,
             .gaps = order != Order::kDense},
            seed);
      }
    }
  }
}

/// Narrow, several warps and wide rows; every type of sum and terms; dense and with gaps.
void sums(uint64_t seed) {
  constexpr Dtype kF32 = Dtype::kFloat32, kBf16 = Dtype::kBFloat16, kF16 = Dtype::kFloat16;
  const Dtype types[][3] = {{kF32, kF32, kF32},
                            {kF32, kF32, kBf16},
                            {kBf16, kBf16, kBf16},
                            {kF16, kF16, kF16},
                            {kF32, kF16, kF32}};
  for (const auto& [dtype, first, second] : types) {
    for (const int64_t dim : {13, 64, 520, 768, 2051, 4104, 6148, 8209}) {
      if (!plain() && dim != 13 && dim != 768 && dim != 6148) continue;
      run({.time = 3,
           .heads = 1,
           .dim = dim,
           .dtype = dtype,
           .bias = dim % 2 == 0,
           .skip = false,
           .gate = false,
           .rms = dim % 2 != 0,
           .gaps = dim == 13 || dim == 520,
           .sum = true,
           .terms = {first, second},
           .multiprocessors = dim == 768 ? 0 : 108},
          seed);
    }
  }
  run({.batch = 2, .heads = 3, .dim = 24, .sum = true}, seed);
  run({.time = 0, .sum = true}, seed);
}

void no_rows(uint64_t seed) {
  run({.time = 0}, seed);
  run({.time = 0, .heads = 1, .dim = 9000}, seed);
}

/// A mean far from zero, and rows of zeros alone.
void offsets(uint64_t seed) {
  run({.dim = 64, .mean = 100}, seed);
  run({.dim = 300, .mean = 1000}, seed);
}

/// A NaN in x reaches what its own head computes and nothing of what others do; a saturated gate gives no NaN.
void special_values(uint64_t seed) {
  simt::launch_seed = seed;
  constexpr int64_t kDim = 40;
  for (const float gate : {-200.0F, 0.5F, 200.0F}) {
    StridedTensor x(1, 3, 2, kDim, Dtype::kFloat32), y(1, 3, 2, kDim, Dtype::kFloat32);
    StridedTensor gates(1, 3, 2, kDim, Dtype::kFloat32);
    std::mt19937 random(static_cast<unsigned>(seed));
    x.fill(random, 0, 1), gates.fill(random, gate, 0);
    x.set(0, 1, 0, 7, NAN);
    HeadwiseNormInputs in;
    in.rows = 3, in.heads = 2, in.dim = kDim, in.eps = 1e-5F;
    in.x = {x.view.data, 3, 2 * kDim, 0}, in.x_head = kDim;
    in.gate = {gates.view.data, 3, 2 * kDim, 0};
    headwise_norm_forward(HeadwiseNormForward{in, y.view.data}, nullptr);
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t h = 0; h < 2; ++h) {
        for (const double number : y.rows(0, t, 1, h))
          expect(t == 1 && h == 0 ? std::isnan(number) : std::isfinite(number), "NaN in x", t);
      }
    }
  }
}

}  // namespace

List<Case> norm_cases() {
  static const Case cases[] = {
      {"norm: few sizes", few},
      {"norm: no rows", no_rows},
      {"norm: widths", widths},
      {"norm: strips", strips},
      {"norm: dtypes and strides", dtypes_and_strides},
      {"norm: rows of different strides", cuts},
      {"norm: NaN and saturated gates", special_values},
      {"norm: mean far from zero", offsets},
      {"norm: combinations", combinations},
      {"norm: many rows", many_rows},
      {"norm: sums with a further gradient", sums},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
