// gate gradients: a running sum over the tokens of a run, from a sequence's start or an anchor to the next anchor or the
// end, restarted at resets. One block per head and run, one thread per token.
#include "cuda/mlstm/mlstm_gates.cuh"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

/// Some tokens: the sum of what they add and of its variance but for a factor, from the last restart on.
struct Running {
  double sum, variance;
  bool restarts;
};
DEVICE_FUNCTION Running then(const Running& a, const Running& b) {
  return b.restarts ? b : Running{a.sum + b.sum, a.variance + b.variance, a.restarts};
}

template <int kThreads>
class GateGradientBlock {
  static constexpr int kWarps = kThreads / 32;

 public:
  struct Shared {
    double sums[kThreads], variances[kThreads];
    double parts[kWarps];
    Running ends[kWarps];
    int restarts[kWarps];  ///< the first one of each warp, kThreads if none
  };

  DEVICE_FUNCTION GateGradientBlock(const GateGradientParams& params, Shared& shared)
      : p(params),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        lane(thread % 32),
        warp(thread / 32) {
    const int block = static_cast<int>(prim::block_idx().x), run = block / p.chunks.num_heads;
    head = block % p.chunks.num_heads;
    if (run < p.chunks.num_sequences) {
      sequence = run;
      range = sequence_at(p.chunks, sequence);
      find_end(0);
    } else {
      const int slot = (run - p.chunks.num_sequences) * p.chunks.anchor;
      if (slot >= p.chunks.slots) return;
      const SlotRange at = slot_at(p.chunks, slot);
      if (!at.used || at.chunk == 0) return;  // a sequence's start is a run of its own
      sequence = at.index;
      range = at.sequence;
      find_end(at.chunk);
    }
  }

  DEVICE_FUNCTION void run() {
    if (begin >= end) return;
    const double start = start_value(), stop = end_value();
    const int t = begin + thread;
    Running own{0, 0, false};
    if (thread == 0) {
      own = {start, 0, true};
    } else if (t < end) {
      own = is_reset(t) ? Running{0, 0, true} : step_to(t);
    }
    const Running mine = scan(own);
    const int restart = next_restart(own.restarts);
    if (t < end) write(t, corrected(mine, restart, stop));
  }

 private:
  /// The run from `chunk` on ends at the sequence's next anchor.
  DEVICE_FUNCTION void find_end(int chunk) {
    begin = chunk * p.chunks.length;
    end = range.length;
    if (p.anchors.dots == nullptr) return;
    const int next = chunk + p.chunks.anchor - (range.first_slot + chunk) % p.chunks.anchor;
    if (next < range.num_chunks) end = next * p.chunks.length;
  }

  /// Up to every thread's own token; left in shared memory for all.
  DEVICE_FUNCTION Running scan(Running own) const {
#pragma unroll
    for (u32 delta = 1; delta < 32; delta *= 2) {
      const Running other{shfl_up(own.sum, delta), shfl_up(own.variance, delta),
                          prim::shfl_up(own.restarts ? 1U : 0U, delta) != 0};
      if (lane >= static_cast<int>(delta)) own = then(other, own);
    }
    if (lane == 31) s.ends[warp] = own;
    prim::sync_block();
    Running before{0, 0, false};
    for (int i = 0; i < warp; ++i) before = then(before, s.ends[i]);
    own = then(before, own);
    s.sums[thread] = own.sum;
    s.variances[thread] = own.variance;
    prim::sync_block();
    return own;
  }

  /// The first token after this thread's, counted from `begin`, where the sum starts anew; kThreads if there is none.
  DEVICE_FUNCTION int next_restart(bool restarts) const {
    u32 first = restarts ? thread : kThreads;  // from this thread on
#pragma unroll
    for (u32 delta = 1; delta < 32; delta *= 2) {
      const u32 other = prim::shfl_down(first, delta);
      if (lane + delta < 32 && other < first) first = other;
    }
    if (lane == 0) s.restarts[warp] = static_cast<int>(first);
    const int next = static_cast<int>(prim::shfl_down(first, 1));
    prim::sync_block();
    if (lane < 31 && next < kThreads) return next;
    for (int i = warp + 1; i < kWarps; ++i)
      if (s.restarts[i] < kThreads) return s.restarts[i];
    return kThreads;
  }

  /// What the sum arrives at is known too, so its error is shared out over the tokens on the way, to each by the variance
  /// of what it added: the estimate of least squares.
  DEVICE_FUNCTION double corrected(const Running& mine, int restart, double stop) const {
    const int count = end - begin;
    const int last = (restart < count ? restart : count) - 1;
    const Running step = step_to(begin + last + 1);
    const double variance = s.variances[last] + step.variance;
    if (!(variance > 0)) return mine.sum;
    const double wanted = restart < count ? 0 : stop;  // nothing passes a reset
    return mine.sum + (wanted - (s.sums[last] + step.sum)) * (mine.variance / variance);
  }

  DEVICE_FUNCTION double start_value() const {
    const double value = begin > 0 ? anchor_dot(begin) : state_dot(p.start);
    return is_reset(begin) ? 0 : value;
  }
  DEVICE_FUNCTION double end_value() const {
    if (end == range.length) return state_dot(p.end);
    return is_reset(end) ? 0 : anchor_dot(end);
  }

