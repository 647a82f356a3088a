// gates: everything about a chunk that depends on its gates alone, see mlstm_params.h. One block per (sequence, head), a
// warp per chunk.
#include "cuda/mlstm/mlstm_gates.cuh"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

/// What the tokens of a chunk up to one of them come to.
struct GateRun {
  double b;     ///< since the chunk's start or the last reset
  double peak;  ///< of alpha since then, and of 0 if there was a reset
  int last;     ///< 1 + position of the last reset; 0: none
};
constexpr double kNoPeak = -1e300;

/// First `a`, then `b`.
DEVICE_FUNCTION GateRun then(const GateRun& a, const GateRun& b) {
  // The peaks of b's tokens lie on b's own scale: those of a move by what b has summed up.
  return b.last > 0 ? b : GateRun{a.b + b.b, max_nan(a.peak, b.peak - a.b), a.last};
}

DEVICE_FUNCTION GateRun run_up(const GateRun& x, u32 delta) {
  return {shfl_up(x.b, delta), shfl_up(x.peak, delta),
          static_cast<int>(prim::shfl_up(static_cast<u32>(x.last), delta))};
}
DEVICE_FUNCTION GateRun run_of(const GateRun& x, u32 lane) {
  return {shfl(x.b, lane), shfl(x.peak, lane),
          static_cast<int>(prim::shfl(static_cast<u32>(x.last), lane))};
}

class GatesBlock {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;

 public:
  struct Shared {
    GateRun ends[kWarps];
    double m;  ///< before the next chunk
  };

  DEVICE_FUNCTION GatesBlock(const GatesParams& params, Shared& shared)
      : p(params),
        s(shared),
        lane(static_cast<int>(prim::thread_idx().x) % 32),
        warp(static_cast<int>(prim::thread_idx().x) / 32) {
    const int item = static_cast<int>(prim::block_idx().x);
    sequence = item / p.chunks.num_heads;
    head = item % p.chunks.num_heads;
    range = sequence_at(p.chunks, sequence);
  }

  DEVICE_FUNCTION void run() {
    const int64_t owner = int64_t{sequence} * p.chunks.num_heads + head;
    double m = p.m0 == nullptr || p.sigmoid_input_gate ? 0.0 : at_least(p.m0[owner], kMinLogInput);
    for (int first = 0; first < range.num_chunks; first += kWarps) {
      const int chunk = first + warp;
      const bool used = chunk < range.num_chunks;
      GateRun end{0, kNoPeak, 0};
      if (used) end = summarize(chunk);
      if (lane == 0) s.ends[warp] = end;
      prim::sync_block();
      // Every warp walks over the chunks before its own.
      for (int i = 0; i < warp; ++i) m = m_after(m, s.ends[i]);
      if (used) write(chunk, m, end);
      for (int i = warp; i < kWarps; ++i) m = m_after(m, s.ends[i]);
      prim::sync_block();
    }
    if (p.m != nullptr && warp == 0 && lane == 0) p.m[owner] = static_cast<float>(m);
  }

 private:
  DEVICE_FUNCTION double m_after(double m, const GateRun& end) const {
    if (p.sigmoid_input_gate) return 0;
    return end.b + (end.last > 0 ? end.peak : max_nan(m, end.peak));
  }

  /// log i of the token at `position` of a chunk, and a run of that token alone.
  DEVICE_FUNCTION GateRun token(int chunk, int position, double& log_input) const {
    const int64_t t = range.begin + int64_t{chunk} * p.chunks.length + position;
    const int64_t i_at = range.batch * p.igate.batch + t * p.igate.time + head * p.igate.head;
    const int64_t f_at = range.batch * p.fgate.batch + t * p.fgate.time + head * p.fgate.head;
    const float i = load_number(p.igate.data, i_at, p.igate_dtype);
    const float f = load_number(p.fgate.data, f_at, p.fgate_dtype);
    log_input = at_least(p.sigmoid_input_gate ? log_sigmoid(i) : i, kMinLogInput);
    const double b = at_least(log_sigmoid(f), kMinLogForget);
    const bool is_reset =
        p.reset != nullptr && p.reset[range.batch * p.reset_batch + t * p.reset_time];
    const double alpha = log_input - b;
    return {b, is_reset ? max_nan(alpha, 0) : alpha, is_reset ? position + 1 : 0};
  }

