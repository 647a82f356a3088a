// The causal convolution's kernels, forward, backward and step, against plain float64 loops over what each token sees.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/causal_conv1d/causal_conv1d_launch.h"
#include "tests/simt/kernels_support.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using xlstm::cuda::ConvBackwardParams;
using xlstm::cuda::ConvForwardParams;
using xlstm::cuda::ConvInputs;
using xlstm::cuda::ConvParameters;
using xlstm::cuda::ConvStepParams;
using xlstm::cuda::ConvView;
using xlstm::cuda::Dtype;

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

struct Setting {
  int64_t batch = 2, time = 7, channels = 5, width = 4;
  Dtype dtype = Dtype::kFloat32, parameter_dtype = Dtype::kFloat32;
  bool silu = true, bias = true, states = true;
  bool dy = true, dstate = true;
  Order order = Order::kDense;
  std::vector<int64_t> resets = {};
  std::vector<int32_t> packed = {};
  bool nan_first = false;  ///< the first sequence is NaN: no other may change
};

ConvView view_of(const StridedTensor& x) {
  return {x.view.data, x.view.batch, x.view.time, x.view.inner};
}

double tolerance(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? 4e-3 : dtype == Dtype::kFloat16 ? 6e-4 : 3e-6;
}

class Conv {
 public:
  Conv(const Setting& setting, uint64_t seed)
      : s(setting),
        cut{.batch = s.batch, .time = s.time, .packed = s.packed},
        memory(s.width - 1),
        x(s.batch, s.time, 1, s.channels, s.dtype, s.order),
        y(s.batch, s.time, 1, s.channels, s.dtype, s.order),
        dy(s.batch, s.time, 1, s.channels, s.dtype, s.order),
        dx(s.batch, s.time, 1, s.channels, s.dtype, s.order),
        state0(cut.sequences(), memory, 1, s.channels, s.dtype, s.order),
        state(cut.sequences(), memory, 1, s.channels, s.dtype, s.order),
        dstate(cut.sequences(), memory, 1, s.channels, s.dtype, s.order),
        dstate0(cut.sequences(), memory, 1, s.channels, s.dtype, s.order),
        weight(1, s.channels, 1, s.width, s.parameter_dtype, s.order),
        bias(1, s.channels, 1, 1, s.parameter_dtype),
        dweight(1, s.channels, 1, s.width, s.parameter_dtype),
        dbias(1, s.channels, 1, 1, s.parameter_dtype),
        resets(cut, s.resets) {
    std::mt19937 random(static_cast<unsigned>(100 * seed + s.channels + s.width));
    for (StridedTensor* each : {&x, &dy, &state0, &dstate, &weight, &bias})
      each->fill(random, 0.2, 1);
    if (!s.nan_first) return;
    for (int64_t t = 0; t < cut.tokens(0); ++t)
      x.set(0, cut.begin(0) + t, 0, 0, NAN), dy.set(0, cut.begin(0) + t, 0, 0, NAN);
  }

  ConvInputs inputs() const {
    ConvInputs in;
    in.dtype = s.dtype;
    in.batch = static_cast<int32_t>(s.batch), in.time = static_cast<int32_t>(s.time);
    in.parameters = parameters();
    in.x = view_of(x);
    if (s.states) in.state0 = view_of(state0);
    if (!s.resets.empty()) resets.give_to(in);
    in.cu_seqlens = s.packed.empty() ? nullptr : s.packed.data();
    in.num_sequences = static_cast<int32_t>(cut.sequences());
    return in;
  }
  ConvParameters parameters() const {
    ConvParameters p;
    p.channels = static_cast<int32_t>(s.channels), p.width = static_cast<int32_t>(s.width);
    p.silu = s.silu;
    p.weight = weight.view.data, p.weight_dtype = p.bias_dtype = s.parameter_dtype;
    p.weight_channel = weight.view.time, p.weight_tap = weight.view.inner;
    if (s.bias) p.bias = bias.view.data, p.bias_channel = bias.view.time;
    return p;
  }

