// mbarriers, asynchronous remote stores, the register pool: correct kernels.
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

void parities(std::uint64_t seed) {
  launch({.block = {1}, .shared_bytes = 64, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    prim::mbar_init(bar, 2);
    prim::fence_mbar_init();
    expect(prim::mbar_test(bar, 1) && !prim::mbar_test(bar, 0), "fresh barrier");
    prim::mbar_arrive(bar);
    expect(!prim::mbar_test(bar, 0), "one arrival of two");
    prim::mbar_arrive(bar);
    expect(prim::mbar_test(bar, 0) && !prim::mbar_test(bar, 1), "after one phase");
    prim::mbar_expect_tx(bar, 16);
    prim::mbar_arrive(bar);
    prim::mbar_arrive_expect_tx(bar, 0);
    expect(!prim::mbar_test(bar, 1), "arrivals are complete, bytes are not");
    alignas(16) float source[4] = {1, 2, 3, 4};
    auto* tile = reinterpret_cast<float*>(prim::dynamic_shared() + 16);
    prim::bulk_load(tile, source, 16, bar);
    prim::mbar_wait(bar, 1);
    expect(tile[3] == 4 && !prim::mbar_test(bar, 0), "after two phases");
    prim::mbar_inval(bar);
    prim::mbar_init(bar, 1);
    expect(prim::mbar_test(bar, 1), "a new barrier in the same place");
  });
}

void barrier_ring(std::uint64_t seed) {  // one warp produces for two, through a ring of two slots
  constexpr u32 kSlots = 2, kUses = 7;
  std::vector<u32> out(64 * kUses);
  launch({.block = {96}, .shared_bytes = 512, .seed = seed}, [&] {
    u64 *full = shared_barriers(), *empty = full + kSlots;
    auto* slots = reinterpret_cast<u32*>(full + 8);
    const u32 t = prim::thread_idx().x;
    if (t == 0) {
      for (u32 s = 0; s < kSlots; ++s)
        prim::mbar_init(full + s, 32), prim::mbar_init(empty + s, 64);
      prim::fence_mbar_init();
    }
    prim::sync_block();
    for (u32 i = 0; i < kUses; ++i) {
      const u32 s = i % kSlots, parity = i / kSlots & 1;
      if (t < 32) {
        prim::mbar_wait(empty + s, parity ^ 1);
        slots[32 * s + t] = 100 * i + t;
        prim::mbar_arrive(full + s);
      } else {
        prim::mbar_wait(full + s, parity);
        out[64 * i + t - 32] = slots[32 * s + (t + 9) % 32];
        prim::mbar_arrive(empty + s);
      }
    }
  });
  for (u32 i = 0; i < out.size(); ++i)
    expect(out[i] == 100 * (i / 64) + (i + 9) % 32, "ring of mbarriers", i);
}

template <bool kCounted>
void copies_arrive(std::uint64_t seed) {  // cp.async by 32 threads, waited for by 32 others
  std::vector<float> in(128), out(32);
  for (u32 i = 0; i < in.size(); ++i) in[i] = small_value(i);
  launch({.block = {64}, .shared_bytes = 1024, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    auto* tile = reinterpret_cast<float*>(bar + 2);
    const u32 t = prim::thread_idx().x;
    if (t == 0) prim::mbar_init(bar, 32), prim::fence_mbar_init();
    prim::sync_block();
    if (t < 32) {
      prim::cp_async16(tile + 4 * t, in.data() + 4 * t);
      if (kCounted) {
        prim::cp_async_mbar_arrive_noinc(bar);
      } else {
        prim::cp_async_mbar_arrive(bar);
        prim::mbar_arrive(bar);
      }
      return;
    }
    prim::mbar_wait(bar, 0);
    out[t - 32] = tile[4 * (t - 32) + 3];
  });
  for (u32 i = 0; i < 32; ++i) expect(out[i] == in[4 * i + 3], "cp.async and mbarrier", i);
}

