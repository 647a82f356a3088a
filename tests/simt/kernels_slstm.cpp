// The persistent sLSTM kernels against the recurrence and its gradients: cells, types, sizes, exchanges, documents.
#include "tests/simt/slstm_call.h"

namespace simt_test {
namespace {

using xlstm::cuda::Direction;
using xlstm::cuda::SlstmMap;

constexpr DeviceLimits kAmpere{80, 108, 163 * 1024}, kHopper{90, 132, 227 * 1024, true};
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr SlstmCell kCells[] = {SlstmCell::kSlstm, SlstmCell::kSlstmExpf, SlstmCell::kLstm};
constexpr GateOrder kOrders[] = {GateOrder::kFirst, GateOrder::kMiddle, GateOrder::kLast,
                                 GateOrder::kGaps};

double forget_of(SlstmCell cell) { return cell == SlstmCell::kSlstmExpf ? -1 : 1; }

void cells_and_types(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    for (const SlstmCell cell : kCells)
      run({.cell = cell, .batch = 3, .dtype = dtype, .states = true, .forget = forget_of(cell)},
          seed);
}

/// Every cell through every exchange, with two tiles of sequences, of which one is partial. The sanitizers see one of them.
void exchanges(uint64_t seed) {
  constexpr SlstmExchange kExchanges[] = {SlstmExchange::kBlock, SlstmExchange::kCluster,
                                          SlstmExchange::kGrid};
  for (const SlstmExchange exchange : kExchanges)
    for (const SlstmCell cell : kCells) {
      const bool last = cell == SlstmCell::kLstm;
      if (!plain() && cell != SlstmCell::kSlstm) continue;
      run({.cell = cell,
           .batch = last ? 17 : 9,
           .time = 3,
           .heads = last || !plain() ? 1 : 2,
           .dh = exchange == SlstmExchange::kBlock ? 24 : 40,
           .dtype = last ? Dtype::kBFloat16 : Dtype::kFloat32,
           .exchange = exchange,
           .device = kHopper,
           .states = true,
           .forget = forget_of(cell)},
          seed);
    }
}

constexpr Dtype kF32 = Dtype::kFloat32, kBf16 = Dtype::kBFloat16, kF16 = Dtype::kFloat16;
constexpr SlstmCell kSlstm = SlstmCell::kSlstm, kExpf = SlstmCell::kSlstmExpf,
                    kLstm = SlstmCell::kLstm;
constexpr SlstmExchange kBlock = SlstmExchange::kBlock, kCluster = SlstmExchange::kCluster,
                        kGrid = SlstmExchange::kGrid;

struct Combination {
  int64_t dh, time, batch;
  Dtype dtype;
  SlstmCell cell;
  SlstmExchange exchange;
  bool states = false, resets = false;
};
/// Every size with every kind of number, cell and exchange at least once, long sequences where heads are small.
constexpr Combination kCombinations[] = {
    {8, 64, 3, kF32, kSlstm, kBlock, true, true},
    {8, 17, 17, kBf16, kLstm, kBlock},
    {8, 2, 8, kF16, kExpf, kBlock, true},
    {16, 17, 8, kF16, kExpf, kBlock, false, true},
    {16, 1, 16, kF32, kLstm, kBlock, true},
    {16, 64, 1, kBf16, kSlstm, kBlock, true, true},
    {24, 2, 17, kF16, kSlstm, kGrid, true},
    {24, 64, 1, kBf16, kExpf, kCluster, true, true},
    {24, 17, 3, kF32, kLstm, kGrid, true, true},
    {64, 17, 16, kBf16, kSlstm, kBlock, true},
    {64, 2, 3, kF32, kExpf, kCluster, true, true},
    {64, 17, 1, kF16, kLstm, kGrid, false, true},
    {64, 1, 8, kBf16, kExpf, kGrid},
    {96, 1, 17, kBf16, kSlstm, kCluster, true},
    {96, 17, 3, kF32, kLstm, kBlock, true, true},
    {96, 2, 8, kF16, kExpf, kGrid, true},
    {128, 2, 16, kF32, kSlstm, kBlock, true},
    {128, 17, 1, kF16, kLstm, kCluster, true, true},
    {128, 1, 3, kBf16, kExpf, kGrid, true},
    {128, 2, 17, kBf16, kExpf, kBlock, true},
    {192, 2, 1, kF16, kSlstm, kCluster, true},
    {192, 17, 3, kBf16, kLstm, kGrid, true, true},
    {192, 1, 8, kF32, kExpf, kCluster, true},
    {256, 2, 16, kBf16, kExpf, kCluster, true},
    {256, 2, 1, kF32, kSlstm, kGrid, true, true},
    {256, 1, 3, kF16, kLstm, kGrid, true},
    {384, 2, 1, kBf16, kLstm, kCluster, true},
    {384, 1, 3, kF16, kSlstm, kGrid, true},
    {384, 2, 1, kF32, kExpf, kGrid, true},
    {512, 2, 1, kBf16, kSlstm, kCluster, true, true},
    {512, 1, 8, kBf16, kExpf, kGrid, true},
    {512, 2, 1, kF16, kLstm, kGrid, true},
};

/// Large heads take turns with the schedules. The address sanitizer sees the same accesses with heads of one or two blocks,
/// the thread sanitizer with the problems of `exchanges`: it needs seconds for every 100 steps.
void combinations(uint64_t seed) {
  uint64_t i = 0;
  for (const Combination& c : kCombinations) {
    ++i;
    if (c.dh >= 192 && (i % 3 != seed || !plain())) continue;
    if (simt::build_kind() == simt::Build::kThread && (c.exchange != kBlock || c.time > 17))
      continue;
    run({.cell = c.cell,
         .batch = c.batch,
         .time = c.time,
         .dh = c.dh,
         .dtype = c.dtype,
         .exchange = c.exchange,
         .device = kHopper,
         .order = kOrders[i % 4],
         .states = c.states,
         .resets = c.resets,
         .forget = forget_of(c.cell)},
        seed);
  }
}

/// What the devices would take.
void automatic(uint64_t seed) {
  for (const DeviceLimits& device : {kAmpere, kHopper})
    for (const int64_t dh : {72, 192})
      if (plain() || (dh == 72 && simt::build_kind() == simt::Build::kAddress))
        run({.time = 2, .dh = dh, .device = device, .states = true}, seed);
}

/// More groups of blocks than are resident together: several launches.
void launches(uint64_t seed) {
  const DeviceLimits small{80, 5, 163 * 1024};
  Setting s{.batch = 17,
            .time = plain() ? 18 : 2,
            .heads = 3,
            .dh = 24,
            .dtype = Dtype::kBFloat16,
            .exchange = SlstmExchange::kGrid,
            .device = small,
            .states = true,
            .resets = true};
  if (simt::build_kind() == simt::Build::kThread) s.batch = 1;
  const SlstmMap map = plan_slstm(s.problem(), small, Direction::kForward);
  expect(map.groups > map.groups_per_launch, "more than one launch");
  run(s, seed);
}

/// r and b of either type, gates kept in a narrow one.
void types_of_parameters(uint64_t seed) {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16})
    for (const bool wide : {false, true})
      run({.batch = 2,
           .time = 3,
           .dh = 16,
           .dtype = dtype,
           .gates_dtype = dtype,
           .wide_r = wide,
           .narrow_b = true,
           .states = true},
          seed);
}