  DEVICE_FUNCTION int tokens_of(int chunk) const {
    const int left = range.length - chunk * p.chunks.length;
    return left < p.chunks.length ? left : p.chunks.length;
  }

  /// 32 tokens from `position`: this lane's run from the chunk's start; `run`, the run before, becomes the run after.
  DEVICE_FUNCTION GateRun scan(int chunk, int position, GateRun& run, double& log_input) const {
    GateRun own{0, kNoPeak, 0};
    log_input = kMinLogInput;
    if (position + lane < tokens_of(chunk)) own = token(chunk, position + lane, log_input);
#pragma unroll
    for (u32 delta = 1; delta < 32; delta *= 2) {
      const GateRun before = run_up(own, delta);
      if (lane >= static_cast<int>(delta)) own = then(before, own);
    }
    own = then(run, own);
    run = run_of(own, 31);
    return own;
  }

  DEVICE_FUNCTION GateRun summarize(int chunk) const {
    GateRun run{0, kNoPeak, 0};
    for (int position = 0; position < tokens_of(chunk); position += 32) {
      double log_input;
      scan(chunk, position, run, log_input);
    }
    return run;
  }

  /// The peak that a run means: with the sigmoid gate every m is 0.
  DEVICE_FUNCTION double peak_of(const GateRun& run, double m) const {
    if (p.sigmoid_input_gate) return -run.b;
    return run.last > 0 ? run.peak : max_nan(m, run.peak);
  }

  /// Records and gamma of a chunk that the stabiliser enters as `m`.
  DEVICE_FUNCTION void write(int chunk, double m, const GateRun& end) const {
    const int64_t slot = int64_t{head} * p.chunks.slots + range.first_slot + chunk;
    const double end_peak = peak_of(end, m);
    if (lane == 0) p.gamma[slot] = end.last > 0 ? 0.0F : exp2_of((m - end_peak) * kLog2e);
    GateRun run{0, kNoPeak, 0};
    const int tokens = tokens_of(chunk);
    for (int position = 0; position < p.chunks.length; position += 32) {
      double log_input;
      const GateRun own = scan(chunk, position, run, log_input);
      const GateRecord record =
          position + lane < tokens ? record_of(own, log_input, m, end, end_peak) : beyond_the_end();
      p.records[slot * p.chunks.length + position + lane] = record;
    }
  }

  DEVICE_FUNCTION GateRecord record_of(const GateRun& own, double log_input, double m,
                                       const GateRun& end, double end_peak) const {
    const double alpha = log_input - own.b, peak = peak_of(own, m);
    GateRecord r;
    split(alpha * kLog2e, r.alpha, r.alpha_rest);
    split(peak * kLog2e, r.peak, r.peak_rest);
    r.w = own.last > 0 ? 0.0F : p.scale * exp2_of((m - peak) * kLog2e);
    r.u = own.last < end.last ? 0.0F : exp2_of((alpha - end_peak) * kLog2e);
    const double negative_m = -(own.b + peak);
    r.floor = p.sigmoid_input_gate
                  ? 1.0F
                  : exp2_of((negative_m > kMaxNegM ? kMaxNegM : negative_m) * kLog2e);
    r.start = own.last > 0 ? own.last - 1 : 0;
    return r;
  }

  DEVICE_FUNCTION GateRecord beyond_the_end() const {
    return {-1e38F, 0, 0, 0, 0, 0, 1, p.chunks.length};
  }

  static DEVICE_FUNCTION void split(double x, float& high, float& rest) {
    high = static_cast<float>(x);
    rest = static_cast<float>(x - static_cast<double>(high));
  }

  const GatesParams& p;
  Shared& s;
  const int lane, warp;
  int sequence, head;
  SequenceRange range;
};

KERNEL_FUNCTION(256)
mlstm_gates(const GRID_CONSTANT GatesParams p) {
  GatesBlock(p, *reinterpret_cast<GatesBlock::Shared*>(prim::dynamic_shared())).run();
}

}  // namespace

void launch_gates(const GatesParams& params, Stream stream) {
  const u32 blocks = static_cast<u32>(params.chunks.num_sequences * params.chunks.num_heads);
  prim::launch("mlstm_gates", mlstm_gates, {blocks, 256, sizeof(GatesBlock::Shared)}, params,
               stream);
}

}  // namespace xlstm::cuda
