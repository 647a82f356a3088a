// gate gradients: a running sum over the tokens of a sequence, restarted at resets and at anchors. One block per
// (sequence, head).
#include "cuda/mlstm/mlstm_gates.cuh"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

/// A run of tokens: the sum of what they add, from the last restart on.
struct Run {
  double sum;
  bool restarts;
};
DEVICE_FUNCTION Run then(const Run& a, const Run& b) {
  return b.restarts ? b : Run{a.sum + b.sum, a.restarts};
}

class GateGradientBlock {
 public:
  struct Shared {
    double parts[kWarps];
    Run ends[kWarps];
  };

  DEVICE_FUNCTION GateGradientBlock(const GateGradientParams& params, Shared& shared)
      : p(params),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        lane(thread % 32),
        warp(thread / 32) {
    const int item = static_cast<int>(prim::block_idx().x);
    head = item % p.chunks.num_heads;
    range = sequence_at(p.chunks, item / p.chunks.num_heads);
  }

  DEVICE_FUNCTION void run() {
    if (range.length == 0) return;
    // Of the first token: what the initial state gives it, if it is not emptied there.
    Run before{start_dot(), true};
    if (is_reset(0)) before.sum = 0;
    for (int first = 0; first < range.length; first += kThreads) {
      const int t = first + thread;
      Run own{0, false};
      if (t > 0 && t < range.length) own = token(t);
#pragma unroll
      for (u32 delta = 1; delta < 32; delta *= 2) {
        const Run other{shfl_up(own.sum, delta), prim::shfl_up(own.restarts ? 1U : 0U, delta) != 0};
        if (lane >= static_cast<int>(delta)) own = then(other, own);
      }
      if (lane == 31) s.ends[warp] = own;
      prim::sync_block();
      Run mine = before;
      for (int i = 0; i < warp; ++i) mine = then(mine, s.ends[i]);
      for (int i = 0; i < kWarps; ++i) before = then(before, s.ends[i]);
      if (t < range.length) write(t, then(mine, own).sum);
      prim::sync_block();
    }
  }

 private:
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
  /// What token t > 0 adds to the sum that is the gradient of its own forget gate.
  DEVICE_FUNCTION Run token(int t) const {
    if (is_reset(t)) return {0, true};
    const int anchor =
        t % p.chunks.length == 0 ? anchor_at(p.chunks, range, t / p.chunks.length) : -1;
    if (p.anchors.dots != nullptr && anchor >= 0) return {anchor_dot(anchor), true};
    return {dots(p.dots_c, t - 1) - dots(p.dots_r, t - 1), false};
  }

  DEVICE_FUNCTION double anchor_dot(int anchor) const {
    double sum = 0;
#pragma unroll 1
    for (int tile = 0; tile < p.anchor_tiles; ++tile) {
      const int64_t at = (int64_t{tile} * p.chunks.num_heads + head) * p.anchors.count + anchor;
      for (int i = 0; i < kAnchorWarps; ++i) sum += p.anchors.dots[at * kAnchorWarps + i];
    }
    return sum;
  }

  DEVICE_FUNCTION double thread_dot(const float* a, const float* b, int64_t size) const {
    double sum = 0;
    const int64_t item = prim::block_idx().x;
    if (a == nullptr || b == nullptr) return sum;
#pragma unroll 4
    for (int64_t i = thread; i < size; i += kThreads)
      sum += static_cast<double>(a[item * size + i]) * b[item * size + i];
    return sum;
  }
  /// <C_0, dC_0> + <n_0, dn_0>
  DEVICE_FUNCTION double start_dot() const {
    if (p.c0 == nullptr && p.n0 == nullptr) return 0;
    double sum = thread_dot(p.c0, p.dc0, p.state_size) + thread_dot(p.n0, p.dn0, p.n_size);
#pragma unroll
    for (u32 delta = 16; delta > 0; delta /= 2) sum += shfl(sum, (lane + delta) % 32);
    if (lane == 0) s.parts[warp] = sum;
    prim::sync_block();
    sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += s.parts[i];
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
  int head;
  SequenceRange range;
};

KERNEL_FUNCTION(kThreads, 4)
mlstm_gate_gradients(const GRID_CONSTANT GateGradientParams p) {
  GateGradientBlock(p, *reinterpret_cast<GateGradientBlock::Shared*>(prim::dynamic_shared())).run();
}

}  // namespace

void launch_gate_gradients(const GateGradientParams& params, Stream stream) {
  const u32 blocks = static_cast<u32>(params.chunks.num_sequences * params.chunks.num_heads);
  prim::launch("mlstm_gate_gradients", mlstm_gate_gradients,
               {blocks, kThreads, sizeof(GateGradientBlock::Shared)}, params, stream);
}

}  // namespace xlstm::cuda
