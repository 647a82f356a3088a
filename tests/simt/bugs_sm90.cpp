// Kernels with a planted bug: mbarriers, clusters, the register pool.
#include <vector>

#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"
#include "tests/simt/cases.h"
#include "tests/simt/tensor_cases.h"

namespace simt_test {
namespace {

using prim::u16;
using prim::u32;
using prim::u64;
using simt::launch;

u64* shared_barriers() { return reinterpret_cast<u64*>(prim::dynamic_shared()); }
u16* shared_tile() { return reinterpret_cast<u16*>(prim::dynamic_shared() + kTile); }

// mbarriers ------------------------------------------------------------------------------------------------------------

/// One warp, a barrier with one arrival per phase.
template <class Body>
void with_barrier(std::uint64_t seed, Body body) {
  launch({.block = {32}, .shared_bytes = 2 * kTile, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    if (prim::thread_idx().x == 0) prim::mbar_init(bar, 1), prim::fence_mbar_init();
    prim::sync_warp();
    body(bar, prim::thread_idx().x);
  });
}

void over_arrival(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_arrive_expect_tx(bar, 16), prim::mbar_arrive(bar);
  });
}
void not_initialised(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_arrive(bar + 1);
  });
}
void initialised_twice(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_init(bar, 1);
  });
}
void overwritten_barrier(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) *bar = 0, prim::mbar_arrive(bar);
  });
}
void unobserved_phase(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_arrive(bar), prim::mbar_arrive(bar);
  });
}
void waits_for_the_wrong_parity(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_arrive(bar);
    prim::sync_warp();
    prim::mbar_wait(bar, 0);
    prim::mbar_wait(bar, 1);  // of the phase that nobody completes
  });
}
void two_phases_late(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) {
      prim::mbar_arrive(bar), prim::mbar_wait(bar, 0);
      prim::mbar_arrive(bar), prim::mbar_wait(bar, 1);
    }
    prim::sync_warp();
    if (t == 1) prim::mbar_wait(bar, 0);
  });
}
void polls_for_ever(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32) {
    while (!prim::mbar_test(bar, 0)) prim::backoff();
  });
}
void too_many_bytes(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_expect_tx(bar, 1 << 20);
  });
}
void bytes_never_come(std::uint64_t seed) {
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t == 0) prim::mbar_expect_tx(bar, 16);
  });
}
void counted_copy(std::uint64_t seed) {  // the arrival of a copy was not counted at the init
  alignas(16) static float source[4];
  with_barrier(seed, [](u64* bar, u32 t) {
    if (t != 0) return;
    prim::cp_async16(bar + 2, source);
    prim::mbar_arrive_expect_tx(bar, 16);
    prim::cp_async_mbar_arrive_noinc(bar);
    prim::mbar_wait(bar, 0);
  });
}
void copy_read_before_its_barrier(std::uint64_t seed) {
  alignas(16) static float source[4];
  float got = 0;
  with_barrier(seed, [&](u64* bar, u32 t) {
    if (t != 0) return;
    prim::cp_async16(bar + 2, source);
    prim::cp_async_mbar_arrive_noinc(bar);
    got = *reinterpret_cast<float*>(bar + 2);
    prim::mbar_wait(bar, 0);
  });
  expect(got == 0, "value before the wait");
}
void init_without_barrier(std::uint64_t seed) {  // a relaxed flag orders nothing
  u32 flag = 0;
  launch({.block = {64}, .shared_bytes = 64, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    const u32 t = prim::thread_idx().x;
    if (t == 0) prim::mbar_init(bar, 1), prim::fence_mbar_init(), prim::mbar_arrive(bar);
    if (t == 0) prim::atomic_add(&flag, 1);
    if (t != 32) return;
    while (prim::atomic_add(&flag, 0) == 0) prim::backoff();
    prim::mbar_wait(bar, 0);
  });
}

// Clusters -------------------------------------------------------------------------------------------------------------

/// Two blocks of one warp with a barrier of one arrival each.
template <class Body>
void in_cluster(std::uint64_t seed, Body body) {
  launch({.grid = {2}, .block = {32}, .shared_bytes = kTile + 4096, .cluster = 2, .seed = seed},
         [&] {
           u64* bar = shared_barriers();
           const u32 t = prim::thread_idx().x;
           if (t == 0) prim::mbar_init(bar, 1), prim::fence_mbar_init();
           prim::cluster_sync();
           body(bar, prim::cluster_rank(), t);
           prim::cluster_sync();
         });
}

