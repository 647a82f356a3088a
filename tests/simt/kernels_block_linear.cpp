// Block-diagonal maps: values and gradients against plain loops over the definition.
#include "cuda/block_linear/block_linear.h"

#include <random>
#include <string>
#include <vector>

#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::BlockLinearGradientParams;
using xlstm::cuda::BlockLinearParams;
using xlstm::cuda::Dtype;
using xlstm::cuda::RowView;

struct Setting {
  int64_t rows = 5;
  int32_t blocks = 8, size = 4;
  Dtype dtype = Dtype::kFloat32;
  bool bias = true;
  Order order = Order::kDense;  ///< kAligned: rows of a (B,T) slice with gaps

  int64_t channels() const { return int64_t{blocks} * size; }
};

/// Rows are the tokens of `batch` sequences, so that two strides describe them.
class Problem {
 public:
  Problem(const Setting& setting, uint64_t seed)
      : s(setting),
        time((s.rows + 1) / 2),
        batch(s.rows % 2 == 0 ? 2 : 1),
        x(batch, count(), 1, s.channels(), s.dtype, s.order),
        dy(batch, count(), 1, s.channels(), s.dtype, s.order),
        y(batch, count(), 1, s.channels(), s.dtype, s.order),
        dx(batch, count(), 1, s.channels(), s.dtype, s.order),
        weight(s.blocks, s.size, 1, s.size, s.dtype),
        dweight(s.blocks, s.size, 1, s.size, s.dtype),
        bias(1, 1, 1, s.channels(), s.dtype),
        dbias(1, 1, 1, s.channels(), s.dtype) {
    std::mt19937 random(static_cast<unsigned>(seed * 100 + s.size + s.rows));
    for (StridedTensor* tensor : {&x, &dy, &weight, &bias}) tensor->fill(random, 0.25, 1);
  }

  void forward() {
    BlockLinearParams p = params(x, y);
    if (s.bias) p.bias = bias.view.data;
    launch_block_linear(p, nullptr);
    Numbers wanted;
    each_channel([&](int64_t b, int64_t t, int64_t c) {
      double sum = s.bias ? bias.get(0, 0, 0, c) : 0;
      for (int64_t i = 0; i < s.size; ++i)
        sum += weight.get(c / s.size, c % s.size, 0, i) * x.get(b, t, 0, c / s.size * s.size + i);
      wanted.push_back(sum);
    });
    compare("y", y.all(), wanted, tolerance());
    y.expect_gaps_untouched("y");
  }

  void backward() {
    BlockLinearGradientParams p;
    p.rows = s.rows, p.blocks = s.blocks, p.size = s.size, p.dtype = s.dtype;
    p.x = view(x), p.dy = view(dy), p.dx = view(dx), p.weight = weight.view.data;
    p.dweight = dweight.view.data, p.dbias = s.bias ? dbias.view.data : nullptr;
    GuardedFloats partials(block_linear_partials(p));
    p.partials = partials.data();
    launch_block_linear_gradients(p, nullptr);
    partials.expect_guards_untouched("partial sums");
    Numbers wanted;
    each_channel([&](int64_t b, int64_t t, int64_t c) {
      double sum = 0;
      for (int64_t o = 0; o < s.size; ++o)
        sum += weight.get(c / s.size, o, 0, c % s.size) * dy.get(b, t, 0, c / s.size * s.size + o);
      wanted.push_back(sum);
    });
    compare("dx", dx.all(), wanted, tolerance());
    dx.expect_gaps_untouched("dx");
    check_weights();
  }

