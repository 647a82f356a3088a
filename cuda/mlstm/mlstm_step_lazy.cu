// step_lazy: a decoding step that reads C and writes it only where the ring is full. The tokens since the last fold lie in a
// ring; with D_j the decay from token j to now and g that of the state,
//
//   h = (g C^T q + sum_j D_j (q k_j) v_j) / N,   N = max(|g n q + sum_j D_j (q k_j)|, exp(-m)) + eps,
//
// the chunkwise form of a chunk that begins at the fold. The tiles of C read n, m, the ring and its count; a second
// launch, one block per head, replaces these.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_step.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kTokens = MlstmRing::kMaxTokens;
constexpr int kRows = 256;    // of q and the keys in shared memory at a time
constexpr int kColumns = 64;  // of C, a block

struct LazyLaunch {
  StepParams step;
  MlstmRing ring;
  int32_t tiles = 1;
  bool token = true;    ///< a token comes; else the ring is folded as it is
  bool vector = false;  ///< rows of C may be read 16 bytes at a time
};

class LazyBlock {
 public:
  struct Shared {
    float q[kRows], keys[kTokens][kRows], values[kTokens][kColumns];
    float sums[kThreads * 4];  ///< [group of rows][column]
    double logs[kTokens + 1];  ///< of the decays; the last of the state
    float weights[kTokens + 1], dots[kTokens + 1];
    float m, floor;
  };

  DEVICE_FUNCTION LazyBlock(const LazyLaunch& launch, Shared& shared, int head)
      : l(launch),
        p(launch.step),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        item(head),
        kept(launch.ring.count[head]),
        used(kept + (launch.token ? 1 : 0)),
        folds(!launch.token || used == launch.ring.tokens) {
    decays();
  }

  DEVICE_FUNCTION bool nothing_to_do() const { return used == 0; }

  /// The columns of a tile: h, and C where the ring is folded.
  template <bool kVector>
  DEVICE_FUNCTION void do_tile(int tile) {
    const int first_column = tile * kColumns;
    for (int i = thread; i < used * kColumns; i += kThreads) {
      const int col = first_column + i % kColumns;
      s.values[i / kColumns][i % kColumns] =
          col < p.dv ? s.weights[i / kColumns] * value(i / kColumns, col) : 0.0F;
    }
    if (l.token) dots();
    constexpr int kQuads = kColumns / 4;
    const int group = thread / kQuads, col = first_column + thread % kQuads * 4;
    float sum[4] = {};
    for (int first = 0; first < p.dqk; first += kRows) {
      const int rows = p.dqk - first < kRows ? p.dqk - first : kRows;
      load_rows(first, rows);
      float* c = p.call.c + (int64_t{item} * p.dqk + first) * p.dv + col;
      if (col < p.dv) do_rows<kVector>(c, group, rows, p.dv - col, sum);
    }
    if (l.token) write_output(first_column, sum);
  }

  /// The ring and its count, or n, m and an empty ring.
  DEVICE_FUNCTION void replace() {
    if (folds) {
      for (int d = thread; d < p.dqk; d += kThreads) {
        float* n = p.call.n + int64_t{item} * p.dqk + d;
        float sum = s.weights[kTokens] * *n;
        for (int j = 0; j < used; ++j) sum += s.weights[j] * key(j, d);
        *n = sum;
      }
    } else {
      const int64_t slot = slot_of(kept);
      for (int d = thread; d < p.dqk; d += kThreads)
        store_number(l.ring.keys, slot * p.dqk + d, p.dtype, key(kept, d));
      for (int d = thread; d < p.dv; d += kThreads)
        store_number(l.ring.values, slot * p.dv + d, p.dtype, value(kept, d));
    }
    prim::sync_block();  // every thread has read count and m
    if (thread != 0) return;
    if (folds) {
      p.call.m[item] = s.m;
    } else {
      float* gates = l.ring.gates + slot_of(kept) * 2;
      gates[0] = log_forget(kept);
      gates[1] = log_input(kept);
    }
    l.ring.count[item] = folds ? 0 : used;
  }

