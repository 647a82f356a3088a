// step_lazy: a decoding step that reads C and writes it only where the ring is full. The tokens since the last fold lie in a
// ring; with D_j the decay from token j to now and g that of the state,
//
//   h = (g C^T q + sum_j D_j (q k_j) v_j) / N,   N = max(|g n q + sum_j D_j (q k_j)|, exp(-m)) + eps,
//
// the chunkwise form of a chunk that begins at the fold. A block does some columns of a head: few, so that a single head
// is read by many multiprocessors, or twice as many where there are heads enough. Either way the numbers are the
// same. Blocks of a head arrive at the count of its ring, all of which have then read it, n and m: the last one replaces
// these.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_plan.h"
#include "cuda/mlstm/mlstm_step.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kTokens = MlstmRing::kMaxTokens;
constexpr int kRows = 512;  // of q and the keys in shared memory at a time
constexpr int kStrip = 16;  // columns of C that a row of threads reads at once
constexpr int kGroups = kThreads / (kStrip / 4);  // rows of C that the block reads at once
constexpr int kManyStrips = 2;                    // a block where heads abound
constexpr int kGateWarp = kWarps - 2, kStateWarp = kWarps - 1;  // which also do the decays, q n
constexpr int kHeld = kTokens / kWarps;  // tokens whose product with q is a warp's
constexpr u32 kArrival = 256;            // in a count: above the tokens
static_assert(kTokens % kWarps == 0 && kTokens < static_cast<int>(kArrival));

struct LazyLaunch {
  StepParams step;
  MlstmRing ring;
  int32_t tiles = 1;         ///< blocks of a head
  int32_t key_part = 0;      ///< numbers of the token's key that a block puts into the ring
  bool token = true;         ///< a token comes; else the ring is folded as it is
  bool vector_rows = false;  ///< q, keys and n may be read 16 bytes at a time
};

struct alignas(16) LazyShared {
  float q[kRows];
  float rows[kTokens * kRows];  ///< keys of a fold; then [group of rows][column] of h
  float values[kTokens][kManyStrips * kStrip];
  float weights[kTokens + 1], dots[kTokens + 1];  ///< the last of the state
  float m, floor;
  bool last;  ///< of the head's blocks
};
static_assert(kGroups * kManyStrips * kStrip <= kTokens * kRows);

/// A tile of kStrips * kStrip columns of a head.
template <bool kVector, int kStrips>
class LazyBlock {
 public:
  DEVICE_FUNCTION LazyBlock(const LazyLaunch& launch, LazyShared& shared, int head, int column_tile)
      : l(launch),
        p(launch.step),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        warp(thread / 32),
        lane(thread % 32),
        item(head),
        tile(column_tile),
        first_column(column_tile * kColumns) {}

  DEVICE_FUNCTION void run() {
    float x[kInFlight][4], sum[kStrips][4] = {}, dot[kHeld + 1] = {};
    if (kAhead) load_batch(0, 0, x);
    u32* const count = reinterpret_cast<u32*>(l.ring.count) + item;
    kept = static_cast<int>(prim::ld_acquire(count) % kArrival);
    used = kept + (l.token ? 1 : 0);
    folds = !l.token || used == l.ring.tokens;
    if (used == 0) return;
    // Loads first, what is done with them after those of the rows: one wait for all.
    const Gates own = warp == kGateWarp ? load_gates() : Gates{};
    u32 values[kStrips] = {}, arrived = 0;
    load_values(values);
    for (int first = 0; first < p.dqk; first += kRows) {
      if (first > 0) {
        if (kAhead) load_batch(first, 0, x);
        prim::sync_block();  // the rows before are done with
      }
      const int end = first + kRows < p.dqk ? first + kRows : p.dqk;
      if (l.vector_rows) {
        if (p.dtype == Dtype::kFloat32) load_rows<float>(first, end, dot);
        if (p.dtype == Dtype::kBFloat16) load_rows<bf16>(first, end, dot);
        if (p.dtype == Dtype::kFloat16) load_rows<f16>(first, end, dot);
      } else {
        load_rows_singly(first, end, dot);
      }
      if (first == 0) {
        if (warp == kGateWarp) decays(own);
        keep_values(values);
      }
      if (end == p.dqk) write_dots(dot);
      prim::sync_block();
      // Every thread has read the count, all that changes without a fold; the answer may take its time.
      if (end == p.dqk && !folds && thread == 0) arrived = prim::atomic_add(count, kArrival);
#pragma unroll 1
      for (int batch = 0; batch < kRows / kGroups; batch += kBatchRows) {
        if (!kAhead || batch > 0) load_batch(first, batch, x);
        if (l.token) add_batch(first, batch, x, sum);
        if (folds) fold_batch(first, batch, x);
      }
    }
    if (l.token) write_output(sum);
    if (folds) {
      prim::sync_block();  // and every thread has read what is replaced
      if (thread == 0) arrived = prim::atomic_add_acq_rel(count, kArrival);
    }
    if (thread == 0) {
      const u32 tiles = static_cast<u32>(l.tiles), before = static_cast<u32>(kept);
      s.last = arrived / kArrival == tiles - 1;
      if (s.last) prim::atomic_add(count, (folds ? 0 : before + 1) - (before + tiles * kArrival));
      if (s.last && folds) p.call.m[item] = s.m;
    }
    if (!folds) return;
    prim::sync_block();
    if (s.last) replace_normaliser();
  }

