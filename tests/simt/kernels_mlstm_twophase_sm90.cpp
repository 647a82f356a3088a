// The state and out kernels for sm_90a alone: all four uses against the recurrence in float64, and whole passes with them.
#include "cuda/mlstm/hopper/mlstm_twophase_launch_sm90.h"
#include "cuda/mlstm/mlstm_plan.h"
#include "tests/simt/mlstm_call.h"
#include "tests/simt/mlstm_twophase_run.h"

namespace simt_test {
namespace twophase {
namespace {

using sweep::Order;

const DeviceLimits kSm90{90, 1, 227 * 1024,
                         true};  // one block takes all tiles, one after the other
const DeviceLimits kManySm90{90, 1000, 227 * 1024, true};

void run_sm90(Setting s, uint64_t seed) {
  s.dtype = Dtype::kBFloat16;
  if (!s.device.hopper) s.device = kSm90;
  run(s, seed);
}

/// Several chunks, row tiles, passes and slices; A resident and in the ring.
void few(uint64_t seed) {
  run_sm90({.name = "few", .time = 330, .dqk = 80, .dv = 72, .states = true, .chunk = 256}, seed);
  run_sm90({.name = "few, A in the ring", .time = 70, .dqk = 328, .dv = 24, .states = true}, seed);
}

void lengths(uint64_t seed) {
  for (const int32_t chunk : {64, 128, 256})
    for (const int64_t time : {1, 17, 63, 64, 65, 127, 200, 300}) {
      if (time <= chunk / 2 && chunk > 64) continue;  // as with the shorter chunk
      run_sm90({.name = "length",
                .time = time,
                .dqk = 24,
                .dv = 40,
                .batch = 2,
                .heads = 2,
                .states = time % 2 == 0,
                .device = chunk == 128 ? kManySm90 : kSm90,
                .chunk = chunk},
               seed);
    }
}

void heads(uint64_t seed) {
  run_sm90({.name = "192", .time = 150, .dqk = 192, .dv = 192, .states = true, .chunk = 128}, seed);
  run_sm90({.name = "256, 512", .time = 70, .dqk = 256, .dv = 512, .states = true}, seed);
  run_sm90({.name = "384", .time = 67, .dqk = 384, .dv = 384}, seed);
  run_sm90({.name = "512, 256", .time = 40, .dqk = 512, .dv = 256, .states = true}, seed);
  run_sm90({.name = "1280", .time = 3, .dqk = 1280, .dv = 1280}, seed);
}

void gates(uint64_t seed) {
  for (const bool sigmoid : {false, true})
    for (const bool normalize : {false, true})
      run_sm90({.name = "gates",
                .time = 200,
                .dqk = 24,
                .dv = 40,
                .sigmoid = sigmoid,
                .normalize = normalize,
                .states = true,
                .chunk = 128},
               seed);
  run_sm90({.name = "extreme gates",
            .time = 140,
            .dqk = 24,
            .dv = 40,
            .states = true,
            .forget = 0,
            .spread = 30,
            .key_mean = 0.5,
            .chunk = 128},
           seed);
}

void sequences(uint64_t seed) {
  run_sm90({.name = "resets", .time = 300, .dqk = 24, .dv = 40, .resets = true, .chunk = 256},
           seed);
  Setting s = {.name = "packed",
               .time = 331,
               .dqk = 24,
               .dv = 40,
               .heads = 2,
               .states = true,
               .packed = {0, 0, 1, 60, 60, 190, 331, 331}};
  run_sm90(s, seed);
  s.chunk = 128, s.segments = 2, s.name = "packed, segments";
  run_sm90(s, seed);
  // NaN behind the last sequence, for heads that give work to one consumer of the state or to both.
  s.packed = {0, 70, 190}, s.name = "packed, NaN behind";
  for (const int64_t dqk : {24, 160}) {
    s.dqk = dqk;
    run_sm90(s, seed);
  }
  s.dqk = 24, s.packed = {}, s.chunk = 64, s.segments = 3, s.name = "segments", s.resets = true;
  run_sm90(s, seed);
}

}  // namespace
}  // namespace twophase

namespace passes {
namespace {

/// Heads beyond the fused sweep.
void large_heads(uint64_t seed) {
  const auto run_large = [&](Setting s) {
    s.device = twophase::kSm90;
    const Call call(s, seed);
    for (const auto direction :
         {xlstm::cuda::Direction::kForward, xlstm::cuda::Direction::kBackward}) {
      const auto plan = plan_mlstm(call.problem, s.device, direction);
      expect(!plan.sm90 && !plan.fused, "plan");
    }
    run(s, seed);
  };
  run_large({.time = 300, .heads = 2, .dqk = 136, .dv = 144, .states = true, .resets = true});
  run_large({.time = 150, .dqk = 256, .dv = 384, .sigmoid = true, .states = true});
  run_large({.time = 200, .dqk = 160, .dv = 160, .states = true, .packed = {0, 70, 70, 200}});
  // Rows that the copy engine cannot read keep the kernels for sm_80.
  run_large({.time = 70, .dqk = 132, .dv = 140, .states = true, .strided = true});
}

}  // namespace
}  // namespace passes

List<Case> mlstm_twophase_sm90_cases() {
  static const Case cases[] = {
      {"two-phase, sm90: few shapes", twophase::few},
      {"two-phase, sm90: lengths", twophase::lengths},
      {"two-phase, sm90: heads", twophase::heads},
      {"two-phase, sm90: gates", twophase::gates},
      {"two-phase, sm90: sequences", twophase::sequences},
      {"mlstm, sm90: large heads", passes::large_heads},
  };
  return {cases, simt::build_kind() == simt::Build::kThread ? size_t{1} : size_t{6}};
}

}  // namespace simt_test