 private:
  DEVICE_FUNCTION int64_t slot_of(int j) const { return int64_t{item} * l.ring.tokens + j; }
  DEVICE_FUNCTION float key(int j, int d) const {
    if (j == kept) return StepRow(p.call.k, p, item, p.dtype)[d];
    return load_number(l.ring.keys, slot_of(j) * p.dqk + d, p.dtype);
  }
  DEVICE_FUNCTION float value(int j, int d) const {
    if (j == kept) return StepRow(p.call.v, p, item, p.dtype)[d];
    return load_number(l.ring.values, slot_of(j) * p.dv + d, p.dtype);
  }
  DEVICE_FUNCTION float log_forget(int j) const {
    if (j == kept) return log_sigmoid(StepRow(p.call.fgate, p, item, p.fgate_dtype)[0]);
    return l.ring.gates[slot_of(j) * 2];
  }
  DEVICE_FUNCTION float log_input(int j) const {
    if (j != kept) return l.ring.gates[slot_of(j) * 2 + 1];
    const float i = StepRow(p.call.igate, p, item, p.igate_dtype)[0];
    return p.sigmoid_input_gate ? log_sigmoid(i) : i;
  }

  /// The weights of the tokens and of the state in units of e^m.
  DEVICE_FUNCTION void decays() {
    if (thread == 0) {
      double after = 0, m = -1e300;
      for (int j = used - 1; j >= 0; --j) {
        s.logs[j] = after + at_least(log_input(j), kMinLogInput);
        after += at_least(log_forget(j), kMinLogForget);
        m = max_nan(s.logs[j], m);
      }
      if (!p.sigmoid_input_gate) after += at_least(p.call.m[item], kMinLogInput);
      s.logs[kTokens] = after;
      m = p.sigmoid_input_gate ? 0 : static_cast<double>(static_cast<float>(max_nan(after, m)));
      s.m = static_cast<float>(m);
      s.floor = p.sigmoid_input_gate ? 1 : exp2_of((-m > kMaxNegM ? kMaxNegM : -m) * kLog2e);
    }
    prim::sync_block();
    if (thread < used || thread == kTokens)
      s.weights[thread] = exp2_of((s.logs[thread] - static_cast<double>(s.m)) * kLog2e);
    prim::sync_block();
  }

  /// q k_j of every token and q n, a warp each.
  DEVICE_FUNCTION void dots() {
    const StepRow q(p.call.q, p, item, p.dtype);
    const float* n = p.call.n + int64_t{item} * p.dqk;
    for (int j = thread / 32; j <= used; j += kWarps) {
      float sum = 0;
      for (int d = thread % 32; d < p.dqk; d += 32) sum += q[d] * (j < used ? key(j, d) : n[d]);
      sum = warp_sum(sum);
      if (thread % 32 == 0) s.dots[j < used ? j : kTokens] = sum;
    }
  }

  DEVICE_FUNCTION float factor() const {
    if (!p.normalize) return p.scale;
    float product = s.weights[kTokens] * s.dots[kTokens];
    for (int j = 0; j < used; ++j) product += s.weights[j] * s.dots[j];
    product *= p.scale;
    const float size = product < 0 ? -product : product;
    constexpr float kSmallest = 1.17549435e-38F;
    const float floor = s.floor > kSmallest ? s.floor : kSmallest;
    return p.scale / ((size <= floor ? floor : size) + p.eps);
  }

  /// q and, for a fold, the keys of rows [first, first + rows).
  DEVICE_FUNCTION void load_rows(int first, int rows) {
    prim::sync_block();
    for (int row = thread; row < rows; row += kThreads) {
      if (l.token) s.q[row] = StepRow(p.call.q, p, item, p.dtype)[first + row];
      for (int j = 0; folds && j < used; ++j) s.keys[j][row] = key(j, first + row);
    }
    prim::sync_block();
  }

