// The state and out kernels of the mLSTM alone: all four uses against the recurrence in float64.
#include "tests/simt/mlstm_twophase_run.h"

namespace simt_test {
namespace twophase {
namespace {

using sweep::kAmpere;  // two stages
using sweep::kHopper;  // three with one plane, two with two
using sweep::kSmall;   // likewise
using sweep::Order;

void run_dtypes(Setting s, uint64_t seed) {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
    s.dtype = dtype;
    run(s, seed);
  }
}

/// float16 takes the kernels of float32 and rounds its results.
void run_float16(Setting s, uint64_t seed) {
  s.dtype = Dtype::kFloat16;
  run(s, seed);
}

/// Every barrier and wait counts in these: several chunks, row blocks, key passes and slices, async and plain loads.
void few(uint64_t seed) {
  Setting s = {.name = "few", .time = 330, .dqk = 80, .dv = 72, .states = true, .chunk = 256};
  run(s, seed);  // two stages
  s.device = kSmall;
  run(s, seed);  // three
  s.time = 140, s.chunk = 64;
  run(s, seed);
  s.order = Order::kUnaligned;
  run(s, seed);
  s.dtype = Dtype::kFloat32;
  run(s, seed);
}

void lengths(uint64_t seed) {
  for (const int32_t chunk : {64, 128, 256}) {
    for (const int64_t time : {1, 17, 63, 64, 65, 127, 200}) {
      if (time <= chunk / 2 && chunk > 64) continue;  // as with the shorter chunk
      run_dtypes({.name = "length",
                  .time = time,
                  .dqk = 24,
                  .dv = 40,
                  .batch = 2,
                  .heads = time < 64 ? 2 : 1,  // an error is relative to enough numbers
                  .states = time % 2 == 0,
                  .device = chunk == 128 ? kSmall : kAmpere,
                  .chunk = chunk},
                 seed);
    }
  }
}

/// The large heads in one schedule.
void heads(uint64_t seed) {
  run_dtypes(
      {.name = "16", .time = 70, .dqk = 16, .dv = 16, .batch = 2, .heads = 2, .states = true},
      seed);
  run_dtypes({.name = "64, 128", .time = 150, .dqk = 64, .dv = 128, .heads = 2, .chunk = 128},
             seed);
  if (seed != 1) return;
  run_dtypes({.name = "384", .time = 67, .dqk = 384, .dv = 384, .device = kHopper}, seed);
  run_dtypes({.name = "512, 256", .time = 40, .dqk = 512, .dv = 256, .states = true}, seed);
  run_dtypes({.name = "1280", .time = 3, .dqk = 1280, .dv = 1280, .device = kSmall}, seed);
}

void orders(uint64_t seed) {
  for (const Order order : {Order::kDense, Order::kUnaligned, Order::kInner})
    run_dtypes({.name = "order",
                .time = 70,
                .dqk = 40,
                .dv = 136,
                .batch = 2,
                .heads = 2,
                .order = order,
                .chunk = 128},
               seed);
  const Setting odd = {.name = "odd", .time = 100, .dqk = 37, .dv = 131, .heads = 2};
  run_dtypes(odd, seed);
  run_float16(odd, seed);
}

void gates(uint64_t seed) {
  for (const bool sigmoid : {false, true})
    for (const bool normalize : {false, true})
      run_dtypes({.name = "gates",
                  .time = 140,
                  .dqk = 24,
                  .dv = 40,
                  .sigmoid = sigmoid,
                  .normalize = normalize,
                  .states = true,
                  .chunk = 128},
                 seed);
  struct Gates {
    const char* name;
    double input, forget, spread;
  };
  // exp(-m) is no floor any more, so that q . n must keep away from zero.
  for (const Gates& g :
       {Gates{"extreme gates", -1, 0, 30}, Gates{"closed forget gates", -1, -300, 1},
        Gates{"large input gates", 500, 5, 1}})
    run_dtypes({.name = g.name,
                .time = 140,
                .dqk = 24,
                .dv = 40,
                .states = true,
                .input = g.input,
                .forget = g.forget,
                .spread = g.spread,
                .key_mean = 0.5,
                .chunk = 128},
               seed);
}

void resets(uint64_t seed) {
  for (const int32_t chunk : {64, 256})
    run_dtypes({.name = "resets", .time = 300, .dqk = 24, .dv = 40, .resets = true, .chunk = chunk},
               seed);
}

void sequences(uint64_t seed) {
  Setting s = {.name = "packed",
               .time = 331,
               .dqk = 24,
               .dv = 40,
               .heads = 2,
               .states = true,
               .packed = {0, 0, 1, 60, 60, 190, 331, 331}};
  run_dtypes(s, seed);
  s.chunk = 128, s.segments = 2, s.name = "packed, segments";
  run_dtypes(s, seed);
  s.packed = {}, s.chunk = 64, s.segments = 3, s.name = "segments", s.resets = true;
  run_dtypes(s, seed);
  run_float16(s, seed);
  s.segments = 9, s.name = "empty segments";
  run_dtypes(s, seed);
}

}  // namespace
}  // namespace twophase

List<Case> mlstm_twophase_cases() {
  static const Case cases[] = {
      {"two-phase: few shapes", twophase::few},      {"two-phase: lengths", twophase::lengths},
      {"two-phase: heads", twophase::heads},         {"two-phase: orders", twophase::orders},
      {"two-phase: gates", twophase::gates},         {"two-phase: resets", twophase::resets},
      {"two-phase: sequences", twophase::sequences},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
