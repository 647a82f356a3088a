// Large heads with DeviceLimits::hopper: whole passes through the two-phase kernels against the recurrence in float64.

#include "tests/simt/mlstm_call.h"

namespace simt_test {
namespace passes {
namespace {

const DeviceLimits kFewHopper{90, 3, 227 * 1024, true};
const DeviceLimits kSegmentsHopper{90, 1000, 227 * 1024, true};

/// Also where a fused sweep exists.
void run_two_phase(Setting s, uint64_t seed) {
  if (s.device.compute_capability != 90) s.device = kFewHopper;
  s.two_phase = true;

  run(s, seed);
}

/// Two chunks, of which the second is not whole; states at both ends; tails, resets and several sequences in one row.
void few(uint64_t seed) {
  run_two_phase({.time = 150,
                 .heads = 2,
                 .dqk = 144,
                 .dv = 80,
                 .states = true,
                 .packed = {0, 70, 70, 150},
                 .chunk_size = 64},
                seed);
}

void widths(uint64_t seed) {
  run_two_phase({.time = 70, .dqk = 192, .dv = 192, .states = true}, seed);
  run_two_phase({.time = 40, .dqk = 256, .dv = 512}, seed);
  run_two_phase({.time = 70, .dqk = 384, .dv = 384, .resets = true}, seed);
  run_two_phase({.batch = 2, .time = 300, .dqk = 80, .dv = 144, .states = true}, seed);
}

void options(uint64_t seed) {
  run_two_phase({.time = 140, .dqk = 160, .dv = 64, .sigmoid = true, .states = true}, seed);
  run_two_phase({.time = 140, .dqk = 64, .dv = 160, .normalize = false, .states = true}, seed);
  run_two_phase({.time = 600,
                 .dqk = 24,
                 .dv = 40,
                 .states = true,
                 .resets = true,
                 .chunk_size = 64,

                 .device = kSegmentsHopper},
                seed);
  // Rows that the copy engine cannot read keep the kernels of sm_80.
  run_two_phase({.time = 70, .dqk = 132, .dv = 40, .states = true, .strided = true}, seed);
}

}  // namespace
}  // namespace passes

List<Case> mlstm_twophase_sm90_cases() {
  static const Case cases[] = {
      {"two-phase, sm90: few shapes", passes::few},
      {"two-phase, sm90: widths", passes::widths},
      {"two-phase, sm90: options", passes::options},
  };
  return {cases, simt::build_kind() == simt::Build::kThread ? size_t{1} : size_t{3}};
}

}  // namespace simt_test
