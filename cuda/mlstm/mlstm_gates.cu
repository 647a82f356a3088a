// gates: everything about a chunk that depends on its gates alone, see mlstm_params.h. Two launches, a thread per token and a
// block per chunk in both: what every chunk comes to, then the stabiliser that enters it, from the chunks before it, and its
// records.
#include <stdexcept>
#include <string>

#include "cuda/mlstm/mlstm_gates.cuh"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

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

/// A chunk of 32 kWarps tokens.
template <int kWarps>
class GatesBlock {
 public:
  DEVICE_FUNCTION explicit GatesBlock(const GatesParams& params)
      : p(params), position(static_cast<int>(prim::thread_idx().x)), lane(position % 32) {
    const int block = static_cast<int>(prim::block_idx().x);
    head = block / p.chunks.slots;
    slot = block % p.chunks.slots;
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
    scan_chunk();
    if (position == 0) p.ends[int64_t{head} * p.chunks.slots + slot] = end;
  }

  /// The second launch: records and gamma, and m where the sequence ends.
  DEVICE_FUNCTION void write() {
    if (!used) return;
    load();
    const double start =
        p.m0 == nullptr || p.sigmoid_input_gate ? 0.0 : at_least(p.m0[owner], kMinLogInput);
    const double m = chunk == 0 ? start : m_after(start, chunks_before());
    scan_chunk();
    const int64_t at = int64_t{head} * p.chunks.slots + slot;
    const double end_peak = peak_of(end, m);
    if (position == 0) {
      p.gamma[at] = end.last > 0 ? 0.0F : exp2_of((m - end_peak) * kLog2e);
      if (p.m != nullptr && chunk == range.num_chunks - 1)
        p.m[owner] = static_cast<float>(m_after(m, end));
    }
    p.records[at * p.chunks.length + position] =
        position < tokens ? record_of(m, end_peak) : beyond_the_end();
  }

 private:
  DEVICE_FUNCTION double m_after(double m, const GateRun& of) const {
    if (p.sigmoid_input_gate) return 0;
    return of.b + (of.last > 0 ? of.peak : max_nan(m, of.peak));
  }

  /// This token's gates.
  DEVICE_FUNCTION void load() {
    if (position >= tokens) return;
    const int64_t t = range.begin + int64_t{chunk} * p.chunks.length + position;
    input = load_number(p.igate.data,
                        range.batch * p.igate.batch + t * p.igate.time + head * p.igate.head,
                        p.igate_dtype);
    forget = load_number(p.fgate.data,
                         range.batch * p.fgate.batch + t * p.fgate.time + head * p.fgate.head,
                         p.fgate_dtype);
    is_reset = p.reset != nullptr && p.reset[range.batch * p.reset_batch + t * p.reset_time];
    if (p.sigmoid_input_gate) input = log_sigmoid(input);
    forget = log_sigmoid(forget);
  }
  DEVICE_FUNCTION double log_input() const { return at_least(input, kMinLogInput); }

  /// A run of the token alone.
  DEVICE_FUNCTION GateRun token_run() const {
    if (position >= tokens) return kNothing;
    const double b = at_least(forget, kMinLogForget), alpha = log_input() - b;
    return {b, is_reset ? max_nan(alpha, 0) : alpha, is_reset ? position + 1 : 0};
  }

  /// `run` up to and with the token, and `end`, that of the chunk.
  DEVICE_FUNCTION void scan_chunk() {
    GateRun* const warps = reinterpret_cast<GateRun*>(prim::dynamic_shared());
    const int warp = position / 32;
    run = scan(token_run(), lane);
    if (lane == 31) warps[warp] = run;
    prim::sync_block();
    GateRun up_to = kNothing;
    if (lane < kWarps) up_to = warps[lane];
    up_to = scan(up_to, lane);
    const GateRun before = run_of(up_to, static_cast<u32>(warp > 0 ? warp - 1 : 0));
    if (warp > 0) run = then(before, run);
    end = run_of(up_to, kWarps - 1);
  }

  /// The sequence's chunks before this one; every lane combines a part of them.
  DEVICE_FUNCTION GateRun chunks_before() const {
    GateRun part = kNothing;
    if (p.sigmoid_input_gate) return part;
    const GateRun* const ends = p.ends + int64_t{head} * p.chunks.slots + range.first_slot;
    const int first = static_cast<int>(int64_t{chunk} * lane / 32),
              last = static_cast<int>(int64_t{chunk} * (lane + 1) / 32);
#pragma unroll 4
    for (int i = first; i < last; ++i) part = then(part, ends[i]);
    return run_of(scan(part, lane), 31);
  }

  /// The peak that a run means: with the sigmoid gate every m is 0.
  DEVICE_FUNCTION double peak_of(const GateRun& of, double m) const {
    if (p.sigmoid_input_gate) return -of.b;
    return of.last > 0 ? of.peak : max_nan(m, of.peak);
  }

  DEVICE_FUNCTION GateRecord record_of(double m, double end_peak) const {
    const double alpha = log_input() - run.b, peak = peak_of(run, m);
    GateRecord r;
    split(alpha * kLog2e, r.alpha, r.alpha_rest);
    split(peak * kLog2e, r.peak, r.peak_rest);
    r.w = run.last > 0 ? 0.0F : p.scale * exp2_of((m - peak) * kLog2e);
    r.u = run.last < end.last ? 0.0F : exp2_of((alpha - end_peak) * kLog2e);
    r.floor = p.sigmoid_input_gate ? 1.0F : floor_of(run.b + peak);
    r.start = run.last > 0 ? run.last - 1 : 0;
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
  const int position, lane;  ///< the token's in its chunk
  int head, slot, chunk, tokens;
  int64_t owner;
  bool used;
  SequenceRange range;
  float input = 0, forget = 0;  ///< their logarithms
  bool is_reset = false;
  GateRun run, end;
};

/// A sequence without tokens has no chunk that could hand its m on. There are at least as many threads as sequences and
/// heads: every sequence has a slot.
DEVICE_FUNCTION void pass_empty_sequences(const GatesParams& p) {
  const int64_t owner = int64_t{prim::block_idx().x} * prim::block_dim().x + prim::thread_idx().x;
  if (p.m == nullptr || owner >= int64_t{p.chunks.num_sequences} * p.chunks.num_heads) return;
  if (sequence_at(p.chunks, static_cast<int>(owner / p.chunks.num_heads)).num_chunks > 0) return;
  const bool has_m = p.m0 != nullptr && !p.sigmoid_input_gate;
  p.m[owner] = has_m ? static_cast<float>(at_least(p.m0[owner], kMinLogInput)) : 0.0F;
}

template <int kWarps>
KERNEL_FUNCTION(32 * kWarps, 4)
mlstm_gate_ends(const GRID_CONSTANT GatesParams p) {
  pass_empty_sequences(p);
  GatesBlock<kWarps>(p).summarize();
}

template <int kWarps>
KERNEL_FUNCTION(32 * kWarps, 4)
mlstm_gates(const GRID_CONSTANT GatesParams p) {
  GatesBlock<kWarps>(p).write();
}

template <int kWarps>
void launch_chunks(const GatesParams& params, Stream stream) {
  const u32 blocks = static_cast<u32>(params.chunks.slots * params.chunks.num_heads);
  const prim::LaunchShape shape{blocks, 32 * kWarps, kWarps * sizeof(GateRun)};
  prim::launch("mlstm_gate_ends", mlstm_gate_ends<kWarps>, shape, params, stream);
  prim::launch("mlstm_gates", mlstm_gates<kWarps>, shape, params, stream);
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
