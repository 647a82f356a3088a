// The mLSTM as the operators call it: every kernel of sm_80, whole passes against the recurrence in float64. Elsewhere:
//   gates; prep, segment scan and gate gradients; step    kernels_mlstm_gates.cpp, _prep.cpp, _step.cpp, each kernel alone
//   sweep: tiles, uses, planes, stages                    kernels_mlstm_sweep.cpp
//   state and out: uses, planes, stages                   kernels_mlstm_twophase.cpp
//   all of these for sm_90a                               kernels_mlstm_sm90.cpp, _sweep_sm90.cpp, _twophase_sm90.cpp
//   fused, two-phase, steps, chunk lengths and segments   kernels_mlstm_agreement.cpp, against each other
// Anchors have no test alone: sequences of more than 256 tokens have them here.
#include "tests/simt/mlstm_call.h"

namespace simt_test {
namespace passes {
namespace {

const DeviceLimits kSmall{86, 1, 99 * 1024};          // single-stage tiles
const DeviceLimits kManyCores{90, 1000, 227 * 1024};  // as many segments as the chunks allow

/// Both types where time allows; float16 shares every kernel with float32.
void run_dtypes(Setting s, uint64_t seed) {
  s.dtype = Dtype::kFloat32;
  run(s, seed);
  s.dtype = Dtype::kBFloat16;
  run(s, seed);
}

void lengths(uint64_t seed) {
  for (const int64_t time : {1, 17, 63, 64, 65, 127, 200}) {
    if (thread_build() && time != 65) continue;
    const int64_t batch = time < 64 ? 4 : 1;  // an error is relative to enough numbers
    run_dtypes({.batch = batch, .time = time, .heads = 2, .states = true}, seed);
    run_dtypes(
        {.batch = 2 * batch, .time = time, .dqk = 24, .dv = 40, .resets = true, .strided = true},
        seed);
    run_dtypes({.batch = batch, .time = time, .sigmoid = true, .states = true, .two_phase = true},
               seed);
  }
}

void gates(uint64_t seed) {
  for (const bool two_phase : {false, true}) {
    for (const bool sigmoid : {false, true}) {
      for (const bool normalize : {true, false}) {
        if (thread_build() && normalize) continue;
        run_dtypes({.time = 130,
                    .sigmoid = sigmoid,
                    .normalize = normalize,
                    .states = true,
                    .resets = true,
                    .two_phase = two_phase},
                   seed);
      }
    }
  }
}

/// Resets at chunk edges, inside chunks and on neighbouring tokens; sequences of 0 to 100 tokens in one row.
void documents(uint64_t seed) {
  for (const bool two_phase : {false, true}) {
    run_dtypes({.batch = 2, .time = 200, .states = true, .resets = true, .two_phase = two_phase},
               seed);
    run_dtypes({.time = 200,
                .heads = 2,
                .states = true,
                .packed = {0, 0, 1, 64, 65, 130, 200},
                .two_phase = two_phase},
               seed);
    if (thread_build()) continue;
    run_dtypes({.time = 200, .resets = true, .packed = {0, 100, 200, 200}, .two_phase = two_phase},
               seed);
  }
}

/// Every tile of the sweep and of the two-phase kernels, up to the largest heads of the paper. Those in one schedule.
void widths(uint64_t seed) {
  const auto heads = [&](int64_t time, int64_t dqk, int64_t dv) {
    run_dtypes({.time = time, .dqk = dqk, .dv = dv, .states = true}, seed);
  };
  heads(70, 64, 128);
  heads(70, 128, 128);
  if (thread_build()) return;
  heads(130, 64, 64);
  heads(130, 128, 256);
  heads(130, 256, 128);
  run({.time = 70, .dqk = 384, .dv = 64, .dtype = Dtype::kFloat16, .resets = true}, seed);
  run({.time = 70, .dtype = Dtype::kFloat16, .states = true}, seed);
  if (seed != 1) return;
  heads(70, 384, 384);
  heads(17, 512, 300);
  run({.time = 3, .dqk = 1280, .dv = 1280, .states = true}, seed);
}

void devices(uint64_t seed) {
  for (const DeviceLimits& device : {kSmall, kManyCores}) {
    run_dtypes({.time = 700, .states = true, .device = device}, seed);
    if (thread_build()) continue;
    run_dtypes({.time = 700, .states = true, .resets = true, .two_phase = true, .device = device},
               seed);
    run_dtypes(
        {.time = 900, .dqk = 64, .dv = 96, .packed = {0, 10, 10, 800, 900}, .device = device},
        seed);
    run_dtypes({.time = 150, .dqk = 128, .dv = 128, .device = device}, seed);
  }
}

/// The chunk length changes nothing beyond rounding.
void chunk_sizes(uint64_t seed) {
  for (const int64_t chunk : {1, 64, 100, 128, 256, 5000}) {
    if (thread_build() && chunk != 128) continue;
    run_dtypes({.time = 300, .states = true, .chunk_size = chunk, .two_phase = true}, seed);
  }
}

/// Gates far outside of what training gives.
void extremes(uint64_t seed) {
  struct Gates {
    double input, forget, spread;
  };
  for (const Gates& g : {Gates{-1, 80, 1}, Gates{0, -80, 20}, Gates{200, 0, 100},
                         Gates{-300, -300, 100}, Gates{0, -10000, 3000}}) {
    for (const bool sigmoid : {false, true}) {
      if (thread_build() && g.forget != -80) continue;
      const Setting s{.time = 130,
                      .sigmoid = sigmoid,
                      .states = true,
                      .extreme = true,
                      .forget_bias = g.forget,
                      .input_bias = g.input,
                      .gate_spread = g.spread};
      run_dtypes(s, seed);
    }
  }
}

/// Without dc0 and dn0 the gates' gradients still need them; without states nothing of their size is kept.
void unwanted(uint64_t seed) {
  for (const bool two_phase : {false, true})
    run_dtypes({.time = 100, .states = true, .two_phase = two_phase, .start_gradients = false},
               seed);
  xlstm::cuda::MlstmProblem p;
  p.batch = 1, p.time = 65536, p.num_sequences = 2048, p.num_heads = 8, p.dqk = 256, p.dv = 512;
  p.dtype = Dtype::kBFloat16;
  const float state = 0;
  float gradient = 0;
  xlstm::cuda::MlstmBackward bare, start, wanted, end;
  start.in.c0 = start.in.n0 = wanted.in.c0 = wanted.in.n0 = end.dc = end.dn = &state;
  wanted.dc0 = wanted.dn0 = &gradient;
  for (const DeviceLimits& device : {kAmpere, DeviceLimits{90, 132, 227 * 1024, true}}) {
    const size_t none = mlstm_backward_workspace(p, device, bare),
                 states = 4 * 2048 * 8 * 256 * size_t{512 + 1};
    expect(mlstm_backward_workspace(p, device, start) == none + states, "dc0 and dn0");
    expect(mlstm_backward_workspace(p, device, wanted) == none, "dc0 and dn0 of the caller");
    expect(mlstm_backward_workspace(p, device, end) == none + states, "the final states");
  }
}

void limits(uint64_t) {
  xlstm::cuda::MlstmProblem p;
  p.batch = p.num_sequences = p.num_heads = 1, p.time = 64;
  p.dqk = 1024, p.dv = 65535;
  expect(mlstm_supported(p, kAmpere), "wide values");
  p.dqk = 32768, p.dv = 32768;
  expect(!mlstm_supported(p, kAmpere), "a state of 2^30 numbers");
  p.dqk = p.dv = 64, p.time = int64_t{1} << 30;
  expect(!mlstm_supported(p, kAmpere), "2^30 tokens");
}

}  // namespace
}  // namespace passes

List<Case> mlstm_cases() {
  static const Case cases[] = {
      {"mlstm: lengths", passes::lengths},
      {"mlstm: gates", passes::gates},
      {"mlstm: documents", passes::documents},
      {"mlstm: widths", passes::widths},
      {"mlstm: devices", passes::devices},
      {"mlstm: chunk sizes", passes::chunk_sizes},
      {"mlstm: extreme gates", passes::extremes},
      {"mlstm: limits", passes::limits},
      {"mlstm: what is not wanted", passes::unwanted},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
