// The persistent sLSTM kernels against the recurrence and its gradients: cells, types, exchanges, documents.
#include "tests/simt/slstm_call.h"

namespace simt_test {
namespace {

using xlstm::cuda::Direction;
using xlstm::cuda::SlstmMap;

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

}  // namespace

List<Case> slstm_cases() {
  static const Case cases[] = {
      {"slstm: cells and types in one block", cells_and_types},
      {"slstm: exchanges", exchanges},
      {"slstm: several launches", launches},
      {"slstm: types of parameters", types_of_parameters},
      {"slstm: pre-activations computed anew", recomputed},
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
