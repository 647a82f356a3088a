// The sweep kernels alone: all four uses against the recurrence in float64.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_sweep_config.h"
#include "tests/simt/mlstm_sweep_run.h"

namespace simt_test {
namespace sweep {
namespace {

bool covers(Use, int contraction, Dtype dtype, const DeviceLimits& device) {
  return sweep_covers(contraction, dtype, device);
}
const Kernels kKernels = {launch_sweep, covers, sweep_tile_columns};
void run(const Setting& s, uint64_t seed) { run(kKernels, s, seed); }

constexpr Dtype kBf16 = Dtype::kBFloat16, kF32 = Dtype::kFloat32, kF16 = Dtype::kFloat16;

/// A shape with every dtype; float32 and float16 take the kernels with two planes.
void run_dtypes(Setting s, uint64_t seed) {
  for (const Dtype dtype : {kBf16, kF32, kF16}) {
    s.dtype = dtype;
    run(s, seed);
  }
}

void lengths(uint64_t seed) {
  for (const int64_t time : {1, 17, 63, 64, 65, 127, 200}) {
    const int64_t batch = time < 64 ? 4 : 1;  // an error is relative to enough numbers
    run_dtypes({.name = "length", .time = time, .dqk = 16, .dv = 16, .batch = batch, .heads = 2},
               seed);
    run_dtypes({.name = "length, states",
                .time = time,
                .dqk = 24,
                .dv = 40,
                .batch = batch,
                .heads = 2,
                .states = true},
               seed);
  }
}

void gates(uint64_t seed) {
  for (const bool sigmoid : {false, true})
    for (const bool normalize : {false, true})
      run_dtypes({.name = "gates",
                  .time = 127,
                  .dqk = 24,
                  .dv = 40,
                  .sigmoid = sigmoid,
                  .normalize = normalize,
                  .states = true},
                 seed);
  struct Extreme {
    const char* name;
    double input, forget, spread;
  };
  const Extreme extremes[] = {{"large input gate", 60, 3, 25},
                              {"closed forget gate", -1, -60, 25},
                              {"both closed", -90, -30, 1},
                              {"both open", 120, 40, 1}};
  // exp(-m) is no floor any more, so that q . n must keep away from zero.
  for (const Extreme& x : extremes)
    run_dtypes({.name = x.name,
                .time = 130,
                .dqk = 16,
                .dv = 16,
                .input = x.input,
                .forget = x.forget,
                .spread = x.spread,
                .key_mean = 2},
               seed);
}

void resets(uint64_t seed) {
  for (const bool sigmoid : {false, true})
    run_dtypes({.name = "resets",
                .time = 200,
                .dqk = 24,
                .dv = 40,
                .sigmoid = sigmoid,
                .states = true,
                .resets = true},
               seed);
}

void sequences(uint64_t seed) {
  run_dtypes({.name = "packed",
              .time = 230,
              .dqk = 16,
              .dv = 24,
              .heads = 2,
              .segments = 2,
              .states = true,
              .resets = true,
              .packed = {0, 1, 1, 66, 130, 230}},
             seed);
  for (const int32_t segments : {2, 3, 7})
    run_dtypes({.name = "segments",
                .time = 300,
                .dqk = 16,
                .dv = 40,
                .batch = 2,
                .heads = 2,
                .segments = segments,
                .states = segments != 2},
               seed);
}

void orders(uint64_t seed) {
  for (const Order order : {Order::kAligned, Order::kUnaligned, Order::kInner})
    run_dtypes({.name = "order",
                .time = 100,
                .dqk = 24,
                .dv = 44,
                .batch = 2,
                .heads = 2,
                .states = true,
                .order = order},
               seed);
}

/// Which of kSweepTiles have been run, by h and dv and by dq and dk.
class Tiles {
 public:
  void add(const Setting& s) {
    const auto dqk = static_cast<int>(s.dqk), dv = static_cast<int>(s.dv);
    add(dqk, dv, s, 0);
    add(dv, dqk, s, 1);
  }
  void expect_all() const {
    for (size_t i = 0; i < kCount; ++i)
      for (const auto& uses : seen_) expect(uses[i], "tile that was not run", static_cast<long>(i));
  }

 private:
  static constexpr size_t kCount = sizeof(kSweepTiles) / sizeof(kSweepTiles[0]);
  void add(int contraction, int width, const Setting& s, int uses) {
    if (!sweep_covers(contraction, s.dtype, s.device)) return;
    const int columns = sweep_tile_columns(contraction, width, s.dtype, s.device);
    const int numbers = sweep_anchor_numbers(contraction, width, s.dtype, s.device);
    for (size_t i = 0; i < kCount; ++i) {
      const SweepTile& tile = kSweepTiles[i];
      if (tile.planes == (s.dtype == kBf16 ? 1 : 2) && tile.columns == columns &&
          sweep_anchor_numbers(tile) == numbers)
        seen_[uses][i] = true;
    }
  }
  bool seen_[2][kCount] = {};
};

/// Every tile in every use, with one stage and with two. Two stages of the largest fit a Hopper alone.
void widths(uint64_t seed) {
  Tiles tiles;
  const auto heads = [&](int64_t dqk, int64_t dv, const DeviceLimits& device, Dtype dtype) {
    const Setting s = {.name = "width",
                       .time = 130,
                       .dqk = dqk,
                       .dv = dv,
                       .dtype = dtype,
                       .states = true,
                       .device = device};
    run(s, seed);
    tiles.add(s);
  };
  for (const Dtype dtype : {kBf16, kF32}) {
    for (const DeviceLimits& device : {kSmall, kAmpere}) {
      heads(64, 64, device, dtype);
      heads(80, 40, device, dtype);
      heads(40, 128, device, dtype);
      heads(80, 128, device, dtype);
    }
    heads(20, 200, kAmpere, dtype);
  }
  heads(128, 256, kAmpere, kBf16);
  heads(128, 256, kHopper, kBf16);
  heads(256, 128, kHopper, kBf16);
  tiles.expect_all();
}

/// Every barrier counts in these: one and two stages, asynchronous and plain loads, several chunks and column tiles.
void few(uint64_t seed) {
  Setting s = {
      .name = "two stages", .time = 200, .dqk = 16, .dv = 16, .states = true, .resets = true};
  run(s, seed);
  s.name = "one stage", s.device = kTiny;
  run(s, seed);
  s.name = "plain loads", s.device = kAmpere, s.order = Order::kUnaligned;
  run(s, seed);
  s.name = "two planes", s.dtype = kF32;
  run(s, seed);
  s.name = "column tiles", s.order = Order::kDense, s.dqk = 80, s.dtype = kBf16;
  run(s, seed);
}

}  // namespace
}  // namespace sweep

List<Case> mlstm_sweep_cases() {
  static const Case cases[] = {
      {"sweep: few shapes", sweep::few},  {"sweep: widths", sweep::widths},
      {"sweep: gates", sweep::gates},     {"sweep: resets", sweep::resets},
      {"sweep: orders", sweep::orders},   {"sweep: sequences", sweep::sequences},
      {"sweep: lengths", sweep::lengths},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 2 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