 private:
  int64_t count() const { return s.rows / batch; }
  double tolerance() const {
    return s.dtype == Dtype::kBFloat16 ? 4e-3 : s.dtype == Dtype::kFloat16 ? 5e-4 : 1e-6;
  }
  RowView view(const StridedTensor& tensor) const {
    return {tensor.view.data, count(), tensor.view.time, tensor.view.batch};
  }
  BlockLinearParams params(const StridedTensor& in, const StridedTensor& out) const {
    BlockLinearParams p;
    p.rows = s.rows, p.blocks = s.blocks, p.size = s.size, p.dtype = s.dtype;
    p.x = view(in), p.y = view(out), p.weight = weight.view.data;
    expect(block_linear_supported(s.blocks, s.size, s.dtype), "a size without kernels");
    expect(block_linear_aligned(p.x, s.dtype) && block_linear_aligned(p.y, s.dtype), "alignment");
    return p;
  }
  template <class F>
  void each_channel(F f) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < count(); ++t)
        for (int64_t c = 0; c < s.channels(); ++c) f(b, t, c);
  }
  void check_weights() const {
    Numbers weights(static_cast<size_t>(s.channels() * s.size)),
        biases(static_cast<size_t>(s.channels()));
    each_channel([&](int64_t b, int64_t t, int64_t c) {
      biases[static_cast<size_t>(c)] += dy.get(b, t, 0, c);
      for (int64_t i = 0; i < s.size; ++i)
        weights[static_cast<size_t>(c * s.size + i)] +=
            dy.get(b, t, 0, c) * x.get(b, t, 0, c / s.size * s.size + i);
    });
    compare("dweight", dweight.all(), weights, tolerance());
    if (s.bias) compare("dbias", dbias.all(), biases, tolerance());
  }

  const Setting& s;
  const int64_t time, batch;
  StridedTensor x, dy, y, dx, weight, dweight, bias, dbias;
};

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Problem problem(s, seed);
    problem.forward();
    problem.backward();
  } catch (const Mismatch& error) {
    throw Mismatch(std::string(error.what()) + ", rows " + std::to_string(s.rows) + " blocks " +
                   std::to_string(s.blocks) + " size " + std::to_string(s.size) + " dtype " +
                   std::to_string(static_cast<int>(s.dtype)));
  }
}

void few(uint64_t seed) {
  run({.rows = 7}, seed);
  run({.rows = 4, .size = 2, .dtype = Dtype::kBFloat16}, seed);
}

void sizes(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
    for (const int32_t size : {2, 4, 8})
      for (const int64_t rows : {1, 6, 37})
        run({.rows = rows,
             .blocks = 24,
             .size = size,
             .dtype = dtype,
             .bias = rows != 6,
             .order = rows == 37 ? Order::kAligned : Order::kDense},
            seed);
}

void long_strips(uint64_t seed) {
  run({.rows = 700, .blocks = 8, .size = 4, .dtype = Dtype::kBFloat16}, seed);
  run({.rows = 300, .blocks = 2, .size = 8}, seed);
}

/// Tiles of channels that do not fill a block, rows whose seam lies inside of what a thread takes at once.
void tiles(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
    run({.rows = 38, .blocks = 70, .size = 4, .dtype = dtype, .order = Order::kAligned}, seed);
}

/// So many channels that every thread takes several batches of rows.
void wide(uint64_t seed) {
  run({.rows = 142, .blocks = 3072, .size = 4, .order = Order::kAligned}, seed);
}

void refused(uint64_t) {
  using xlstm::cuda::block_linear_supported;
  expect(!block_linear_supported(8, 3, Dtype::kFloat32), "blocks of 3");
  expect(!block_linear_supported(8, 16, Dtype::kFloat32), "blocks of 16");
  expect(!block_linear_supported(1, 4, Dtype::kBFloat16), "4 channels of 2 bytes");
  expect(block_linear_supported(1, 4, Dtype::kFloat32), "4 channels of 4 bytes");
  expect(block_linear_supported((int64_t{1} << 29) - 1, 4, Dtype::kFloat32), "2^31 - 4 channels");
  expect(!block_linear_supported(int64_t{1} << 29, 4, Dtype::kFloat32), "2^31 channels");
  expect(!block_linear_supported((int64_t{1} << 32) + 8, 4, Dtype::kFloat32), "2^34 channels");
}

}  // namespace

List<Case> block_linear_cases() {
  static const Case cases[] = {
      {"block_linear: few sizes", few},           {"block_linear: sizes", sizes},
      {"block_linear: long strips", long_strips}, {"block_linear: tiles of channels", tiles},
      {"block_linear: many channels", wide},      {"block_linear: what is refused", refused},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