  void launch() {
    ConvForwardParams forward;
    forward.in = inputs();
    forward.y = view_of(y), forward.state = view_of(state);
    causal_conv1d_forward(forward, nullptr);
    ConvBackwardParams backward;
    backward.in = inputs();
    if (s.dy) backward.dy = view_of(dy);
    if (s.dstate) backward.dstate = view_of(dstate);
    backward.dx = view_of(dx);
    if (s.states) backward.dstate0 = view_of(dstate0);
    backward.dweight = dweight.view.data;
    if (s.bias) backward.dbias = dbias.view.data;
    GuardedFloats partials(causal_conv1d_partials(backward.in));
    backward.partials = partials.data();
    causal_conv1d_backward(backward, nullptr);
    partials.expect_guards_untouched("partials");
  }

  void check() {
    wanted_dweight.assign(static_cast<size_t>(s.channels * s.width), 0);
    wanted_dbias.assign(static_cast<size_t>(s.channels), 0);
    for (int64_t n = 0; n < cut.sequences(); ++n)
      for (int64_t c = 0; c < s.channels; ++c)
        if (!s.nan_first || n > 0) check_channel(n, c);
    const double usual = tolerance(s.dtype), sums = tolerance(s.parameter_dtype);
    compare("y", got_y, wanted_y, usual);
    compare("state", got_state, wanted_state, 0);
    compare("dx", got_dx, wanted_dx, usual);
    if (s.states) compare("dstate0", got_dstate0, wanted_dstate0, usual);
    if (!s.nan_first) {
      compare("dweight", dweight.all(), wanted_dweight, sums);
      if (s.bias) compare("dbias", dbias.all(), wanted_dbias, sums);
    }
    for (const StridedTensor* each :
         {&x, &y, &dy, &dx, &state0, &state, &dstate, &dstate0, &weight, &bias, &dweight, &dbias})
      each->expect_gaps_untouched("a tensor of the convolution");
  }

 private:
  /// Whether a token of sequence n, or the final state after its last one, still has the input at `position`.
  bool seen(int64_t n, int64_t position, int64_t token) const {
    if (position < -memory || (position < 0 && !s.states)) return false;
    for (int64_t t = std::max<int64_t>(position + 1, 0); t <= token; ++t)
      if (resets(n, t)) return false;
    return true;
  }

  void check_channel(int64_t n, int64_t c) {
    const int64_t b = cut.row(n), begin = cut.begin(n), length = cut.tokens(n);
    const auto input = [&](int64_t position) {
      return position >= 0 ? x.get(b, begin + position, 0, c)
                           : state0.get(n, memory + position, 0, c);
    };
    Numbers gradient(static_cast<size_t>(memory + length));  // of the inputs from -memory on
    const double offset = s.bias ? bias.get(0, c, 0) : 0;
    for (int64_t t = 0; t < length; ++t) {
      double a = offset;
      for (int64_t j = 0; j < s.width; ++j)
        if (seen(n, t - j, t)) a += weight.get(0, c, 0, memory - j) * input(t - j);
      got_y.push_back(y.get(b, begin + t, 0, c));
      wanted_y.push_back(s.silu ? a * sigmoid(a) : a);
      const double slope = s.silu ? sigmoid(a) * (1 + a * sigmoid(-a)) : 1.0;
      const double d = s.dy ? slope * dy.get(b, begin + t, 0, c) : 0.0;
      wanted_dbias[static_cast<size_t>(c)] += d;
      for (int64_t j = 0; j < s.width; ++j) {
        if (!seen(n, t - j, t)) continue;
        gradient[static_cast<size_t>(memory + t - j)] += d * weight.get(0, c, 0, memory - j);
        wanted_dweight[static_cast<size_t>(c * s.width + memory - j)] += d * input(t - j);
      }
    }
    for (int64_t k = 0; k < memory; ++k) {
      const int64_t position = length - memory + k;
      const bool kept = seen(n, position, length - 1);
      got_state.push_back(state.get(n, k, 0, c));
      wanted_state.push_back(kept ? input(position) : 0);
      if (kept && s.dstate)
        gradient[static_cast<size_t>(memory + position)] += dstate.get(n, k, 0, c);
    }
    for (int64_t t = 0; t < length; ++t) {
      got_dx.push_back(dx.get(b, begin + t, 0, c));
      wanted_dx.push_back(gradient[static_cast<size_t>(memory + t)]);
    }
    for (int64_t k = 0; s.states && k < memory; ++k) {
      got_dstate0.push_back(dstate0.get(n, k, 0, c));
      wanted_dstate0.push_back(gradient[static_cast<size_t>(k)]);
    }
  }

