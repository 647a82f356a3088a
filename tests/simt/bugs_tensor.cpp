// Kernels with a planted bug: tensor loads and stores.
#include <vector>

#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"
#include "tests/simt/cases.h"
#include "tests/simt/tensor_cases.h"

namespace simt_test {
namespace {

using prim::Swizzle;
using prim::TensorMap;
using prim::u16;
using prim::u32;
using prim::u64;
using simt::launch;

u64* shared_barriers() { return reinterpret_cast<u64*>(prim::dynamic_shared()); }
u16* shared_tile() { return reinterpret_cast<u16*>(prim::dynamic_shared() + kTile); }

// Loads ----------------------------------------------------------------------------------------------------------------

/// Elements of a picture to look at: with a bug every single one is a report.
u32 sampled(u32 i) { return 64 * i + 5 * i % 64; }

/// One warp loads two boxes and copies a part of them out.
struct LoadFlaws {
  bool fence = true, wait = true;
  u32 expected = 8192, tile_shift = 0, shared_offset = 0;
  u32 parity = 0;
};
void load_two(const LoadFlaws& flaws, std::uint64_t seed) {
  Picture picture;
  std::vector<u16> out(64);
  launch({.block = {32},
          .shared_bytes = kTile + 8192 + flaws.tile_shift,
          .seed = seed,
          .shared_offset = flaws.shared_offset},
         [&] {
           u64* bar = shared_barriers();
           u16* tile = shared_tile() + flaws.tile_shift / 2;
           const u32 t = prim::thread_idx().x;
           if (t == 0) {
             prim::mbar_init(bar, 1);
             if (flaws.fence) prim::fence_mbar_init();
             prim::mbar_arrive_expect_tx(bar, flaws.expected);
             prim::tma_load_2d(tile, picture.map, 0, 0, bar);
             prim::tma_load_2d(tile + 2048, picture.map, 0, 32, bar);
           }
           prim::sync_warp();
           if (flaws.wait) prim::mbar_wait(bar, flaws.parity);
           for (u32 i = 0; i < 2; ++i)
             out[2 * t + i] = tile[prim::swizzled(2 * sampled(2 * t + i), Swizzle::k128) / 2];
           if (!flaws.wait) prim::mbar_wait(bar, 0);
         });
  for (u32 i = 0; i < out.size(); ++i) expect(out[i] == sampled(i), "loaded", i);
}
template <u32 kExpected>
void expects(std::uint64_t seed) {
  LoadFlaws flaws;
  flaws.expected = kExpected;
  load_two(flaws, seed);
}
void init_not_fenced(std::uint64_t seed) {
  LoadFlaws flaws;
  flaws.fence = false;
  load_two(flaws, seed);
}
void load_not_waited(std::uint64_t seed) {
  LoadFlaws flaws;
  flaws.wait = false;
  load_two(flaws, seed);
}
void load_wrong_parity(std::uint64_t seed) {
  LoadFlaws flaws;
  flaws.parity = 1;
  load_two(flaws, seed);
}
void load_misaligned(std::uint64_t seed) {
  LoadFlaws flaws;
  flaws.tile_shift = 64;
  load_two(flaws, seed);
}
void load_misaligned_window(std::uint64_t seed) {  // the kernel swizzles by offsets into its tile
  LoadFlaws flaws;
  flaws.shared_offset = 256;
  load_two(flaws, seed);
}

enum class Refill { kNoEmptyWait, kWaitsForFull };
/// A producer thread refills one slot for a consumer warp.
template <Refill kRefill>
void refill(std::uint64_t seed) {
  Picture picture;
  std::vector<u16> out(2 * 2048);
  launch({.block = {64}, .shared_bytes = kTile + 4096, .seed = seed}, [&] {
    u64 *full = shared_barriers(), *empty = full + 1;
    const u32 t = prim::thread_idx().x;
    if (t == 0) prim::mbar_init(full, 1), prim::mbar_init(empty, 32), prim::fence_mbar_init();
    prim::sync_block();
    if (t == 0) {
      for (u32 i = 0; i < 2; ++i) {
        if (kRefill == Refill::kWaitsForFull && i > 0) prim::mbar_wait(full, 0);
        prim::mbar_arrive_expect_tx(full, 4096);
        prim::tma_load_2d(shared_tile(), picture.map, 0, static_cast<int>(32 * i), full);
      }
    } else if (t >= 32) {
      for (u32 i = 0; i < 2; ++i) {
        prim::mbar_wait(full, i);
        for (u32 e = t - 32; e < 2048; e += 256)
          out[2048 * i + e] = shared_tile()[prim::swizzled(2 * e, Swizzle::k128) / 2];
        if (i == 0) prim::mbar_arrive(empty);
      }
    }
  });
}

void past_the_tensor(std::uint64_t seed) {  // the map promises more rows than were allocated
  std::vector<u16> data(64 * 48);
  const TensorMap map = matrix_map(data.data(), 64, 64, 64, 64, 32, Swizzle::k128);
  launch({.block = {1}, .shared_bytes = kTile + 4096, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
    prim::mbar_arrive_expect_tx(bar, 4096);
    prim::tma_load_2d(shared_tile(), map, 0, 32, bar);
    prim::mbar_wait(bar, 0);
  });
}
void load_at_odd_column(std::uint64_t seed) {
  Picture picture;
  launch({.block = {1}, .shared_bytes = kTile + 4096, .seed = seed},
         [&] { prim::tma_load_2d(shared_tile(), picture.map, 3, 0, shared_barriers()); });
}
void store_over_odd_edge(std::uint64_t seed) {
  std::vector<u16> data(64 * 32);
  const TensorMap map = matrix_map(data.data(), 60, 32, 64, 64, 32, Swizzle::k128);
  launch({.block = {1}, .shared_bytes = kTile + 4096, .seed = seed},
         [&] { prim::tma_store_2d(map, shared_tile(), 0, 0); });
}
void no_tensor_map(std::uint64_t seed) {
  const TensorMap map{};
  launch({.block = {1}, .shared_bytes = kTile + 4096, .seed = seed},
         [&] { prim::tma_load_2d(shared_tile(), map, 0, 0, shared_barriers()); });
}
void wrong_rank(std::uint64_t seed) {
  Picture picture;
  launch({.block = {1}, .shared_bytes = kTile + 4096, .seed = seed},
         [&] { prim::tma_load_3d(shared_tile(), picture.map, 0, 0, 0, shared_barriers()); });
}

// Stores ---------------------------------------------------------------------------------------------------------------

struct StoreFlaws {
  bool fence = true, commit = true, wait_read = true;
  int row = 0;
};
/// One warp writes a box and stores it; `after` runs between the issue and the wait.
template <class After>
void store(const StoreFlaws& flaws, std::uint64_t seed, After after) {
  Picture picture;
  for (u16& v : picture.data) v = 0;
  launch({.block = {32}, .shared_bytes = kTile + 4096, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x;
    for (u32 i = t; i < 2048; i += 32)
      shared_tile()[prim::swizzled(2 * i, Swizzle::k128) / 2] = static_cast<u16>(i + 1);
    if (flaws.fence) prim::fence_proxy_async();
    prim::sync_warp();
    if (t != 0) return;
    prim::tma_store_2d(picture.map, shared_tile(), 0, flaws.row);
    if (flaws.commit) prim::tma_store_commit();
    after(picture);
    if (flaws.wait_read) prim::tma_store_wait_read<0>();
  });
  for (u32 i = 0; i < 2048; ++i) expect(picture.data[i] == i + 1, "stored", i);
}
const auto kNothing = [](Picture&) {};

void store_without_fence(std::uint64_t seed) {
  StoreFlaws flaws;
  flaws.fence = false;
  store(flaws, seed, kNothing);
}
void store_not_committed(std::uint64_t seed) {
  StoreFlaws flaws;
  flaws.commit = false;
  store(flaws, seed, kNothing);
}
void store_not_waited(std::uint64_t seed) {
  StoreFlaws flaws;
  flaws.wait_read = false;
  store(flaws, seed, kNothing);
}
void store_negative(std::uint64_t seed) {
  StoreFlaws flaws;
  flaws.row = -1;
  store(flaws, seed, kNothing);
}
void store_source_overwritten(std::uint64_t seed) {
  store({}, seed, [](Picture&) { shared_tile()[5] = 0; });
}
void store_read_back(std::uint64_t seed) {  // wait_read does not mean written
  store({}, seed, [](Picture& picture) {
    prim::tma_store_wait_read<0>();
    expect(picture.data[5] == 6, "read back");
  });
}

const Planted kBugs[] = {
    {"too few bytes expected", expects<4096>, "copies into it are under way"},
    {"too many bytes expected of a load", expects<8208>, "deadlock: {32 threads in mbarrier wait"},
    {"init not fenced", init_not_fenced, "fence_mbar_init"},
    {"load not waited for", load_not_waited, "wrong values", true},
    {"load waited for by the wrong parity", load_wrong_parity, "copies into it are under way",
     true},
    {"tile at a multiple of 64", load_misaligned, "128-byte aligned"},
    {"shared window not at a multiple of 1024", load_misaligned_window, "wrong values"},
    {"refill without a wait", refill<Refill::kNoEmptyWait>, "mbarrier: more arrivals"},
    {"refill before the slot is read", refill<Refill::kWaitsForFull>, nullptr, true},
    {"tensor map beyond its memory", past_the_tensor, nullptr, false, true},
    {"innermost coordinate within 16 bytes", load_at_odd_column, "no multiple of 16 bytes"},
    {"store clipped within 16 bytes", store_over_odd_edge, "no multiple of 16 bytes"},
    {"no tensor map", no_tensor_map, "make_tensor_map"},
    {"tensor map of another rank", wrong_rank, "has rank 2"},
    {"no fence before a tensor store", store_without_fence, "wrong values", true},
    {"tensor store never committed", store_not_committed, "never committed"},
    {"tensor store never waited for", store_not_waited, "may still be read"},
    {"negative coordinate of a tensor store", store_negative, "negative"},
    {"store source overwritten before wait_read", store_source_overwritten, "was overwritten",
     true},
    {"tensor store read back after wait_read", store_read_back, "wrong values", true},
};

}  // namespace

List<Planted> tensor_bugs() { return {kBugs, sizeof kBugs / sizeof *kBugs}; }

}  // namespace simt_test