void multicast_unexpected(std::uint64_t seed) {  // the peer does not expect its bytes
  Picture picture;
  in_cluster(seed, [&](u64* bar, u32 rank, u32 t) {
    if (t == 0 && rank == 0) {
      prim::mbar_arrive_expect_tx(bar, 4096);
      prim::tma_load_2d_multicast(shared_tile(), picture.map, 0, 0, bar, 3);
    }
    if (t == 0 && rank == 1) prim::mbar_arrive(bar);
    prim::mbar_wait(bar, 0);
    expect(shared_tile()[1] == 1, "multicast");
  });
}
void multicast_outside(std::uint64_t seed) {
  Picture picture;
  in_cluster(seed, [&](u64* bar, u32, u32 t) {
    if (t == 0) prim::tma_load_2d_multicast(shared_tile(), picture.map, 0, 0, bar, 5);
  });
}
void multicast_before_start(std::uint64_t seed) {
  Picture picture;
  launch({.grid = {2}, .block = {1}, .shared_bytes = kTile + 4096, .cluster = 2, .seed = seed},
         [&] {
           u64* bar = shared_barriers();
           prim::mbar_init(bar, 1);
           prim::fence_mbar_init();
           prim::mbar_arrive_expect_tx(bar, 4096);
           const u16 other = static_cast<u16>(2 >> prim::cluster_rank());
           prim::tma_load_2d_multicast(shared_tile(), picture.map, 0, 0, bar, other);
           prim::mbar_wait(bar, 0);
         });
}
void exit_under_multicast(std::uint64_t seed) {
  Picture picture;
  launch({.grid = {2}, .block = {1}, .shared_bytes = kTile + 4096, .cluster = 2, .seed = seed},
         [&] {
           u64* bar = shared_barriers();
           prim::mbar_init(bar, 1);
           prim::fence_mbar_init();
           prim::cluster_sync();
           if (prim::cluster_rank() == 1) return prim::backoff(), prim::backoff();
           prim::mbar_arrive_expect_tx(bar, 4096);
           prim::tma_load_2d_multicast(shared_tile(), picture.map, 0, 0, bar, 3);
           prim::mbar_wait(bar, 0);
         });
}
void remote_data_block_scope(std::uint64_t seed) {  // the wait acquires from its own block alone
  in_cluster(seed, [](u64* bar, u32 rank, u32 t) {
    auto* place = reinterpret_cast<u32*>(shared_tile());
    if (t == 0 && rank == 0) prim::remote_store(place, 1, 5), prim::mbar_arrive_remote(bar, 1);
    if (t == 0 && rank == 1) prim::mbar_wait(bar, 0), expect(*place == 5, "remote data");
  });
}
void st_async_unwaited(std::uint64_t seed) {
  in_cluster(seed, [](u64* bar, u32 rank, u32 t) {
    auto* place = reinterpret_cast<u32*>(shared_tile());
    if (t != 0) return;
    prim::mbar_arrive_expect_tx(bar, 4);
    prim::st_async(place, 1 - rank, 5, bar);
    const u32 early = *place;
    prim::mbar_wait_cluster(bar, 0);
    expect(early == 5, "st.async before the wait");
  });
}
void bulk_source_overwritten(std::uint64_t seed) {
  in_cluster(seed, [](u64* bar, u32 rank, u32 t) {
    auto* place = reinterpret_cast<u32*>(shared_tile());
    if (t != 0) return;
    place[0] = 1;
    prim::fence_proxy_async();
    prim::mbar_arrive_expect_tx(bar, 16);
    prim::bulk_copy_remote(place + 4, 1 - rank, place, 16, bar);
    place[0] = 2;
    prim::mbar_wait_cluster(bar, 0);
  });
}

// Registers ------------------------------------------------------------------------------------------------------------

void too_many_registers(std::uint64_t seed) {  // 32 + 240 + 240 > 3 x 168
  launch({.block = {384}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 128) {
      prim::set_max_registers_down<32>();
    } else {
      prim::set_max_registers_up<240>();
    }
  });
}
void registers_go_down(std::uint64_t seed) {
  launch({.block = {128}, .seed = seed}, [&] { prim::set_max_registers_up<40>(); });
}
void registers_disagree(std::uint64_t seed) {
  launch({.block = {128}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 64) {
      prim::set_max_registers_down<40>();
    } else {
      prim::set_max_registers_down<48>();
    }
  });
}
void registers_at_launch(std::uint64_t seed) {
  launch({.block = {512}, .seed = seed}, [&] { prim::set_max_registers_down<40>(); });
}

const Planted kBugs[] = {
    {"more arrivals than counted", over_arrival, "more arrivals than its count"},
    {"barrier used before its init", not_initialised, "not initialised"},
    {"init on a live barrier", initialised_twice, "live mbarrier"},
    {"barrier overwritten", overwritten_barrier, "memory was overwritten"},
    {"phase that nobody observed", unobserved_phase, "nobody has observed"},
    {"wait for the wrong parity", waits_for_the_wrong_parity, "threads in mbarrier wait"},
    {"wait two phases late", two_phases_late, "deadlock: {1 threads in mbarrier wait"},
    {"polls a phase that never ends", polls_for_ever, "livelock"},
    {"too many bytes expected", too_many_bytes, "2^20 - 1"},
    {"bytes that never come", bytes_never_come, "still counts bytes"},
    {"uncounted arrival of a copy", counted_copy, "more arrivals than its count"},
    {"copy read before its barrier", copy_read_before_its_barrier, "wrong values", true},
    {"no barrier after the init", init_without_barrier, nullptr, true},
    {"multicast the peer does not expect", multicast_unexpected, "wrong values"},
    {"multicast outside the cluster", multicast_outside, "outside the cluster"},
    {"multicast before the first cluster barrier", multicast_before_start, "first cluster barrier"},
    {"exit under a multicast", exit_under_multicast, "exit"},
    {"remote data, wait of block scope", remote_data_block_scope, nullptr, true},
    {"st.async read before the wait", st_async_unwaited, nullptr, true},
    {"source of a bulk copy overwritten", bulk_source_overwritten, "overwritten", true},
    {"too many registers wanted", too_many_registers, "threads in setmaxnreg.inc"},
    {"increase to fewer registers", registers_go_down, "setmaxnreg.inc from 168 to 40"},
    {"warps want different registers", registers_disagree, "different counts"},
    {"more registers than there are", registers_at_launch, "more registers"},
};

}  // namespace

List<Planted> sm90_bugs() { return {kBugs, sizeof kBugs / sizeof *kBugs}; }

}  // namespace simt_test