  const Setting& s;
  Cut cut;
  int64_t memory;
  StridedTensor x, y, dy, dx, state0, state, dstate, dstate0, weight, bias, dweight, dbias;
  Resets resets;
  Numbers got_y, wanted_y, got_state, wanted_state, got_dx, wanted_dx, got_dstate0, wanted_dstate0,
      wanted_dweight, wanted_dbias;
};

std::string text_of(const Setting& s) {
  return ", B " + std::to_string(s.batch) + " T " + std::to_string(s.time) + " C " +
         std::to_string(s.channels) + " W " + std::to_string(s.width) + " dtype " +
         std::to_string(static_cast<int>(s.dtype)) + " order " +
         std::to_string(static_cast<int>(s.order)) + " resets " + std::to_string(s.resets.size()) +
         " packed " + std::to_string(s.packed.size());
}

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  try {
    Conv conv(s, seed);
    conv.launch();
    conv.check();
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + text_of(s));
  }
}

bool plain() { return simt::build_kind() == simt::Build::kPlain; }
bool thread_build() { return simt::build_kind() == simt::Build::kThread; }

void sizes(uint64_t seed) {
  for (int64_t width = 2; width <= 8; ++width)
    for (const int64_t time : {1, 2, 7, 64, 70})
      if (!thread_build() || (time >= 64 && width % 3 == 1))  // slow there, and no other barriers
        run({.time = time,
             .channels = 3,
             .width = width,
             .silu = width % 2 == 0,
             .bias = time != 7,
             .states = time != 64},
            seed);
  for (const Dtype dtype : kDtypes) {
    for (const int64_t channels : {1, 8, 33, 128, 257, 300}) {
      run({.batch = 1, .time = 20, .channels = channels, .dtype = dtype}, seed);
      if (plain())
        run({.batch = 1, .time = 9, .channels = channels, .width = 7, .dtype = dtype}, seed);
    }
    run({.time = plain() ? 200 : 70, .channels = 16, .dtype = dtype}, seed);
    run({.time = 70, .channels = 24, .width = 8, .dtype = dtype, .parameter_dtype = dtype}, seed);
  }
  run({.time = 0, .channels = 3}, seed);
}

void strides(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    for (const Order order : {Order::kAligned, Order::kUnaligned, Order::kInner})
      for (const int64_t width : {4, 6})
        if (!thread_build() || (width == 4) == (dtype == Dtype::kBFloat16))
          run({.time = 37, .channels = 40, .width = width, .dtype = dtype, .order = order}, seed);
}

void absent(uint64_t seed) {
  for (int present = 0; present < 16; ++present)
    for (const int64_t time : {2, 34})
      if (!thread_build() || time == 2)
        run({.batch = 1,
             .time = time,
             .silu = time == 34,
             .bias = (present & 1) != 0,
             .states = (present & 2) != 0,
             .dy = (present & 4) != 0,
             .dstate = (present & 8) != 0},
            seed);
}

void resets(uint64_t seed) {
  for (const int64_t width : {2, 4, 8}) {
    for (const bool states : {false, true}) {
      run({.time = 70,
           .width = width,
           .states = states,
           .resets = {0, 5, 6, 31, 32, 33, 68, 69, 71}},
          seed);
      run({.time = 3, .width = width, .states = states, .resets = {1, 3}}, seed);
      run({.time = 70, .width = width, .states = states, .resets = {66, 70, 135}}, seed);
    }
  }
}

void packed(uint64_t seed) {
  const std::vector<int32_t> many = {0, 0, 1, 3, 31, 32, 32, 34, 40, 63, 70, 70};
  for (const int64_t width : {2, 4, 7}) {
    for (const bool states : {false, true}) {
      run({.batch = 1, .time = 70, .width = width, .states = states, .packed = many}, seed);
      run({.batch = 1,
           .time = 70,
           .width = width,
           .states = states,
           .resets = {0, 2, 33, 41, 69},
           .packed = many},
          seed);
    }
  }
  run({.batch = 1, .time = 0, .packed = {0, 0, 0}}, seed);
  run({.batch = 1, .time = 70, .channels = 1, .packed = {0, 33, 50, 70}, .nan_first = true}, seed);
  run({.batch = 2, .time = 40, .channels = 1, .nan_first = true}, seed);
}