 private:
  static constexpr int kColumns = kStrips * kStrip;
  static constexpr int kInFlight = kVector ? 8 : 4;  // quads of C that a thread reads at once
  static constexpr int kBatchRows = kInFlight / kStrips;
  static constexpr bool kAhead = kStrips == 1;  // with few blocks: C is read before all else
  /// Of the lane's token; of the one that comes, not their logarithms but the gates themselves. `forget` of lane kTokens
  /// is m.
  struct Gates {
    float forget = 0, input = 0;
  };

  DEVICE_FUNCTION int64_t slot_of(int j) const { return int64_t{item} * l.ring.tokens + j; }
  DEVICE_FUNCTION int64_t base_of(const View& x) const {
    return item / p.num_heads * x.batch + item % p.num_heads * x.head;
  }
  DEVICE_FUNCTION float key(int j, int d) const {
    if (j == kept)
      return load_number(p.call.k.data, base_of(p.call.k) + d * p.call.k.inner, p.dtype);
    return load_number(l.ring.keys, slot_of(j) * p.dqk + d, p.dtype);
  }
  template <class T>
  DEVICE_FUNCTION const T* key_row(int j) const {
    if (j == kept) return static_cast<const T*>(p.call.k.data) + base_of(p.call.k);
    return static_cast<const T*>(l.ring.keys) + slot_of(j) * p.dqk;
  }
  DEVICE_FUNCTION float* kept_gates() const { return l.ring.gates + slot_of(lane) * 2; }
  DEVICE_FUNCTION Gates load_gates() const {
    Gates own;
    if (lane == kTokens && !p.sigmoid_input_gate) own.forget = p.call.m[item];
    if (lane < kept) {
      own.forget = kept_gates()[0];
      own.input = kept_gates()[1];
    } else if (lane < used) {
      own.forget = load_number(p.call.fgate.data, base_of(p.call.fgate), p.fgate_dtype);
      own.input = load_number(p.call.igate.data, base_of(p.call.igate), p.igate_dtype);
    }
    return own;
  }