  template <bool kVector>
  DEVICE_FUNCTION void do_rows(float* c, int group, int rows, int width, float (&sum)[4]) {
    constexpr int kGroups = kThreads / (kColumns / 4);
    const int quad = thread % (kColumns / 4) * 4;
#pragma unroll 2
    for (int row = group; row < rows; row += kGroups) {
      float x[4];
      load_four<kVector>(c + int64_t{row} * p.dv, width, x);
      const float q = l.token ? s.q[row] : 0.0F;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += q * x[i];
      if (!folds) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= s.weights[kTokens];
      for (int j = 0; j < used; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] += s.keys[j][row] * s.values[j][quad + i];
      }
      store_four<kVector>(c + int64_t{row} * p.dv, width, x);
    }
  }

  DEVICE_FUNCTION void write_output(int first_column, const float (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.sums[thread * 4 + i] = sum[i];
    prim::sync_block();
    const int out = first_column + thread;
    if (thread >= kColumns || out >= p.dv) return;
    float total = 0;
    for (int g = 0; g < kThreads / (kColumns / 4); ++g) total += s.sums[g * kColumns + thread];
    total *= s.weights[kTokens];
    for (int j = 0; j < used; ++j) total += s.dots[j] * s.values[j][thread];
    const View& h = p.call.h;
    store_number(h.data, item / p.num_heads * h.batch + item % p.num_heads * h.head + out * h.inner,
                 p.dtype, total * factor());
  }

  const LazyLaunch& l;
  const StepParams& p;
  Shared& s;
  const int thread, item, kept, used;
  const bool folds;
};

KERNEL_FUNCTION(kThreads, 2)
mlstm_step_lazy_columns(const GRID_CONSTANT LazyLaunch l) {
  const int block = static_cast<int>(prim::block_idx().x);
  LazyBlock step(l, *reinterpret_cast<LazyBlock::Shared*>(prim::dynamic_shared()), block / l.tiles);
  if (step.nothing_to_do()) return;
  if (l.vector) {
    step.do_tile<true>(block % l.tiles);
  } else {
    step.do_tile<false>(block % l.tiles);
  }
}

KERNEL_FUNCTION(kThreads)
mlstm_step_lazy_ring(const GRID_CONSTANT LazyLaunch l) {
  LazyBlock step(l, *reinterpret_cast<LazyBlock::Shared*>(prim::dynamic_shared()),
                 static_cast<int>(prim::block_idx().x));
  if (!step.nothing_to_do()) step.replace();
}

void launch_lazy(const MlstmProblem& problem, const MlstmStep& call, const MlstmRing& ring,
                 bool token, Stream stream) {
  LazyLaunch l;
  l.step = step_params(problem, call);
  l.ring = ring;
  l.tiles = divide_up(l.step.dv, kColumns);
  l.token = token;
  l.vector = l.step.dv % 4 == 0 && reinterpret_cast<uintptr_t>(call.c) % 16 == 0;
  const u32 items = static_cast<u32>(l.step.batch * l.step.num_heads);
  prim::launch("mlstm_step_lazy_columns", mlstm_step_lazy_columns,
               {items * static_cast<u32>(l.tiles), kThreads, sizeof(LazyBlock::Shared)}, l, stream);
  prim::launch("mlstm_step_lazy_ring", mlstm_step_lazy_ring,
               {items, kThreads, sizeof(LazyBlock::Shared)}, l, stream);
}

}  // namespace

void mlstm_step_lazy(const MlstmProblem& problem, const MlstmStep& call, const MlstmRing& ring,
                     Stream stream) {
  launch_lazy(problem, call, ring, true, stream);
}

void mlstm_fold(const MlstmProblem& problem, const MlstmStep& call, const MlstmRing& ring,
                Stream stream) {
  launch_lazy(problem, call, ring, false, stream);
}

}  // namespace xlstm::cuda