/// So many tokens that strips are longer than the shortest, and end inside a tile.
void long_strips(uint64_t seed) {
  if (seed > 0 || !plain()) return;
  for (const int64_t width : {4, 7})
    run({.batch = 512, .time = 110, .channels = 1, .width = width}, seed);
}

/// Token after token: the states are those of the sequence, the outputs too.
void run_step(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  const int64_t memory = s.width - 1;
  Conv conv(s, seed);
  StridedTensor x(s.batch, s.time, 1, s.channels, s.dtype, s.order),
      y(s.batch, s.time, 1, s.channels, s.dtype, s.order),
      state(s.batch, memory, 1, s.channels, s.dtype, s.order);
  std::mt19937 random(static_cast<unsigned>(seed + 7));
  StridedTensor weight(1, s.channels, 1, s.width, s.parameter_dtype),
      bias(1, s.channels, 1, 1, s.parameter_dtype);
  for (StridedTensor* each : {&x, &state, &weight, &bias}) each->fill(random, 0.2, 1);
  std::vector<Numbers> windows;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c) {
      windows.emplace_back();
      for (int64_t k = 0; k < memory; ++k) windows.back().push_back(state.get(b, k, 0, c));
    }
  ConvStepParams p;
  p.dtype = s.dtype, p.batch = static_cast<int32_t>(s.batch);
  p.parameters = conv.parameters();
  p.parameters.weight = weight.view.data, p.parameters.weight_channel = weight.view.time;
  p.parameters.weight_tap = weight.view.inner;
  if (s.bias) p.parameters.bias = bias.view.data, p.parameters.bias_channel = bias.view.time;
  Numbers got, wanted, got_state, wanted_state;
  for (int64_t t = 0; t < s.time; ++t) {
    p.x = {x.token(t), x.view.batch, 0, x.view.inner};
    p.y = {y.token(t), y.view.batch, 0, y.view.inner};
    p.state = view_of(state);
    causal_conv1d_step(p, nullptr);
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t c = 0; c < s.channels; ++c) {
        Numbers& window = windows[static_cast<size_t>(b * s.channels + c)];
        window.push_back(x.get(b, t, 0, c));
        double a = s.bias ? bias.get(0, c, 0) : 0.0;
        for (int64_t j = 0; j < s.width; ++j)
          a += weight.get(0, c, 0, j) * window[static_cast<size_t>(j)];
        window.erase(window.begin());
        got.push_back(y.get(b, t, 0, c)), wanted.push_back(s.silu ? a * sigmoid(a) : a);
        for (int64_t k = 0; k < memory; ++k) {
          got_state.push_back(state.get(b, k, 0, c));
          wanted_state.push_back(window[static_cast<size_t>(k)]);
        }
      }
  }
  try {
    compare("y", got, wanted, tolerance(s.dtype));
    compare("state", got_state, wanted_state, 0);
    x.expect_gaps_untouched("x"), y.expect_gaps_untouched("y"),
        state.expect_gaps_untouched("state");
  } catch (const Mismatch& error) {
    throw Mismatch(error.what() + std::string(", step") + text_of(s));
  }
}

void step(uint64_t seed) {
  for (const Dtype dtype : kDtypes) {
    if (!thread_build())  // many, by 16 bytes; slow there
      run_step({.batch = 64, .time = 2, .channels = 1024, .dtype = dtype}, seed);
    for (int64_t width = 2; width <= 8; width += thread_build() ? 3 : 1)
      for (const int64_t channels : {1, 24, 300})
        run_step({.batch = 3,
                  .time = 4,
                  .channels = channels,
                  .width = width,
                  .dtype = dtype,
                  .silu = channels != 24,
                  .bias = width != 3},
                 seed);
    for (const Order order : {Order::kAligned, Order::kUnaligned, Order::kInner})
      run_step(
          {.time = 4, .channels = 40, .dtype = dtype, .parameter_dtype = dtype, .order = order},
          seed);
  }
}

}  // namespace

List<Case> causal_conv1d_cases() {
  static const Case cases[] = {
      {"causal_conv1d sizes", sizes},
      {"causal_conv1d strides", strides},
      {"causal_conv1d absent", absent},
      {"causal_conv1d resets", resets},
      {"causal_conv1d packed", packed},
      {"causal_conv1d step", step},
      {"causal_conv1d long strips", long_strips},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