  /// The weights of the tokens and of the state in units of e^m. The token's own gates join the ring.
  DEVICE_FUNCTION void decays(Gates own) {
    if (lane == kept && l.token) {
      own.forget = log_sigmoid(own.forget);
      if (p.sigmoid_input_gate) own.input = log_sigmoid(own.input);
      if (!folds && tile == 0) kept_gates()[0] = own.forget, kept_gates()[1] = own.input;
    }
    double after = 0, log_weight = 0, m = -1e300;
    for (int j = used - 1; j >= 0; --j) {
      const u32 from = static_cast<u32>(j);
      const float forget = prim::float_of(prim::shfl(prim::bits_of(own.forget), from));
      const float input = prim::float_of(prim::shfl(prim::bits_of(own.input), from));
      const double log_token = after + at_least(input, kMinLogInput);
      after += at_least(forget, kMinLogForget);
      m = max_nan(log_token, m);
      if (lane == j) log_weight = log_token;
    }
    const float old_m = prim::float_of(prim::shfl(prim::bits_of(own.forget), kTokens));
    if (!p.sigmoid_input_gate) after += at_least(old_m, kMinLogInput);
    m = p.sigmoid_input_gate ? 0 : static_cast<double>(static_cast<float>(max_nan(after, m)));
    if (lane < used) s.weights[lane] = exp2_of((log_weight - m) * kLog2e);
    if (lane != 0) return;
    s.weights[kTokens] = exp2_of((after - m) * kLog2e);
    s.m = static_cast<float>(m);
    s.floor = p.sigmoid_input_gate ? 1 : floor_of(m);
  }

