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

/// What the device would take. The head decides on the kernel; few tokens, as every step is alike.
void heads(uint64_t seed) {
  for (const int64_t dh : {8, 24, 64, 96, 128, 192})
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      const int64_t batch = dh == 64   ? 16
                            : dh == 24 ? 8
                                       : 1,
                    time = dh == 8    ? 17
                           : dh <= 64 ? 5
                                      : 2;
      run({.batch = batch, .time = time, .dh = dh, .dtype = dtype, .states = dh % 64 != 0}, seed);
      if (dh > 64 && plain())
        run({.batch = batch,
             .time = time,
             .dh = dh,
             .dtype = dtype,
             .device = kHopper,
             .states = true},
            seed);
    }
}

/// Several blocks per head, weights in shared memory as well, sums over warps. The sanitizers see the same accesses with
/// smaller ones; the thread sanitizer has no room for so many stores in flight.
void large_heads(uint64_t seed) {
  const auto few = [&](int64_t dh, Dtype dtype, const DeviceLimits& device,
                       SlstmExchange exchange) {
    run({.batch = 1, .time = 2, .dh = dh, .dtype = dtype, .exchange = exchange, .device = device},
        seed);
  };
  if (!plain()) return;
  few(256, Dtype::kBFloat16, kHopper, SlstmExchange::kCluster);
  if (seed > 0) return;
  few(256, Dtype::kFloat32, kHopper, SlstmExchange::kAuto);
  few(256, Dtype::kFloat32, kAmpere, SlstmExchange::kAuto);
  few(384, Dtype::kBFloat16, kHopper, SlstmExchange::kCluster);
  few(512, Dtype::kBFloat16, kHopper, SlstmExchange::kCluster);
  few(512, Dtype::kFloat16, kAmpere, SlstmExchange::kGrid);
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
      {"slstm: heads", heads},
      {"slstm: large heads", large_heads},
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