/// Pre-activations that the caller computes from y.
void recomputed(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    run({.batch = 2,
         .time = 19,
         .heads = 2,
         .dh = 16,
         .dtype = dtype,
         .states = true,
         .resets = true,
         .recompute = true},
        seed);
  run({.cell = SlstmCell::kLstm,
       .time = 20,
       .states = true,
       .packed = {0, 3, 20},
       .recompute = true},
      seed);
}

/// Weights that do not fit into registers.
void weights_in_shared_memory(uint64_t seed) {
  run({.batch = 2,
       .time = 3,
       .dh = 128,
       .exchange = SlstmExchange::kBlock,
       .device = kHopper,
       .states = true},
      seed);
  if (plain())
    run({.batch = 9,
         .time = 3,
         .dh = 128,
         .dtype = Dtype::kBFloat16,
         .exchange = SlstmExchange::kBlock},
        seed);
}

void long_sequences(uint64_t seed) {
  const int64_t time = plain() ? 64 : 34;
  for (const SlstmCell cell : kCells)
    run({.cell = cell,
         .batch = 2,
         .time = time,
         .dh = 8,
         .order = GateOrder::kLast,
         .resets = true,
         .forget = forget_of(cell)},
        seed);
  run({.batch = 2,
       .time = time,
       .dh = 16,
       .dtype = Dtype::kBFloat16,
       .gates_dtype = Dtype::kBFloat16,
       .states = true,
       .resets = true,
       .forget = 3,
       .input = -3},
      seed);
}

