// The persistent sLSTM kernels by size: which kernel takes a head, and heads of every size against the references.
#include "tests/simt/slstm_call.h"

namespace simt_test {
namespace {

using xlstm::cuda::Direction;
using xlstm::cuda::SlstmMap;

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
    {1000, 1, 1, kBf16, kSlstm, kGrid, true},
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

/// Where blocks cannot be resident together, or clusters are small, the plan does without.
void smaller_devices(uint64_t) {
  for (const int64_t dh : {72, 192, 320, 512, 1024})
    for (const int64_t batch : {1, 64}) {
      for (const bool cooperative : {false, true})
        for (const int largest : {1, 4, 8}) {
          DeviceLimits device = kHopper;
          device.cooperative = cooperative, device.largest_cluster = largest;
          const Setting s{.batch = batch, .time = 100, .heads = 4, .dh = dh, .device = device};
          for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
            const SlstmMap map = plan_slstm(s.problem(), device, direction);
            expect(cooperative || map.exchange != SlstmExchange::kGrid, "a grid", dh);
            expect(map.exchange != SlstmExchange::kCluster || map.blocks <= largest, "a cluster",
                   dh);
          }
        }
    }
  DeviceLimits device = kHopper;
  device.cooperative = false, device.largest_cluster = 1;
  const Setting s{.dh = 512, .device = device};
  expect(!slstm_supported(s.problem(), device), "a head of several blocks on its own");
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
            expect(map.groups == 4 * d.sequence_tiles && 8 * d.sequence_tiles >= batch, "groups",
                   dh);
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

List<Case> slstm_heads_cases() {
  static const Case cases[] = {
      {"slstm: plans", plans},
      {"slstm: plans without clusters and grids", smaller_devices},
      {"slstm: combinations", combinations},
      {"slstm: what the device takes", automatic},
      {"slstm: weights in shared memory", weights_in_shared_memory},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
