// gates: everything about a chunk that depends on its gates alone, see mlstm_params.h. Two launches, a warp per chunk in both:
// what every chunk comes to, then the stabiliser that enters it, from the chunks before it, and its records.
#include <stdexcept>
#include <string>

#include "cuda/mlstm/mlstm_gates.cuh"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kNoPeak = -1e300;
constexpr GateRun kNothing{0, kNoPeak, 0};

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

/// The runs of all lanes up to each of them.
DEVICE_FUNCTION GateRun scan(GateRun own, int lane) {
#pragma unroll
  for (u32 delta = 1; delta < 32; delta *= 2) {
    const GateRun before = run_up(own, delta);
    if (lane >= static_cast<int>(delta)) own = then(before, own);
  }
  return own;
}

/// A chunk of 32 kTokens tokens, so many side by side in every lane.
template <int kTokens>
class GatesWarp {
 public:
  DEVICE_FUNCTION explicit GatesWarp(const GatesParams& params)
      : p(params), lane(static_cast<int>(prim::thread_idx().x) % 32) {
    const int64_t warp = (int64_t{prim::block_idx().x} * kThreads + prim::thread_idx().x) / 32;
    head = static_cast<int>(warp / p.chunks.slots);
    slot = static_cast<int>(warp % p.chunks.slots);
    used = head < p.chunks.num_heads;
    if (!used) return;
    const SlotRange at = slot_at(p.chunks, slot);
    used = at.used;
    range = at.sequence;
    chunk = at.chunk;
    owner = int64_t{at.index} * p.chunks.num_heads + head;
    const int left = range.length - chunk * p.chunks.length;
    tokens = left < p.chunks.length ? left : p.chunks.length;
  }

  /// The first launch.
  DEVICE_FUNCTION void summarize() {
    if (!used) return;
    load();
    const GateRun end = run_of(scan(own_run(), lane), 31);
    if (lane == 0) p.ends[int64_t{head} * p.chunks.slots + slot] = end;
  }

  /// The second launch: records and gamma, and m where the sequence ends.
  DEVICE_FUNCTION void write() {
    if (!used) return;
    load();
    const double start =
        p.m0 == nullptr || p.sigmoid_input_gate ? 0.0 : at_least(p.m0[owner], kMinLogInput);
    const double m = chunk == 0 ? start : m_after(start, chunks_before());
    const GateRun scanned = scan(own_run(), lane), end = run_of(scanned, 31);
    GateRun run = run_up(scanned, 1);
    if (lane == 0) run = kNothing;
    const int64_t at = int64_t{head} * p.chunks.slots + slot;
    const double end_peak = peak_of(end, m);
    if (lane == 0) p.gamma[at] = end.last > 0 ? 0.0F : exp2_of((m - end_peak) * kLog2e);
    if (lane == 0 && p.m != nullptr && chunk == range.num_chunks - 1)
      p.m[owner] = static_cast<float>(m_after(m, end));
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int position = lane * kTokens + i;
      run = then(run, token_run(i));
      p.records[at * p.chunks.length + position] =
          position < tokens ? record_of(run, log_input(i), m, end, end_peak) : beyond_the_end();
    }
  }

 private:
  DEVICE_FUNCTION double m_after(double m, const GateRun& end) const {
    if (p.sigmoid_input_gate) return 0;
    return end.b + (end.last > 0 ? end.peak : max_nan(m, end.peak));
  }

  /// This lane's gates; all loads are on their way before the first is used.
  DEVICE_FUNCTION void load() {
    resets = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int position = lane * kTokens + i;
      input[i] = forget[i] = 0;
      if (position >= tokens) continue;
      const int64_t t = range.begin + int64_t{chunk} * p.chunks.length + position;
      input[i] = load_number(p.igate.data,
                             range.batch * p.igate.batch + t * p.igate.time + head * p.igate.head,
                             p.igate_dtype);
      forget[i] = load_number(p.fgate.data,
                              range.batch * p.fgate.batch + t * p.fgate.time + head * p.fgate.head,
                              p.fgate_dtype);
      if (p.reset != nullptr && p.reset[range.batch * p.reset_batch + t * p.reset_time])
        resets |= 1U << i;
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (p.sigmoid_input_gate) input[i] = log_sigmoid(input[i]);
      forget[i] = log_sigmoid(forget[i]);
    }
  }
  DEVICE_FUNCTION double log_input(int i) const { return at_least(input[i], kMinLogInput); }

  /// A run of one token alone.
  DEVICE_FUNCTION GateRun token_run(int i) const {
    const int position = lane * kTokens + i;
    if (position >= tokens) return kNothing;
    const double b = at_least(forget[i], kMinLogForget), alpha = log_input(i) - b;
    const bool is_reset = (resets >> i & 1U) != 0;
    return {b, is_reset ? max_nan(alpha, 0) : alpha, is_reset ? position + 1 : 0};
  }
  DEVICE_FUNCTION GateRun own_run() const {
    GateRun run = token_run(0);
#pragma unroll
    for (int i = 1; i < kTokens; ++i) run = then(run, token_run(i));
    return run;
  }

  /// The sequence's chunks before this one; every lane combines a part of them.
  DEVICE_FUNCTION GateRun chunks_before() const {
    GateRun run = kNothing;
    if (p.sigmoid_input_gate) return run;
    const GateRun* const ends = p.ends + int64_t{head} * p.chunks.slots + range.first_slot;
    const int first = static_cast<int>(int64_t{chunk} * lane / 32),
              last = static_cast<int>(int64_t{chunk} * (lane + 1) / 32);
#pragma unroll 4
    for (int i = first; i < last; ++i) run = then(run, ends[i]);
    return run_of(scan(run, lane), 31);
  }

  /// The peak that a run means: with the sigmoid gate every m is 0.
  DEVICE_FUNCTION double peak_of(const GateRun& run, double m) const {
    if (p.sigmoid_input_gate) return -run.b;
    return run.last > 0 ? run.peak : max_nan(m, run.peak);
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
  const int lane;
  int head, slot, chunk = 0, tokens = 0;
  int64_t owner = 0;
  bool used;
  SequenceRange range{};
  float input[kTokens], forget[kTokens];  ///< their logarithms
  u32 resets = 0;
};

