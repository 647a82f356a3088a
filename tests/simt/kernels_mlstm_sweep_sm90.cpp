// The sm_90a sweep: all four uses against the recurrence in float64.
#include "cuda/mlstm/hopper/mlstm_launch_sm90.h"
#include "tests/simt/mlstm_sweep_run.h"

namespace simt_test {
namespace sweep_sm90 {
namespace {

using namespace xlstm::cuda;
using sweep::Order;
using sweep::Setting;

int tile_columns(int, int columns, Dtype, const DeviceLimits&) {
  return sweep_sm90_tile_columns(columns);
}
const sweep::Kernels kKernels = {launch_sweep_sm90, sweep_sm90_covers, tile_columns};

void run(Setting s, uint64_t seed) {
  s.device = sweep::kHopper;
  s.chunk = kSweepSm90Length;
  sweep::run(kKernels, s, seed);
}

void lengths(uint64_t seed) {
  for (const int64_t time : {1, 17, 127, 128, 129, 200, 300}) {
    const int64_t batch = time < 64 ? 4 : 1;  // an error is relative to enough numbers
    run({.name = "length", .time = time, .dqk = 64, .dv = 64, .batch = batch}, seed);
    run({.name = "length, states",
         .time = time,
         .dqk = 128,
         .dv = 128,
         .batch = batch,
         .states = true},
        seed);
  }
}

void gates(uint64_t seed) {
  for (const bool sigmoid : {false, true})
    for (const bool normalize : {false, true})
      run({.name = "gates",
           .time = 200,
           .dqk = 64,
           .dv = 128,
           .sigmoid = sigmoid,
           .normalize = normalize,
           .states = true},
          seed);
  // exp(-m) is no floor any more, so that q . n must keep away from zero.
  run({.name = "large input gate",
       .time = 200,
       .dqk = 64,
       .dv = 64,
       .input = 60,
       .spread = 25,
       .key_mean = 2},
      seed);
}

void sequences(uint64_t seed) {
  run({.name = "packed",
       .time = 460,
       .dqk = 64,
       .dv = 64,
       .heads = 2,
       .segments = 2,
       .states = true,
       .resets = true,
       .packed = {0, 1, 1, 130, 258, 400}},
      seed);
  run({.name = "segments",
       .time = 600,
       .dqk = 128,
       .dv = 64,
       .batch = 2,
       .segments = 3,
       .states = true,
       .resets = true},
      seed);
}

void widths(uint64_t seed) {
  run({.name = "widths", .time = 150, .dqk = 80, .dv = 112, .heads = 2, .states = true}, seed);
  run({.name = "widths, order",
       .time = 150,
       .dqk = 64,
       .dv = 24,
       .batch = 2,
       .heads = 2,
       .states = true,
       .order = Order::kAligned},
      seed);
  run({.name = "two column tiles", .time = 300, .dqk = 128, .dv = 256, .states = true}, seed);
}

/// All four kernels of every use. Every barrier counts in these: both rings go round, one consumer has the state or both,
/// resets, tails of packed sequences with NaN behind them.
void few(uint64_t seed) {
  run({.name = "few", .time = 520, .dqk = 64, .dv = 64, .states = true, .resets = true}, seed);
  run({.name = "few, packed", .time = 460, .dqk = 128, .dv = 128, .packed = {0, 70, 430}}, seed);
  run({.name = "few, wide", .time = 300, .dqk = 64, .dv = 128}, seed);
  run({.name = "few, deep", .time = 300, .dqk = 128, .dv = 64}, seed);
}

}  // namespace
}  // namespace sweep_sm90

List<Case> mlstm_sweep_sm90_cases() {
  static const Case cases[] = {
      {"sm90 sweep: few shapes", sweep_sm90::few},
      {"sm90 sweep: lengths", sweep_sm90::lengths},
      {"sm90 sweep: gates", sweep_sm90::gates},
      {"sm90 sweep: widths", sweep_sm90::widths},
      {"sm90 sweep: sequences", sweep_sm90::sequences},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