  /// Whether number d of the token's key is the tile's to keep.
  DEVICE_FUNCTION bool in_part(int d) const {
    return d >= tile * l.key_part && d < (tile + 1) * l.key_part;
  }
  /// The values of the tile, as they lie in memory.
  DEVICE_FUNCTION void load_values(u32 (&values)[kStrips]) const {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const int j = (thread + i * kThreads) / kColumns, col = first_column + thread % kColumns;
      if (j >= used || col >= p.dv) continue;
      const View& v = p.call.v;
      const void* data = j == kept ? v.data : l.ring.values;
      const int64_t at = j == kept ? base_of(v) + col * v.inner : slot_of(j) * p.dv + col;
      values[i] = p.dtype == Dtype::kFloat32 ? static_cast<const u32*>(data)[at]
                                             : static_cast<const u16*>(data)[at];
    }
  }
  /// To shared memory; the token's own join the ring.
  DEVICE_FUNCTION void keep_values(const u32 (&values)[kStrips]) {
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const int j = (thread + i * kThreads) / kColumns, col = first_column + thread % kColumns;
      if (j >= used) continue;
      const float x = p.dtype == Dtype::kFloat32
                          ? prim::float_of(values[i])
                          : half_to_float(static_cast<u16>(values[i]), p.dtype);
      s.values[j][thread % kColumns] = col < p.dv ? x : 0.0F;
      if (j == kept && !folds && col < p.dv)
        store_number(l.ring.values, slot_of(j) * p.dv + col, p.dtype, x);
    }
  }

  /// Of rows [first, end): q, for a fold the keys, both to shared memory, and their products; the token's own key joins the
  /// ring, in parts of the tiles. The warp's tokens are warp + i * kWarps; kStateWarp's last product is that of n.
  template <class T>
  DEVICE_FUNCTION void load_rows(int first, int end, float (&dot)[kHeld + 1]) {
    constexpr int kNumbers = Piece<T>::kNumbers, kPieces = sizeof(T) == 4 ? 2 : 1;  // at once
    const bool state = l.token && p.normalize && warp == kStateWarp;
    const T* const q_row = static_cast<const T*>(p.call.q.data) + base_of(p.call.q);
    const float* const n_row = p.call.n + int64_t{item} * p.dqk;
    const T* key_rows[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) key_rows[i] = key_row<T>(warp + i * kWarps);
    for (int start = first; start < end; start += kPieces * 32 * kNumbers) {
      Piece<T> q[kPieces], keys[kPieces][kHeld];
      Piece<float> n[kPieces][kNumbers / 4];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int d = start + (piece * 32 + lane) * kNumbers;
        q[piece].load(q_row, d, l.token && d < end);
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
          keys[piece][i].load(key_rows[i], d, warp + i * kWarps < used && d < end);
#pragma unroll
        for (int i = 0; i < kNumbers / 4; ++i) n[piece][i].load(n_row, d + 4 * i, state && d < end);
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int d = start + (piece * 32 + lane) * kNumbers;
        if (d >= end) break;
#pragma unroll
        for (int e = 0; e < kNumbers; ++e) {
          const float x = q[piece][e];
          if (warp == 0) s.q[d - first + e] = x;
#pragma unroll
          for (int i = 0; i < kHeld; ++i) dot[i] += x * keys[piece][i][e];
          dot[kHeld] += x * n[piece][e / 4][e % 4];
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const int j = warp + i * kWarps;
          if (j >= used) continue;
          if (folds) {
#pragma unroll
            for (int e = 0; e < kNumbers; ++e)
              s.rows[j * kRows + d - first + e] = keys[piece][i][e];
          } else if (j == kept && in_part(d)) {
            keys[piece][i].store(l.ring.keys, slot_of(j) * p.dqk + d);
          }
        }
      }
    }
  }
  DEVICE_FUNCTION void load_rows_singly(int first, int end, float (&dot)[kHeld + 1]) {
    const bool state = l.token && p.normalize && warp == kStateWarp;
    const View& view = p.call.q;
    for (int d = first + lane; d < end; d += 32) {
      const float q =
          l.token ? load_number(view.data, base_of(view) + d * view.inner, p.dtype) : 0.0F;
      if (warp == 0) s.q[d - first] = q;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int j = warp + i * kWarps;
        if (j >= used) continue;
        const float k = key(j, d);
        dot[i] += q * k;
        if (folds) s.rows[j * kRows + d - first] = k;
        if (!folds && j == kept && in_part(d))
          store_number(l.ring.keys, slot_of(j) * p.dqk + d, p.dtype, k);
      }
      if (state) dot[kHeld] += q * p.call.n[int64_t{item} * p.dqk + d];
    }
  }
  DEVICE_FUNCTION void write_dots(const float (&dot)[kHeld + 1]) {
#pragma unroll
    for (int i = 0; i <= kHeld; ++i) {
      const float sum = warp_sum(dot[i]);
      const int j = i < kHeld ? warp + i * kWarps : kTokens;
      if (lane == 0 && (i < kHeld || warp == kStateWarp)) s.dots[j] = sum;
    }
  }

  DEVICE_FUNCTION float factor() const {
    if (!p.normalize) return p.scale;
    float product = s.weights[kTokens] * s.dots[kTokens];
    for (int j = 0; j < used; ++j) product += s.weights[j] * s.dots[j];
    product *= p.scale;
    const float size = product < 0 ? -product : product;
    return p.scale / ((size <= s.floor ? s.floor : size) + p.eps);
  }

  // Quad i of a batch: row i / kStrips of the thread's rows from `batch` on, strip i % kStrips.
  DEVICE_FUNCTION int row_of(int first, int batch, int i) const {
    return first + thread / (kStrip / 4) + (batch + i / kStrips) * kGroups;
  }
  DEVICE_FUNCTION int column_of(int i) const {
    return i % kStrips * kStrip + thread % (kStrip / 4) * 4;
  }
  DEVICE_FUNCTION bool exists(int row, int col) const {
    return row < p.dqk && first_column + col < p.dv;
  }
  DEVICE_FUNCTION float* batch_of(int first, int batch) const {
    return p.call.c + (int64_t{item} * p.dqk + row_of(first, batch, 0)) * p.dv + first_column +
           column_of(0);
  }
  DEVICE_FUNCTION int offset_of(int i) const {  // from the batch's first quad
    return i / kStrips * (kGroups * p.dv) + i % kStrips * kStrip;
  }

  DEVICE_FUNCTION void load_batch(int first, int batch, float (&x)[kInFlight][4]) const {
    const float* c = batch_of(first, batch);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = row_of(first, batch, i), col = column_of(i);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][e] = 0;
      if (exists(row, col)) load_four<kVector>(c + offset_of(i), p.dv - first_column - col, x[i]);
    }
  }
  DEVICE_FUNCTION void add_batch(int first, int batch, const float (&x)[kInFlight][4],
                                 float (&sum)[kStrips][4]) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = row_of(first, batch, i);
      if (row >= p.dqk) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i % kStrips][e] += s.q[row - first] * x[i][e];
    }
  }
  DEVICE_FUNCTION void fold_batch(int first, int batch, float (&x)[kInFlight][4]) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][e] *= s.weights[kTokens];
    }