void documents(uint64_t seed) {
  run({.time = 41,
       .heads = 2,
       .dh = 16,
       .states = true,
       .resets = true,
       .packed = {0, 3, 3, 19, 20, 41}},
      seed);
  run({.cell = SlstmCell::kLstm,
       .time = 21,
       .dh = 24,
       .dtype = Dtype::kFloat16,
       .order = GateOrder::kFirst,
       .packed = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 21}},
      seed);
  run({.time = 20,
       .dh = 72,
       .exchange = SlstmExchange::kGrid,
       .states = true,
       .packed = {0, 0, 18, 20}},
      seed);
}

/// Changing a token of one document changes no bit of another.
void documents_are_apart(uint64_t seed) {
  simt::launch_seed = seed;
  for (const bool packed : {false, true}) {
    Setting s{.time = 20, .dh = 16, .dtype = Dtype::kBFloat16, .states = true, .resets = !packed};
    if (packed) s.packed = {0, 14, 20};
    const int64_t end = 14;  // of the document that changes; resets are at 0, 7, 14
    Data x(s, seed), changed(s, seed);
    changed.input.wx.assign(changed.input.wx.size(), 0);
    Numbers values = x.wx.get();
    for (int64_t i = 0; i < end * 4 * s.dh; ++i) values[static_cast<size_t>(i)] = packed ? NAN : 5;
    changed.wx.set(values);
    const Forward a(x, false), b(changed, false);
    expect(a.y.rows(0, end, s.time - end, 0) == b.y.rows(0, end, s.time - end, 0),
           "y of another document");
    expect(a.y.rows(0, end - 7, 7, 0) != b.y.rows(0, end - 7, 7, 0), "y of the changed document");
  }
}

void memory_orders(uint64_t seed) {
  for (const GateOrder order : kOrders)
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
      run({.batch = 2, .time = 3, .heads = 2, .dh = 8, .dtype = dtype, .order = order}, seed);
}

/// Exponents of this size carry errors of 1e-5 themselves: float32 has no better ones.
void extreme_gates(uint64_t seed) {
  for (const double size : {-60.0, 60.0})
    for (const SlstmCell cell : kCells) {
      run({.cell = cell,
           .time = 19,
           .states = true,
           .resets = true,
           .forget = forget_of(cell) + size,
           .slack = 8},
          seed);
      run({.cell = cell,
           .time = 19,
           .states = true,
           .forget = forget_of(cell),
           .input = size,
           .spread = 5,
           .slack = 8},
          seed);
    }
}

void partial_losses(uint64_t seed) {
  run({.batch = 2, .time = 18, .states = true, .loss_of_states = false}, seed);
  run({.batch = 2, .time = 18, .states = true, .loss_of_y = false}, seed);
  run({.cell = SlstmCell::kLstm, .batch = 2, .time = 3, .loss_of_states = false}, seed);
  run({.batch = 2, .time = 18, .heads = 2, .states = true, .same_loss = true}, seed);
  run({.batch = 2, .time = 18, .initial_gradients = false}, seed);
  run({.time = 1, .dh = 40, .exchange = SlstmExchange::kGrid, .initial_gradients = false}, seed);
}

void clip_and_cut(uint64_t seed) {
  for (const SlstmExchange exchange : {SlstmExchange::kBlock, SlstmExchange::kGrid}) {
    const int64_t dh = exchange == SlstmExchange::kBlock ? 16 : 40;
    run({.batch = 2, .time = 5, .dh = dh, .exchange = exchange, .states = true, .clip = 0.1}, seed);
    run({.batch = 2, .time = 5, .dh = dh, .exchange = exchange, .states = true, .cut = true}, seed);
  }
  if (plain())
    run({.batch = 2,
         .time = 5,
         .dh = 72,
         .exchange = SlstmExchange::kCluster,
         .device = kHopper,
         .cut = true},
        seed);
}

