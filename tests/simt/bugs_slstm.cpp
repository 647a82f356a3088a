// The sLSTM's forward kernel with flaws planted into its exchanges.
#include <vector>

#include "cuda/slstm/slstm_forward.cuh"
#include "tests/simt/cases.h"
#include "tests/simt/runtime.h"

namespace simt_test {
namespace {

using prim::u32;
using xlstm::cuda::BlockExchange;
using xlstm::cuda::CellPolicy;
using xlstm::cuda::ClusterExchange;
using xlstm::cuda::Dtype;
using xlstm::cuda::GridExchange;
using xlstm::cuda::SlstmCell;
using xlstm::cuda::SlstmExchangeSpace;

constexpr int kTime = 3, kUnits = 32;

/// Two blocks of 16 units, or one of 32, and one sequence; `splits` warps share the columns of 8 units.
template <class Exchange>
std::vector<float> run_forward(std::uint64_t seed, unsigned cluster, int splits) {
  const int blocks = cluster == 1 ? 1 : 2;
  std::vector<u32> arrivals(1);
  std::vector<xlstm::cuda::bf16> memory(2 * 2 * 8 * kUnits);
  std::vector<float> r(4 * kUnits * kUnits), b(4 * kUnits), last(4 * kUnits);
  std::vector<prim::bf16> wx(kTime * 4 * kUnits), y(kTime * kUnits);
  for (u32 i = 0; i < r.size(); ++i) r[i] = small_value(i) / 16;
  for (u32 i = 0; i < wx.size(); ++i) wx[i].bits = prim::float_to_bf16(small_value(3 * i + 1) / 8);
  xlstm::cuda::SlstmForwardParams p;
  p.shape.division = {kUnits, kUnits / blocks, blocks, splits, 1, 0};
  p.shape.num_sequences = p.shape.num_heads = 1, p.shape.time = kTime, p.shape.dh = kUnits;
  p.shape.dtype = Dtype::kBFloat16;
  p.shape.r_dtype = p.shape.gates_dtype = p.b_dtype = Dtype::kFloat32;
  p.shape.in.r = r.data();
  p.shape.grid = {arrivals.data(), memory.data()};
  p.call.b = b.data();
  p.call.wx = {wx.data(), 0, 4 * kUnits, kUnits, 0, 1};
  p.call.y = {y.data(), 0, kUnits, 0, 1};
  p.call.y_last = &last[0], p.call.c = &last[kUnits], p.call.n = &last[2 * kUnits],
  p.call.m = &last[3 * kUnits];
  using Block = xlstm::cuda::SlstmForwardBlock<CellPolicy<SlstmCell::kSlstm, true>, Exchange, 1, 1>;
  simt::launch({.grid = {static_cast<unsigned>(blocks)},
                .block = {xlstm::cuda::kSlstmThreads},
                .shared_bytes = slstm_shared(Block::kernel(), p.shape.division).total,
                .cluster = cluster,
                .seed = seed},
               [&] { Block(p, prim::dynamic_shared()).run(); });
  std::vector<float> out;
  for (const prim::bf16 each : y) out.push_back(prim::bf16_to_float(each.bits));
  return out;
}

/// What the kernel without the flaw comes to.
template <class Right, int kSplits>
const std::vector<float>& wanted(unsigned cluster) {
  static const std::vector<float> y = run_forward<Right>(0, cluster, kSplits);
  return y;
}
template <class Right, class Wrong, int kSplits = 1>
void compare_with(std::uint64_t seed, unsigned cluster) {
  const std::vector<float>& right = wanted<Right, kSplits>(cluster);
  const std::vector<float> got = run_forward<Wrong>(seed, cluster, kSplits);
  for (size_t i = 0; i < right.size(); ++i) expect(got[i] == right[i], "y", static_cast<long>(i));
}
template <class Wrong>
void in_block(std::uint64_t seed) {
  compare_with<BlockExchange, Wrong>(seed, 1);
}
template <class Wrong>
void in_cluster(std::uint64_t seed) {
  compare_with<ClusterExchange, Wrong>(seed, 2);
}
template <class Wrong>
void in_cluster_of_splits(std::uint64_t seed) {
  compare_with<ClusterExchange, Wrong, 2>(seed, 2);
}
template <class Wrong>
void in_grid(std::uint64_t seed) {
  compare_with<GridExchange, Wrong>(seed, 0);
}

/// The buffers of both parities are one.
template <class Right>
struct OneBuffer : Right {
  static SlstmExchangeSpace halved(SlstmExchangeSpace space) {
    space.numbers = 0;
    return space;
  }
  explicit OneBuffer(const SlstmExchangeSpace& space) : Right(halved(space)) {}
};

// Within a block -------------------------------------------------------------------------------------------------------

struct NoBarrier : BlockExchange {
  using BlockExchange::BlockExchange;
  const xlstm::cuda::bf16* wait(int k, bool) { return s.buffers + (k & 1) * s.numbers; }
};

// Through a cluster ----------------------------------------------------------------------------------------------------

struct OnePeerForgotten : ClusterExchange {
  using ClusterExchange::ClusterExchange;
  void put(int k, int row, int column, const u32 (&words)[4]) {
    auto* to =
        reinterpret_cast<u32*>(s.buffers + (k & 1) * s.numbers + row * (s.columns + 8) + column);
    prim::st_async_x4(to, static_cast<u32>(s.rank), words, s.barriers + (k & 1));
  }
};
struct WaitOfBlockScope : ClusterExchange {
  using ClusterExchange::ClusterExchange;
  const xlstm::cuda::bf16* wait(int k, bool) {
    prim::mbar_wait(s.barriers + (k & 1), static_cast<u32>(k >> 1 & 1));
    if (prim::thread_idx().x == 0) expect(k + 2);
    return s.buffers + (k & 1) * s.numbers;
  }
};
struct TooFewBytes : ClusterExchange {
  using ClusterExchange::ClusterExchange;
  const xlstm::cuda::bf16* wait(int k, bool) {
    prim::mbar_wait_cluster(s.barriers + (k & 1), static_cast<u32>(k >> 1 & 1));
    if (prim::thread_idx().x == 0 && k + 2 < publications)
      prim::mbar_arrive_expect_tx(s.barriers + (k & 1), static_cast<u32>(s.rows * s.columns));
    return s.buffers + (k & 1) * s.numbers;
  }
};
struct SomeLanesStillRead : ClusterExchange {
  using ClusterExchange::ClusterExchange;
  void open(int) {}
};

// Through global memory ------------------------------------------------------------------------------------------------

struct RelaxedFlag : GridExchange {
  using GridExchange::GridExchange;
  void done(int) {
    prim::sync_warp();
    if (prim::thread_idx().x % 32 == 0) prim::atomic_add(s.arrivals, 1);
  }
};
struct OneLaneSpeaksEarly : GridExchange {
  using GridExchange::GridExchange;
  void done(int) {
    if (prim::thread_idx().x % 32 == 0) prim::red_release_add(s.arrivals, 1);
  }
};
struct MissingArrival : GridExchange {
  using GridExchange::GridExchange;
  void done(int k) {
    if (k < 2 || prim::block_idx().x == 0) GridExchange::done(k);
  }
};
struct WaitsForTooFew : GridExchange {
  using GridExchange::GridExchange;
  const xlstm::cuda::bf16* wait(int k, bool) {
    --s.warps;
    const xlstm::cuda::bf16* buffer = GridExchange::wait(k, true);
    ++s.warps;
    return buffer;
  }
};

const Planted kBugs[] = {
    {"sLSTM in a block: no barrier between steps", in_block<NoBarrier>, nullptr, true},
    {"sLSTM in a block: one buffer", in_block<OneBuffer<BlockExchange>>, nullptr, true},
    {"sLSTM in a cluster: a peer forgotten", in_cluster<OnePeerForgotten>,
     "threads in mbarrier wait"},
    {"sLSTM in a cluster: wait of block scope", in_cluster<WaitOfBlockScope>, nullptr, true},
    {"sLSTM in a cluster: too few bytes expected", in_cluster<TooFewBytes>,
     "while copies into it are under way"},
    {"sLSTM in a cluster: lanes that still read", in_cluster_of_splits<SomeLanesStillRead>, nullptr,
     true},
    {"sLSTM in a cluster: one buffer", in_cluster<OneBuffer<ClusterExchange>>, nullptr, true},
    {"sLSTM in a grid: relaxed flag", in_grid<RelaxedFlag>, nullptr, true},
    {"sLSTM in a grid: flag of one lane for its warp", in_grid<OneLaneSpeaksEarly>, nullptr, true},
    {"sLSTM in a grid: waits for too few", in_grid<WaitsForTooFew>, nullptr, true},
    {"sLSTM in a grid: an arrival is missing", in_grid<MissingArrival>, "livelock"},
};

}  // namespace

List<Planted> slstm_bugs() { return {kBugs, sizeof kBugs / sizeof *kBugs}; }

}  // namespace simt_test
