#include "cuda/mlstm/mlstm_plan.h"

#include <algorithm>
#include <limits>

#include "cuda/mlstm/hopper/mlstm_launch_sm90.h"
#include "cuda/mlstm/mlstm_launch.h"

namespace xlstm::cuda {
namespace {

constexpr int64_t kTile = 64;
// Chunks of the two-phase form: longer ones write fewer states but compute more scores.
constexpr int64_t kLongestChunk = 256;
/// Tokens between anchors. The errors of the dots add up between two of them, sooner for small heads, and are a smaller
/// part of what float32 promises than of bfloat16. With bfloat16 anchors cost less than a tenth of the traffic.
int64_t anchor_tokens(const MlstmProblem& problem) {
  const int64_t tokens = problem.dqk * problem.dv < 128 * 128 ? 256 : kLongestRun;
  return problem.dtype == Dtype::kFloat32 ? tokens / 4 : tokens;
}
// A segment shorter than this would cost more in its own state than it brings in parallel work.
constexpr int64_t kMinSegmentChunks = 4;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t chunk_length(const MlstmProblem& problem, const MlstmPlan& plan) {
  if (plan.sm90) return kSweepSm90Length;
  if (plan.fused) return kTile;
  const int64_t wanted = problem.chunk_size > 0 ? problem.chunk_size : kLongestChunk;
  int64_t length = kTile;
  while (length < std::min({wanted, kLongestChunk, problem.time})) length *= 2;
  return length;
}

/// Enough blocks for two waves of the device, as far as the sequences are long enough.
int64_t segment_count(const MlstmProblem& problem, const DeviceLimits& device, int64_t length,
                      int64_t blocks_per_segment) {
  const int64_t average =
      problem.time * problem.batch / std::max<int64_t>(problem.num_sequences, 1);
  const int64_t most = std::max<int64_t>(1, ceil_div(average, length) / kMinSegmentChunks);
  return std::clamp<int64_t>(
      2 * device.num_multiprocessors / std::max<int64_t>(blocks_per_segment, 1), 1, most);
}

/// Columns of X that a block takes of `width`.
int tile_columns(const MlstmProblem& problem, const DeviceLimits& device, const MlstmPlan& plan,
                 int contraction, int width) {
  if (plan.sm90) return sweep_sm90_tile_columns(width);
  if (plan.sm90_wide) return kSweepSm90WideColumns;
  return plan.fused ? sweep_tile_columns(contraction, width, problem.dtype, device)
                    : out_tile_columns(problem.dtype, device);
}

Chunks cut(const MlstmProblem& problem, int64_t length) {
  Chunks chunks;
  chunks.num_sequences = static_cast<int32_t>(problem.num_sequences);
  chunks.time = static_cast<int32_t>(problem.time);
  chunks.num_heads = static_cast<int32_t>(problem.num_heads);
  chunks.length = static_cast<int32_t>(length);
  // One row may hold packed sequences, each with a partial chunk at its end (sequence_at).
  chunks.slots = static_cast<int32_t>(problem.batch == 1
                                          ? problem.time / length + problem.num_sequences
                                          : problem.num_sequences * ceil_div(problem.time, length));
  return chunks;
}

int registers_at_anchor(const MlstmProblem& problem, const DeviceLimits& device,
                        const MlstmPlan& plan) {
  const int dqk = static_cast<int>(problem.dqk), dv = static_cast<int>(problem.dv);
  if (plan.sm90) return sweep_sm90_anchor_numbers(dv, dqk);
  if (plan.sm90_wide) return sweep_sm90_wide_anchor_numbers();
  return plan.fused ? sweep_anchor_numbers(dv, dqk, problem.dtype, device)
                    : anchor_numbers(dqk, dv, plan.planes);
}

}  // namespace

DeviceLimits without_hopper(DeviceLimits device) {
  device.hopper = false;
  return device;
}

bool mlstm_supported(const MlstmProblem& p, const DeviceLimits& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  const int64_t tokens =
      round_up(p.time, kLongestChunk) * p.batch + p.num_sequences * kLongestChunk;
  return device.compute_capability >= 80 && tokens * p.num_heads < kMost && p.dqk < 65536 &&
         p.dv < 65536 && round_up(p.dqk, kTile) * round_up(p.dv, kTile) < kMost;
}

MlstmPlan plan_mlstm(const MlstmProblem& problem, const DeviceLimits& device, Direction direction) {
  MlstmPlan plan;
  plan.planes = problem.dtype == Dtype::kBFloat16 ? 1 : 2;
  const int dqk = static_cast<int>(problem.dqk), dv = static_cast<int>(problem.dv);
  const auto fused_by = [&](bool (*covers)(int, Dtype, const DeviceLimits&)) {
    return !problem.two_phase && covers(dqk, problem.dtype, device) &&
           (direction == Direction::kForward || covers(dv, problem.dtype, device));
  };
  plan.fused = fused_by(sweep_covers);
  plan.sm90 = device.hopper && fused_by(sweep_sm90_covers);
  // Heads too large for that sweep take the state and out kernels for sm_90a, not the sweep for sm_80: an H100 needs half
  // the time at (256, 512). But where DV alone is too large there is the wide sweep for dq and dk.
  plan.sm90_wide = device.hopper && !plan.sm90 && direction == Direction::kBackward && plan.fused &&
                   sweep_sm90_covers(dqk, problem.dtype, device) &&
                   sweep_sm90_wide_covers(dv, problem.dtype, device);
  if (device.hopper && !plan.sm90 && !plan.sm90_wide && problem.dtype == Dtype::kBFloat16)
    plan.fused = false;
  const int64_t length = chunk_length(problem, plan);
  const auto columns = [&](int contraction, int width) {
    return ceil_div(width, tile_columns(problem, device, plan, contraction, width));
  };
  if (direction == Direction::kBackward) plan.dot_tiles = static_cast<int32_t>(columns(dv, dqk));
  Chunks& chunks = plan.chunks;
  chunks = cut(problem, length);
  const int64_t tiles = plan.fused
                            ? columns(dqk, dv)
                            : ceil_div(problem.dqk, 2 * kTile) * ceil_div(problem.dv, 2 * kTile);
  chunks.segments =
      static_cast<int32_t>(segment_count(problem, device, length, plan.items() * tiles));
  // Segments begin at chunks: with several of them the states that enter one are not those of other chunks.
  plan.sm90_dv = plan.sm90_wide && chunks.segments == 1;
  if (plan.sm90_dv) plan.dv_chunks = cut(problem, kSweepSm90Length);
  chunks.anchor = static_cast<int32_t>(std::max<int64_t>(1, anchor_tokens(problem) / length));
  if (direction == Direction::kBackward && problem.time > anchor_tokens(problem)) {
    plan.anchor_count = chunks.slots / chunks.anchor + 1;
    plan.anchor_tiles = plan.fused ? plan.dot_tiles : 1;
    plan.anchor_numbers = registers_at_anchor(problem, device, plan);
  }
  return plan;
}

Anchors take_anchors(const MlstmPlan& plan, Workspace& workspace) {
  Anchors anchors;
  if (plan.anchor_count == 0) return anchors;
  const int64_t blocks = int64_t{plan.anchor_tiles} * plan.chunks.num_heads * plan.anchor_count;
  anchors.states = workspace.take<float>(blocks * plan.anchor_numbers);
  anchors.dots = workspace.take<float>(blocks * kAnchorWarps);
  anchors.count = plan.anchor_count;
  return anchors;
}

SegmentMemory::SegmentMemory(const MlstmPlan& plan, const MlstmProblem& problem,
                             Workspace& workspace) {
  if (plan.chunks.segments == 1) return;
  const int64_t count = plan.items() * plan.chunks.segments;
  c = workspace.take<float>(count * problem.dqk * problem.dv);
  n = workspace.take<float>(count * problem.dqk);
  gamma = workspace.take<float>(count);
}

StateMemory::StateMemory(const MlstmPlan& plan, const MlstmProblem& problem, Workspace& workspace) {
  if (plan.fused) return;
  const int64_t slots = int64_t{plan.chunks.num_heads} * plan.chunks.slots;
  const int64_t rows = round_up(problem.dqk, kTile), columns = round_up(problem.dv, kTile);
  c = workspace.take<uint16_t>(slots * plan.planes * rows * columns);
  n = workspace.take<float>(slots * rows);
}

Operand operand_of(const View& view, int64_t width, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  const auto aligned = [bytes](int64_t stride) { return stride * bytes % 16 == 0; };
  const bool vector = view.inner == 1 && aligned(view.batch) && aligned(view.time) &&
                      aligned(view.head) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return {view.data, view.batch, view.time, view.head, view.inner, static_cast<int32_t>(width),
          dtype,     vector};
}

int64_t positions_of(const Chunks& chunks) {
  return int64_t{chunks.num_heads} * chunks.slots * chunks.length;
}

GatesParams gates_params(const Chunks& chunks, const MlstmProblem& problem, const MlstmInputs& in,
                         GateRun* ends, GateRecord* records, float* gamma, float* m) {
  GatesParams p;
  p.chunks = chunks;
  p.igate = in.igate;
  p.fgate = in.fgate;
  p.igate_dtype = problem.igate_dtype;
  p.fgate_dtype = problem.fgate_dtype;
  p.sigmoid_input_gate = problem.sigmoid_input_gate;
  p.scale = problem.scale;
  p.m0 = in.m0;
  p.reset = in.reset;
  p.reset_batch = in.reset_batch;
  p.reset_time = in.reset_time;
  p.ends = ends;
  p.records = records;
  p.gamma = gamma;
  p.m = m;
  return p;
}

SegmentStarts segment_starts(const MlstmPlan& plan, const StateParams& state,
                             const SegmentMemory& memory, const DeviceLimits& device,
                             Stream stream) {
  if (plan.chunks.segments == 1) return {state.start_c, state.start_n};
  StateParams sums = state;
  sums.start_c = sums.start_n = nullptr;
  sums.end_c = sums.end_n = sums.state_n = nullptr;
  sums.states = nullptr;
  sums.segment_c = memory.c;
  sums.segment_n = memory.n;
  sums.segment_gamma = memory.gamma;
  launch_state(sums, device, stream);
  SegmentScanParams scan;
  scan.items = static_cast<int32_t>(plan.items());
  scan.segments = plan.chunks.segments;
  scan.reverse = state.reverse;
  scan.gamma = memory.gamma;
  scan.size = int64_t{state.dqk} * state.dv;
  scan.start = state.start_c;
  scan.sums = memory.c;
  launch_segment_scan(scan, stream);
  scan.size = state.dqk;
  scan.start = state.start_n;
  scan.sums = memory.n;
  launch_segment_scan(scan, stream);
  return {memory.c, memory.n};
}

}  // namespace xlstm::cuda
