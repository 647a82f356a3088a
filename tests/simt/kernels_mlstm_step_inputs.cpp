// What the cell of a decoding layer reads, against plain float64 loops. Each result is compared with what follows from those
// before it as the kernel has rounded them.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_step_inputs.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::Dtype;
using xlstm::cuda::MlstmStepInputsParams;

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

struct Setting {
  int64_t batch = 1, channels = 64, width = 4, size = 4, heads = 4, tokens = 1;
  Dtype dtype = Dtype::kFloat32;
  bool biases = true;             ///< of the convolution and the projections
  Order order = Order::kAligned;  ///< of x's rows: with gaps between them, or kDense
};

double tolerance(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? 4e-3 : dtype == Dtype::kFloat16 ? 6e-4 : 3e-6;
}

struct Map {
  Map(const Setting& s)
      : weight(1, s.channels / s.size, s.size, s.size, s.dtype),
        bias(1, 1, 1, s.channels, s.dtype),
        out(1, s.batch, 1, s.channels, s.dtype) {}
  StridedTensor weight, bias, out;
};
struct Gate {
  Gate(const Setting& s)
      : weight(1, s.heads, 1, 3 * s.channels, s.dtype),
        bias(1, 1, 1, s.heads, s.dtype),
        out(1, s.batch, 1, s.heads, s.dtype) {}
  StridedTensor weight, bias, out;
};

class Layer {
 public:
  Layer(const Setting& setting, uint64_t seed)
      : s(setting),
        x(s.batch, 1, 1, s.channels, s.dtype, s.order),
        a(1, s.batch, 1, s.channels, s.dtype),
        window(s.batch, s.width - 1, 1, s.channels, s.dtype),
        conv_weight(1, s.channels, 1, s.width, s.dtype),
        conv_bias(1, 1, 1, s.channels, s.dtype),
        maps{Map(s), Map(s), Map(s)},
        gates{Gate(s), Gate(s)},
        random(static_cast<unsigned>(100 * seed + s.channels + s.width)) {
    for (StridedTensor* each : {&window, &conv_weight, &conv_bias}) each->fill(random, 0.1, 0.7);
    for (Map& map : maps) map.weight.fill(random, 0, 0.5), map.bias.fill(random, 0, 0.5);
    for (Gate& gate : gates) gate.weight.fill(random, 0.01, 0.1), gate.bias.fill(random, 1, 1);
  }

  void step() {
    x.fill(random, 0.2, 1);
    before.clear();
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t j = 0; j < s.width - 1; ++j) before.push_back(window.rows(b, j, 1, 0));
    MlstmStepInputsParams p;
    p.dtype = s.dtype, p.batch = static_cast<int32_t>(s.batch);
    p.channels = static_cast<int32_t>(s.channels), p.num_heads = static_cast<int32_t>(s.heads);
    p.width = static_cast<int32_t>(s.width), p.block_size = static_cast<int32_t>(s.size);
    p.x = x.view.data, p.x_batch = x.view.batch;
    p.conv_weight = conv_weight.view.data, p.window = window.view.data, p.a = a.view.data;
    if (s.biases) p.conv_bias = conv_bias.view.data;
    MlstmStepInputsParams::Projection* const projections[] = {&p.q, &p.k, &p.v};
    for (size_t i = 0; i < 3; ++i) {
      Map& map = maps[i];
      *projections[i] = {map.weight.view.data, s.biases ? map.bias.view.data : nullptr,
                         map.out.view.data};
    }
    MlstmStepInputsParams::Gate* const rows[] = {&p.igate, &p.fgate};
    for (size_t i = 0; i < 2; ++i)
      *rows[i] = {gates[i].weight.view.data, gates[i].bias.view.data, gates[i].out.view.data};
    const xlstm::cuda::DeviceLimits device;
    expect(mlstm_step_inputs_supported(s.channels, s.size, s.heads, s.dtype, device), "supported");
    expect(mlstm_step_inputs_aligned(p.x, p.x_batch, s.dtype), "x is aligned");
    launch_mlstm_step_inputs(p, nullptr);
    for (int64_t b = 0; b < s.batch; ++b) check_row(b);
  }

  void check() const {
    for (const Results* each : {&of_a, &of_window, &of_q, &of_k, &of_v, &of_gates})
      compare(each->name, each->got, each->wanted, each == &of_window ? 0 : tolerance(s.dtype));
    for (const StridedTensor* each : {&x, &a, &window, &conv_weight, &conv_bias})
      each->expect_gaps_untouched("a tensor of the layer");
    for (const Map& map : maps)
      for (const StridedTensor* each : {&map.weight, &map.bias, &map.out})
        each->expect_gaps_untouched("a projection");
    for (const Gate& gate : gates)
      for (const StridedTensor* each : {&gate.weight, &gate.bias, &gate.out})
        each->expect_gaps_untouched("a gate");
  }

 private:
  struct Results {
    const char* name;
    Numbers got, wanted;
    void add(double x, double y) { got.push_back(x), wanted.push_back(y); }
  };

  void check_row(int64_t b) {
    const int64_t memory = s.width - 1;
    for (int64_t c = 0; c < s.channels; ++c) {
      const auto seen = [&](int64_t j) {  // oldest first, the token itself last
        return j < memory ? before[static_cast<size_t>(b * memory + j)][static_cast<size_t>(c)]
                          : x.get(b, 0, 0, c);
      };
      double sum = s.biases ? conv_bias.get(0, 0, 0, c) : 0;
      for (int64_t j = 0; j < s.width; ++j) sum += conv_weight.get(0, c, 0, j) * seen(j);
      of_a.add(a.get(0, b, 0, c), sum * sigmoid(sum));
      for (int64_t j = 0; j < memory; ++j) of_window.add(window.get(b, j, 0, c), seen(j + 1));
    }
    Numbers qkv;
    Results* const results[] = {&of_q, &of_k, &of_v};
    for (size_t i = 0; i < 3; ++i) {
      const Map& map = maps[i];
      for (int64_t c = 0; c < s.channels; ++c) {
        const int64_t block = c / s.size;
        double sum = s.biases ? map.bias.get(0, 0, 0, c) : 0;
        for (int64_t k = 0; k < s.size; ++k) {
          const int64_t from = block * s.size + k;
          sum += map.weight.get(0, block, c % s.size, k) *
                 (i < 2 ? a.get(0, b, 0, from) : x.get(b, 0, 0, from));
        }
        qkv.push_back(map.out.get(0, b, 0, c));
        results[i]->add(qkv.back(), sum);
      }
    }
    for (const Gate& gate : gates) {
      for (int64_t head = 0; head < s.heads; ++head) {
        double sum = gate.bias.get(0, 0, 0, head);
        for (int64_t c = 0; c < 3 * s.channels; ++c)
          sum += gate.weight.get(0, head, 0, c) * qkv[static_cast<size_t>(c)];
        of_gates.add(gate.out.get(0, b, 0, head), sum);
      }
    }
  }

  const Setting& s;
  StridedTensor x, a, window, conv_weight, conv_bias;
  Map maps[3];
  Gate gates[2];
  std::mt19937 random;
  std::vector<Numbers> before;  ///< the window's rows
  Results of_a{"a", {}, {}}, of_window{"window", {}, {}}, of_q{"q", {}, {}}, of_k{"k", {}, {}},
      of_v{"v", {}, {}}, of_gates{"gates", {}, {}};
};

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Layer layer(s, seed);
    for (int64_t token = 0; token < s.tokens; ++token) layer.step();
    layer.check();
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + std::string(", B ") + std::to_string(s.batch) + " C " +
                   std::to_string(s.channels) + " W " + std::to_string(s.width) + " S " +
                   std::to_string(s.size) + " NH " + std::to_string(s.heads) + " dtype " +
                   std::to_string(static_cast<int>(s.dtype)) + " biases " +
                   std::to_string(s.biases) + " order " +
                   std::to_string(static_cast<int>(s.order)));
  }
}