void remote_stores(std::uint64_t seed) {  // every block sends to the next one, in three ways
  std::vector<u32> out(4 * 96);
  launch({.grid = {4}, .block = {32}, .shared_bytes = 2048, .cluster = 4, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    auto* s = reinterpret_cast<u32*>(bar + 2);
    const u32 t = prim::thread_idx().x, rank = prim::cluster_rank(), next = (rank + 1) % 4;
    if (t == 0) prim::mbar_init(bar, 1), prim::mbar_init(bar + 1, 32), prim::fence_mbar_init();
    prim::cluster_sync();
    if (t == 0) prim::mbar_arrive_expect_tx(bar, 3 * 128);
    s[96 + t] = 3000 + 100 * rank + t;
    prim::fence_proxy_async();
    prim::sync_block();
    prim::st_async(s + t, next, 1000 + 100 * rank + t, bar);
    if (t < 8) {
      const u32 base = 2000 + 100 * rank + 4 * t;
      prim::st_async_x4(s + 32 + 4 * t, next, {base, base + 1, base + 2, base + 3}, bar);
    }
    if (t == 0) prim::bulk_copy_remote(s + 64, next, s + 96, 128, bar);
    prim::mbar_wait_cluster(bar, 0);
    for (u32 i = 0; i < 3; ++i) out[96 * rank + 32 * i + t] = s[32 * i + t];
    // Ordinary stores, published by remote arrivals.
    prim::remote_store_x4(s + 128 + 4 * t, next, {t, rank, 7, 8});
    prim::mbar_arrive_remote(bar + 1, next);
    prim::mbar_wait_cluster(bar + 1, 0);
    const u32* got = s + 128 + 4 * ((t + 5) % 32);
    expect(got[0] == (t + 5) % 32 && got[1] == (rank + 3) % 4 && got[3] == 8, "remote_store_x4", t);
    prim::cluster_sync();
  });
  for (u32 i = 0; i < out.size(); ++i)
    expect(out[i] == 1000 * (i % 96 / 32 + 1) + 100 * ((i / 96 + 3) % 4) + i % 32, "remote", i);
}

// Two blocks of a cluster load halves of a tile and send them to both, three times through one slot.
void multicast(std::uint64_t seed) {
  constexpr u32 kSteps = 3;
  std::vector<u16> in(kSteps * 128 * 64);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i * 7);
  const TensorMap map = matrix_map(in.data(), 64, kSteps * 128, 64, 64, 64, Swizzle::k128);
  std::vector<u16> out(2 * in.size());
  launch({.grid = {2}, .block = {64}, .shared_bytes = kTile + 16384, .cluster = 2, .seed = seed},
         [&] {
           u64 *full = shared_barriers(), *empty = full + 1;
           auto* tile = reinterpret_cast<u16*>(prim::dynamic_shared() + kTile);
           const u32 t = prim::thread_idx().x, rank = prim::cluster_rank();
           if (t == 0) {
             prim::mbar_init(full, 1);
             prim::mbar_init(empty, 2);  // a consumer warp of each block
             prim::fence_mbar_init();
           }
           prim::cluster_sync();
           for (u32 i = 0; i < kSteps; ++i) {
             if (t == 0) {
               prim::mbar_wait_cluster(empty, (i & 1) ^ 1);
               prim::mbar_arrive_expect_tx(full, 16384);
               prim::tma_load_2d_multicast(tile + 4096 * rank, map, 0,
                                           static_cast<int>(128 * i + 64 * rank), full, 3);
             }
             if (t >= 32) {
               prim::mbar_wait(full, i & 1);
               for (u32 e = t - 32; e < 8192; e += 32) {
                 const u32 at = prim::swizzled(2 * e, Swizzle::k128) / 2;
                 out[rank * in.size() + 8192 * i + e] = tile[at];
               }
               prim::sync_warp();
               if (t < 34) prim::mbar_arrive_remote(empty, t - 32);
             }
             prim::sync_warp();
           }
           prim::cluster_sync();
         });
  for (u32 i = 0; i < out.size(); ++i) expect(out[i] == in[i % in.size()], "multicast", i);
}

void register_pool(std::uint64_t seed) {  // 24 + 240 + 240 registers fit into three times 168
  u32 passed = 0;
  launch({.block = {384}, .seed = seed, .registers_per_thread = 168}, [&] {
    if (prim::thread_idx().x < 128) {
      prim::set_max_registers_down<24>();
    } else {
      prim::set_max_registers_up<240>();
    }
    prim::atomic_add(&passed, 1);
  });
  expect(passed == 384, "threads past setmaxnreg");
}

const Case kCases[] = {
    {"mbarrier parities and bytes", parities},
    {"ring of mbarriers", barrier_ring},
    {"cp.async that arrives", copies_arrive<false>},
    {"cp.async that arrives, counted", copies_arrive<true>},
    {"asynchronous remote stores", remote_stores},
    {"multicast", multicast},
    {"register pool", register_pool},
};

}  // namespace

List<Case> sm90_cases() { return {kCases, sizeof kCases / sizeof *kCases}; }

}  // namespace simt_test
