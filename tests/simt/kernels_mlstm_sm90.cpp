// The mLSTM as the operators call it with DeviceLimits::hopper: whole passes against the recurrence in float64.
#include "cuda/mlstm/mlstm_plan.h"
#include "tests/simt/mlstm_call.h"

namespace simt_test {
namespace passes {
namespace {

using xlstm::cuda::Direction;

const DeviceLimits kHopper{90, 1, 227 * 1024, true};  // never more than one segment
const DeviceLimits kManyHopper{90, 1000, 227 * 1024, true};

/// Fails where the plan is not one for the sm_90a sweep.
void run_sm90(Setting s, uint64_t seed) {
  if (s.device.compute_capability != 90) s.device = kHopper;
  const Call call(s, seed);
  for (const Direction direction : {Direction::kForward, Direction::kBackward})
    expect(plan_mlstm(call.problem, s.device, direction).sm90, "plan");
  run(s, seed);
}

void shapes(uint64_t seed) {
  run_sm90({.batch = 2, .time = 300, .heads = 2, .dqk = 64, .dv = 64, .states = true}, seed);
  if (thread_build()) return;
  for (const int64_t time : {1, 17, 128, 129})
    run_sm90({.time = time, .dqk = 16, .dv = 32, .states = true}, seed);
  run_sm90({.time = 200, .dqk = 128, .dv = 128, .resets = true}, seed);
  run_sm90({.time = 200, .dqk = 64, .dv = 128, .sigmoid = true, .states = true}, seed);
  run_sm90({.time = 200, .dqk = 128, .dv = 48, .normalize = false, .states = true}, seed);
}

/// Long enough for anchors and segments.
void long_sequences(uint64_t seed) {
  run_sm90({.time = 900, .dqk = 64, .dv = 64, .states = true, .resets = true}, seed);
  if (thread_build()) return;
  for (const int64_t dqk : {64, 128})
    run_sm90({.time = 1100, .dqk = dqk, .dv = 128, .states = true, .device = kManyHopper}, seed);
  run_sm90({.time = 1100, .dqk = 128, .dv = 64, .device = kManyHopper}, seed);
  run_sm90({.time = 900,
            .dqk = 64,
            .dv = 96,
            .states = true,
            .packed = {0, 10, 10, 800, 900},
            .device = kManyHopper},
           seed);
}

/// What the sm_90a sweep does not take goes to the kernels of sm_80: forward or backward alone, or every call of a shape.
void others(uint64_t seed) {
  const auto planned = [&](Setting s, Direction direction, bool sm90) {
    s.device = kHopper;
    const Call call(s, seed);
    expect(plan_mlstm(call.problem, s.device, direction).sm90 == sm90, "plan");
    run(s, seed);
  };
  planned({.time = 150, .dqk = 64, .dv = 256, .states = true}, Direction::kForward, true);
  planned({.time = 150, .dqk = 64, .dv = 64, .dtype = Dtype::kFloat32}, Direction::kForward, false);
  planned({.time = 70, .dqk = 256, .dv = 64}, Direction::kForward, false);
  // Rows that are not aligned, or not of whole 16-byte pieces: planned, and planned again.
  planned({.batch = 2, .time = 150, .dqk = 20, .dv = 40}, Direction::kForward, true);
  planned({.batch = 2, .time = 150, .dqk = 24, .dv = 40, .strided = true}, Direction::kBackward,
          true);
}

/// Values of more columns than the sweep contracts over: backward, dv alone is its.
void dv_alone(uint64_t seed) {
  const auto run_mixed = [&](Setting s, bool mixed = true) {
    if (s.device.compute_capability != 90) s.device = kHopper;
    const Call call(s, seed);
    const auto plan = plan_mlstm(call.problem, s.device, Direction::kBackward);
    expect(!plan.sm90 && plan.fused && plan.sm90_wide && plan.sm90_dv == mixed, "plan");
    run(s, seed);
  };
  run_mixed({.time = 150, .dqk = 64, .dv = 256, .states = true});
  if (thread_build()) return;
  run_mixed(
      {.batch = 2, .time = 200, .heads = 2, .dqk = 24, .dv = 136, .sigmoid = true, .resets = true});
  run_mixed({.time = 700, .dqk = 128, .dv = 192, .states = true});
  run_mixed(
      {.time = 300, .dqk = 48, .dv = 144, .states = true, .packed = {0, 0, 1, 128, 200, 300}});
  // Operands that the copy engine cannot read; several segments.
  run_mixed({.time = 150, .dqk = 20, .dv = 136, .strided = true});
  run_mixed({.time = 700, .dqk = 32, .dv = 136, .states = true, .device = kManyHopper}, false);
}

void extremes(uint64_t seed) {
  struct Gates {
    double input, forget, spread;
  };
  for (const Gates& g : {Gates{-1, 80, 1}, Gates{0, -80, 20}, Gates{200, 0, 100},
                         Gates{-300, -300, 100}, Gates{0, -10000, 3000}})
    for (const bool sigmoid : {false, true})
      run_sm90({.time = 150,
                .sigmoid = sigmoid,
                .states = true,
                .extreme = true,
                .forget_bias = g.forget,
                .input_bias = g.input,
                .gate_spread = g.spread},
               seed);
}

}  // namespace
}  // namespace passes

List<Case> mlstm_sm90_cases() {
  static const Case cases[] = {
      {"mlstm, sm90: shapes", passes::shapes},
      {"mlstm, sm90: long sequences", passes::long_sequences},
      {"mlstm, sm90: dv alone", passes::dv_alone},
      {"mlstm, sm90: other kernels", passes::others},
      {"mlstm, sm90: extreme gates", passes::extremes},
  };
  return {cases, simt::build_kind() == simt::Build::kThread ? size_t{3} : size_t{5}};
}

}  // namespace simt_test