/// Token by token the same bits as all at once.
void token_by_token(uint64_t seed) {
  simt::launch_seed = seed;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    Setting all{.batch = 3, .time = 6, .dh = 24, .dtype = dtype, .states = true};
    Data x(all, seed);
    const Forward whole(x, false);
    Setting one = all;
    one.time = 1;
    Data token(one, seed);
    token.y0 = x.y0, token.c0 = x.c0, token.n0 = x.n0, token.m0 = x.m0, token.r = x.r,
    token.b = x.b;
    const Numbers wx = x.wx.get();
    const auto width = static_cast<size_t>(4 * all.dh);
    for (int64_t t = 0; t < all.time; ++t) {
      Numbers values;
      for (int64_t i = 0; i < all.batch; ++i) {
        const auto from = wx.begin() + (i * all.time + t) * static_cast<int64_t>(width);
        values.insert(values.end(), from, from + static_cast<int64_t>(width));
      }
      token.wx.set(values);
      const Forward step(token, false);
      for (int64_t i = 0; i < all.batch; ++i)
        expect(step.y.rows(i, 0, 1, 0) == whole.y.rows(i, t, 1, 0), "y of one token", t);
      const auto keep = [&](std::vector<float>& to, const GuardedFloats& from) {
        const Numbers state = from.slice(0, all.state_numbers());
        to.assign(state.begin(), state.end());
      };
      keep(token.y0, step.y_last), keep(token.c0, step.c), keep(token.n0, step.n),
          keep(token.m0, step.m);
    }
  }
}

/// The division of the work: what fits where, and that nothing is left over.
void plans(uint64_t) {
  for (const DeviceLimits& device : {kAmpere, DeviceLimits{86, 84, 99 * 1024}, kHopper})
    for (const Dtype dtype : kDtypes)
      for (const int64_t dh : {8, 16, 24, 64, 80, 128, 192, 256, 384, 512, 768, 1000, 1024})
        for (const int64_t batch : {1, 8, 9, 256}) {
          Setting s{
              .batch = batch, .time = 100, .heads = 4, .dh = dh, .dtype = dtype, .device = device};
          for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
            const SlstmMap map = plan_slstm(s.problem(), device, direction);
            if (map.exchange == SlstmExchange::kAuto) continue;
            const xlstm::cuda::SlstmDivision& d = map.division;
            expect(map.shared_bytes <= device.shared_bytes, "shared memory");
            expect(d.padded >= dh && d.padded < dh + 16 && d.padded % 16 == 0, "padded", dh);
            expect(d.units * d.blocks >= d.padded && d.units * (d.blocks - 1) < d.padded, "units",
                   dh);
            expect(map.groups == 4 * d.sequence_tiles && 8 * d.tiles * d.sequence_tiles >= batch,
                   "groups", dh);
            expect(map.exchange != SlstmExchange::kGrid ||
                       map.groups_per_launch * map.blocks <= device.num_multiprocessors,
                   "blocks of a launch are resident together", dh);
          }
          const bool wanted = dh <= 256 || (device.compute_capability != 86 && dh <= 512) ||
                              (dtype == Dtype::kBFloat16 && device.compute_capability != 86);
          if (wanted) expect(slstm_supported(s.problem(), device), "a problem without kernels", dh);
        }
  Setting s{.dh = 1040, .device = kHopper};
  expect(!slstm_supported(s.problem(), kHopper), "more units than 1024");
  s = {.dh = 192, .exchange = SlstmExchange::kCluster};
  expect(!slstm_supported(s.problem(), kAmpere), "a cluster on compute capability 8.0");
  s = {.dh = 192, .exchange = SlstmExchange::kBlock};
  expect(!slstm_supported(s.problem(), kHopper), "a block of 192 units");
}

}  // namespace

List<Case> slstm_cases() {
  static const Case cases[] = {
      {"slstm: plans", plans},
      {"slstm: cells and types in one block", cells_and_types},
      {"slstm: exchanges", exchanges},
      {"slstm: combinations", combinations},
      {"slstm: what the device takes", automatic},
      {"slstm: several launches", launches},
      {"slstm: types of parameters", types_of_parameters},
      {"slstm: pre-activations computed anew", recomputed},
      {"slstm: weights in shared memory", weights_in_shared_memory},
      {"slstm: long sequences", long_sequences},
      {"slstm: documents", documents},
      {"slstm: documents are apart", documents_are_apart},
      {"slstm: memory orders", memory_orders},
      {"slstm: extreme gates", extreme_gates},
      {"slstm: partial losses", partial_losses},
      {"slstm: clip and cut", clip_and_cut},
      {"slstm: token by token", token_by_token},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