bool thread_build() { return simt::build_kind() == simt::Build::kThread; }

void blocks(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    for (const int64_t size : {2, 4, 8})
      for (const int64_t batch : {1, 3})
        run({.batch = batch,
             .channels = 40,
             .size = size,
             .tokens = 2,
             .dtype = dtype,
             .biases = batch == 1},
            seed);
}

void widths(uint64_t seed) {
  for (int64_t width = 2; width <= 8; width += thread_build() ? 3 : 1)
    for (const Dtype dtype : kDtypes)
      run({.batch = 3,
           .channels = 24,
           .width = width,
           .size = width % 2 == 0 ? 4 : 8,
           .tokens = 3,
           .dtype = dtype,
           .biases = width != 5,
           .order = width % 3 == 0 ? Order::kDense : Order::kAligned},
          seed);
}

/// From one head, whose columns all warps share, to more than there are warps.
void heads(uint64_t seed) {
  for (const int64_t count : {1, 3, 4, 7, 16, 19})
    for (const Dtype dtype : kDtypes)
      if (!thread_build() || dtype == Dtype::kBFloat16)
        run({.batch = 2, .channels = 48, .heads = count, .dtype = dtype}, seed);
}

/// Fewer channels than threads or warps have; more, not in whole rounds; columns of several loads.
void channels(uint64_t seed) {
  for (const Dtype dtype : kDtypes) {
    run({.channels = 8, .heads = 2, .dtype = dtype}, seed);
    if (thread_build()) continue;  // slow there, and no other barriers
    run({.channels = 2056, .size = 2, .heads = 1, .tokens = 2, .dtype = dtype}, seed);
    run({.batch = 3, .channels = 2104, .size = 4, .heads = 7, .dtype = dtype}, seed);
    run({.channels = 2072, .width = 7, .size = 8, .heads = 17, .dtype = dtype}, seed);
  }
}

void not_supported(uint64_t) {
  const xlstm::cuda::DeviceLimits device;
  const auto taken = [&](int64_t count, int64_t size, Dtype dtype) {
    return xlstm::cuda::mlstm_step_inputs_supported(count, size, 4, dtype, device);
  };
  expect(taken(64, 4, Dtype::kBFloat16), "taken");
  expect(!taken(64, 16, Dtype::kBFloat16), "blocks of 16");
  expect(!taken(63, 3, Dtype::kBFloat16), "blocks of 3");
  expect(!taken(20, 4, Dtype::kBFloat16) && taken(20, 4, Dtype::kFloat32), "40 and 80 bytes");
  expect(!taken(1 << 15, 4, Dtype::kBFloat16) && taken(1 << 14, 4, Dtype::kBFloat16) &&
             !taken(1 << 14, 4, Dtype::kFloat32),
         "more than shared memory holds");
}

}  // namespace

List<Case> mlstm_step_inputs_cases() {
  static const Case cases[] = {
      {"mlstm step inputs: blocks", blocks},
      {"mlstm step inputs: widths", widths},
      {"mlstm step inputs: heads", heads},
      {"mlstm step inputs: channels", channels},
      {"mlstm step inputs: not supported", not_supported},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
