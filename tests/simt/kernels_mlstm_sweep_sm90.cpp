// The sm_90a sweeps: all uses against the recurrence in float64.
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
bool covers(Use, int contraction, Dtype dtype, const DeviceLimits& device) {
  return sweep_sm90_covers(contraction, dtype, device);
}
const sweep::Kernels kKernels = {launch_sweep_sm90, covers, tile_columns};

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

// The wide sweep: dq and dk for values of up to 256 columns.
int wide_tile_columns(int, int, Dtype, const DeviceLimits&) { return kSweepSm90WideColumns; }
bool wide_covers(Use use, int contraction, Dtype dtype, const DeviceLimits& device) {
  return (use == Use::kDq || use == Use::kDk) && sweep_sm90_wide_covers(contraction, dtype, device);
}
const sweep::Kernels kWideKernels = {launch_sweep_sm90, wide_covers, wide_tile_columns};

void run_wide(Setting s, uint64_t seed) {
  s.device = sweep::kHopper;
  s.chunk = kSweepSm90WideLength;
  sweep::run(kWideKernels, s, seed);
}

/// Every barrier counts in these: all rings go round, resets, tails of packed sequences with NaN behind them.
void wide_few(uint64_t seed) {
  run_wide(
      {.name = "wide, few", .time = 330, .dqk = 128, .dv = 256, .states = true, .resets = true},
      seed);
  run_wide({.name = "wide, packed", .time = 260, .dqk = 64, .dv = 192, .packed = {0, 70, 230}},
           seed);
}

void wide_lengths(uint64_t seed) {
  for (const int64_t time : {1, 17, 63, 64, 65, 127, 200})
    run_wide({.name = "wide, length",
              .time = time,
              .dqk = 64,
              .dv = 256,
              .batch = time < 63 ? 4 : 1,
              .states = time % 2 == 0},
             seed);
}

void wide_gates(uint64_t seed) {
  for (const bool sigmoid : {false, true})
    for (const bool normalize : {false, true})
      run_wide({.name = "wide, gates",
                .time = 200,
                .dqk = 64,
                .dv = 256,
                .sigmoid = sigmoid,
                .normalize = normalize,
                .states = true},
               seed);
}

/// One consumer without columns, odd widths, three blocks side by side, strided operands.
void wide_widths(uint64_t seed) {
  run_wide(
      {.name = "wide, one tile", .time = 150, .dqk = 48, .dv = 136, .heads = 2, .states = true},
      seed);
  run_wide({.name = "wide, three tiles", .time = 150, .dqk = 168, .dv = 200, .states = true}, seed);
  run_wide({.name = "wide, five tiles, order",
            .time = 150,
            .dqk = 296,
            .dv = 256,
            .batch = 2,
            .heads = 2,
            .order = Order::kAligned},
           seed);
  run_wide({.name = "wide, small heads", .time = 150, .dqk = 16, .dv = 16, .states = true}, seed);
}

void wide_sequences(uint64_t seed) {
  run_wide({.name = "wide, packed",
            .time = 460,
            .dqk = 64,
            .dv = 136,
            .heads = 2,
            .segments = 2,
            .states = true,
            .resets = true,
            .packed = {0, 1, 1, 130, 258, 400}},
           seed);
  run_wide({.name = "wide, segments",
            .time = 600,
            .dqk = 128,
            .dv = 192,
            .batch = 2,
            .segments = 3,
            .states = true,
            .resets = true},
           seed);
}

}  // namespace
}  // namespace sweep_sm90

List<Case> mlstm_sweep_sm90_cases() {
  static const Case cases[] = {
      {"sm90 sweep: few shapes", sweep_sm90::few},
      {"sm90 wide sweep: few shapes", sweep_sm90::wide_few},
      {"sm90 sweep: lengths", sweep_sm90::lengths},
      {"sm90 sweep: gates", sweep_sm90::gates},
      {"sm90 sweep: widths", sweep_sm90::widths},
      {"sm90 sweep: sequences", sweep_sm90::sequences},
      {"sm90 wide sweep: lengths", sweep_sm90::wide_lengths},
      {"sm90 wide sweep: gates", sweep_sm90::wide_gates},
      {"sm90 wide sweep: widths", sweep_sm90::wide_widths},
      {"sm90 wide sweep: sequences", sweep_sm90::wide_sequences},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 2 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