/// A sequence without tokens has no chunk that could hand its m on.
DEVICE_FUNCTION void pass_empty_sequences(const GatesParams& p) {
  const int64_t owner = int64_t{prim::block_idx().x} * kThreads + prim::thread_idx().x;
  if (p.m == nullptr || owner >= int64_t{p.chunks.num_sequences} * p.chunks.num_heads) return;
  if (sequence_at(p.chunks, static_cast<int>(owner / p.chunks.num_heads)).num_chunks > 0) return;
  const bool has_m = p.m0 != nullptr && !p.sigmoid_input_gate;
  p.m[owner] = has_m ? static_cast<float>(at_least(p.m0[owner], kMinLogInput)) : 0.0F;
}

template <int kTokens>
KERNEL_FUNCTION(kThreads, 4)
mlstm_gate_ends(const GRID_CONSTANT GatesParams p) {
  pass_empty_sequences(p);
  GatesWarp<kTokens>(p).summarize();
}

template <int kTokens>
KERNEL_FUNCTION(kThreads, 4)
mlstm_gates(const GRID_CONSTANT GatesParams p) {
  GatesWarp<kTokens>(p).write();
}

template <int kTokens>
void launch_chunks(const GatesParams& params, Stream stream) {
  // At least as many threads as sequences and heads: every sequence has a slot.
  const int64_t warps = int64_t{params.chunks.slots} * params.chunks.num_heads;
  const u32 blocks = static_cast<u32>((32 * warps + kThreads - 1) / kThreads);
  prim::launch("mlstm_gate_ends", mlstm_gate_ends<kTokens>, {blocks, kThreads}, params, stream);
  prim::launch("mlstm_gates", mlstm_gates<kTokens>, {blocks, kThreads}, params, stream);
}

}  // namespace

void launch_gates(const GatesParams& params, Stream stream) {
  switch (params.chunks.length) {
    case 64:
      return launch_chunks<2>(params, stream);
    case 128:
      return launch_chunks<4>(params, stream);
    case 256:
      return launch_chunks<8>(params, stream);
    default:
      throw std::runtime_error("mlstm_gates: chunks of 64, 128 or 256 tokens, not " +
                               std::to_string(params.chunks.length));
  }
}

}  // namespace xlstm::cuda