  DEVICE_FUNCTION double dots(const float* from, int t) const {
    double sum = 0;
    const int64_t slots = p.chunks.slots, row = head * slots + range.first_slot;
#pragma unroll 1
    for (int tile = 0; tile < p.tiles; ++tile)
      sum += from[(int64_t{tile} * p.chunks.num_heads * slots + row) * p.chunks.length + t];
    return sum;
  }
  DEVICE_FUNCTION bool is_reset(int t) const {
    return p.reset != nullptr &&
           p.reset[range.batch * p.reset_batch + (range.begin + int64_t{t}) * p.reset_time];
  }
  /// What is added on the way from token t - 1 to token t, of which neither is a reset.
  DEVICE_FUNCTION Running step_to(int t) const {
    const double c = dots(p.dots_c, t - 1), r = dots(p.dots_r, t - 1);
    return {c - r, c * c + r * r, false};
  }

  /// <C, dC> + <n, dn> as they enter the chunk of token t, an anchor.
  DEVICE_FUNCTION double anchor_dot(int t) const {
    const int anchor = (range.first_slot + t / p.chunks.length) / p.chunks.anchor;
    double sum = 0;
#pragma unroll 1
    for (int tile = 0; tile < p.anchor_tiles; ++tile) {
      const int64_t at = (int64_t{tile} * p.chunks.num_heads + head) * p.anchors.count + anchor;
      for (int i = 0; i < kAnchorWarps; ++i) sum += p.anchors.dots[at * kAnchorWarps + i];
    }
    return sum;
  }

  /// <C, dC> + <n, dn> of the sequence; a part of it is 0 where one of the two is null. For all threads.
  DEVICE_FUNCTION double state_dot(const StateAndGradient& x) const {
    double sum = thread_dot(x.c, x.dc, p.state_size) + thread_dot(x.n, x.dn, p.n_size);
#pragma unroll
    for (u32 delta = 16; delta > 0; delta /= 2) sum += shfl(sum, (lane + delta) % 32);
    prim::sync_block();
    if (lane == 0) s.parts[warp] = sum;
    prim::sync_block();
    sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += s.parts[i];
    return sum;
  }
  DEVICE_FUNCTION double thread_dot(const float* a, const float* b, int64_t size) const {
    double sum = 0;
    const int64_t item = int64_t{sequence} * p.chunks.num_heads + head;
    if (a == nullptr || b == nullptr) return sum;
#pragma unroll 4
    for (int64_t i = thread; i < size; i += kThreads)
      sum += static_cast<double>(a[item * size + i]) * b[item * size + i];
    return sum;
  }

  DEVICE_FUNCTION int64_t offset(const View& view, int t) const {
    return range.batch * view.batch + (range.begin + int64_t{t}) * view.time + head * view.head;
  }
  DEVICE_FUNCTION void write(int t, double forget) const {
    const float f = load_number(p.fgate.data, offset(p.fgate, t), p.fgate_dtype);
    const float input = static_cast<float>(dots(p.dots_c, t));
    float factor = 1;
    if (p.sigmoid_input_gate)
      factor = sigmoid_of_negative(load_number(p.igate.data, offset(p.igate, t), p.igate_dtype));
    store_number(p.digate.data, offset(p.digate, t), p.igate_dtype, input * factor);
    store_number(p.dfgate.data, offset(p.dfgate, t), p.fgate_dtype,
                 static_cast<float>(forget) * sigmoid_of_negative(f));
  }

  const GateGradientParams& p;
  Shared& s;
  const int thread, lane, warp;
  int head, sequence = 0;
  SequenceRange range{};
  int begin = 0, end = 0;  ///< tokens of the sequence
};

template <int kThreads>
DEVICE_FUNCTION void run_block(const GateGradientParams& p) {
  using Block = GateGradientBlock<kThreads>;
  Block(p, *reinterpret_cast<typename Block::Shared*>(prim::dynamic_shared())).run();
}

constexpr int kShortRun = kLongestRun / 2;

KERNEL_FUNCTION(kLongestRun, 2)
mlstm_gate_gradients(const GRID_CONSTANT GateGradientParams p) { run_block<kLongestRun>(p); }

KERNEL_FUNCTION(kShortRun, 4)
mlstm_gate_gradients_short(const GRID_CONSTANT GateGradientParams p) { run_block<kShortRun>(p); }

}  // namespace

void launch_gate_gradients(const GateGradientParams& params, Stream stream) {
  const Chunks& c = params.chunks;
  const u32 runs = static_cast<u32>(c.num_sequences + params.anchors.count);
  const u32 blocks = runs * static_cast<u32>(c.num_heads);
  // Small heads have runs of half the length; idle threads would cost as much as others.
  const int32_t longest = params.anchors.dots == nullptr ? c.time : c.anchor * c.length;
  if (longest <= kShortRun)
    return prim::launch("mlstm_gate_gradients_short", mlstm_gate_gradients_short,
                        {blocks, kShortRun, sizeof(GateGradientBlock<kShortRun>::Shared)}, params,
                        stream);
  prim::launch("mlstm_gate_gradients", mlstm_gate_gradients,
               {blocks, kLongestRun, sizeof(GateGradientBlock<kLongestRun>::Shared)}, params,
               stream);
}

}  // namespace xlstm::cuda