#pragma unroll 1
    for (int j = 0; j < used; ++j) {
      float keys[kBatchRows];
#pragma unroll
      for (int i = 0; i < kBatchRows; ++i)
        keys[i] = s.weights[j] * s.rows[j * kRows + row_of(0, batch, i * kStrips)];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        const float* v = &s.values[j][column_of(strip)];
#pragma unroll
        for (int i = strip; i < kInFlight; i += kStrips) {
#pragma unroll
          for (int e = 0; e < 4; ++e) x[i][e] += keys[i / kStrips] * v[e];
        }
      }
    }
    float* c = batch_of(first, batch);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = row_of(first, batch, i), col = column_of(i);
      if (exists(row, col)) store_four<kVector>(c + offset_of(i), p.dv - first_column - col, x[i]);
    }
  }

  DEVICE_FUNCTION void write_output(const float (&sum)[kStrips][4]) {
    prim::sync_block();  // the keys are done with
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s.rows[thread / (kStrip / 4) * kColumns + column_of(strip) + e] = sum[strip][e];
    }
    prim::sync_block();
    const int out = first_column + thread;
    if (thread >= kColumns || out >= p.dv) return;
    float parts[4] = {};
#pragma unroll 4
    for (int group = 0; group < kGroups; group += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[i] += s.rows[(group + i) * kColumns + thread];
    }
    float total = s.weights[kTokens] * ((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (int j = 0; j < used; ++j) total += s.dots[j] * (s.weights[j] * s.values[j][thread]);
    const View& h = p.call.h;
    store_number(h.data, base_of(h) + out * h.inner, p.dtype, total * factor());
  }

  DEVICE_FUNCTION void replace_normaliser() {
    for (int d = thread; d < p.dqk; d += kThreads) {
      float* n = p.call.n + int64_t{item} * p.dqk + d;
      float sum = s.weights[kTokens] * *n;
#pragma unroll 4
      for (int j = 0; j < used; ++j) sum += s.weights[j] * key(j, d);
      *n = sum;
    }
  }

  const LazyLaunch& l;
  const StepParams& p;
  LazyShared& s;
  const int thread, warp, lane, item, tile, first_column;
  int kept = 0, used = 0;  ///< tokens in the ring, before and with this one
  bool folds = false;
};

template <bool kVector, int kStrips>
KERNEL_FUNCTION(kThreads, 2)
mlstm_step_lazy_columns(const GRID_CONSTANT LazyLaunch l) {
  const int block = static_cast<int>(prim::block_idx().x);
  LazyBlock<kVector, kStrips>(l, *reinterpret_cast<LazyShared*>(prim::dynamic_shared()),
                              block / l.tiles, block % l.tiles)
      .run();
}

template <bool kVector, int kStrips>
void launch_tiles(LazyLaunch& l, Stream stream) {
  l.tiles = divide_up(l.step.dv, kStrips * kStrip);
  l.key_part = divide_up(divide_up(l.step.dqk, l.tiles), 8) * 8;
  const int32_t blocks = l.step.batch * l.step.num_heads * l.tiles;
  prim::launch("mlstm_step_lazy_columns", mlstm_step_lazy_columns<kVector, kStrips>,
               {static_cast<u32>(blocks), kThreads, sizeof(LazyShared)}, l, stream);
}

void launch_lazy(const MlstmProblem& problem, const MlstmStep& call, const MlstmRing& ring,
                 bool token, Stream stream) {
  LazyLaunch l;
  l.step = step_params(problem, call);
  l.ring = ring;
  l.token = token;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const auto vector = [&](const View& x) {
    return operand_of(x, problem.dqk, problem.dtype).vector;
  };
  l.vector_rows = l.step.dqk % 8 == 0 && vector(call.q) && vector(call.k) && aligned(ring.keys) &&
                  aligned(call.n);
  constexpr int32_t kManyBlocks = 264;  // as are resident together on 132 multiprocessors
  const int32_t items = l.step.batch * l.step.num_heads;
  if (l.step.dv % 4 != 0 || !aligned(call.c)) {
    launch_tiles<false, 1>(l, stream);
  } else if (items * divide_up(l.step.dv, kStrip) <= kManyBlocks) {
    launch_tiles<true, 1>(l, stream);
  } else {
    launch_tiles<true, kManyStrips>(l, stream);
  }
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
