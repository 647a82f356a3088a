// Kernels with a planted bug: synchronisation.
#include <vector>

#include "cuda/prim/prim.h"
#include "tests/simt/cases.h"

namespace simt_test {
namespace {

using prim::u32;
using simt::launch;

u32* shared_words() { return reinterpret_cast<u32*>(prim::dynamic_shared()); }
float* shared_floats() { return reinterpret_cast<float*>(prim::dynamic_shared()); }

void missing_barrier(std::uint64_t seed) {
  std::vector<u32> out(64);
  launch({.block = {64}, .shared_bytes = 256, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x;
    shared_words()[t] = t;
    out[t] = shared_words()[63 - t];
  });
}

void same_value_while_read(std::uint64_t seed) {
  std::vector<u32> out(64);
  launch({.block = {64}, .shared_bytes = 256, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x;
    shared_words()[t] = 5;
    prim::sync_block();
    if (t == 0) shared_words()[40] = 5;
    out[t] = shared_words()[40];
  });
}

void missing_sync_warp(std::uint64_t seed) {
  std::vector<u32> out(32);
  launch({.block = {32}, .shared_bytes = 128, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x;
    shared_words()[t] = t;
    prim::shfl_xor(t, 1);  // a collective orders no memory
    out[t] = shared_words()[t ^ 1];
  });
}

// A two-stage ring of asynchronous copies with one flaw.
enum class Flaw { kOverwrite, kWeakWait, kNoBarrier };
template <Flaw kFlaw>
void ring(std::uint64_t seed) {
  std::vector<float> in(8 * 128), out(8 * 32);
  for (u32 i = 0; i < in.size(); ++i) in[i] = small_value(i);
  launch({.block = {32}, .shared_bytes = 1024, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x;
    const auto load = [&](u32 step) {
      prim::cp_async16(shared_floats() + step % 2 * 128 + 4 * t, in.data() + step * 128 + 4 * t);
      prim::cp_async_commit();
    };
    load(0);
    for (u32 step = 0; step < 8; ++step) {
      if (step < 7) load(step + 1);
      if (kFlaw == Flaw::kWeakWait || step < 7) {
        prim::cp_async_wait<kFlaw == Flaw::kWeakWait ? 2 : 1>();
      } else {
        prim::cp_async_wait<0>();
      }
      if (kFlaw != Flaw::kNoBarrier) prim::sync_block();
      out[step * 32 + t] = shared_floats()[step % 2 * 128 + (4 * t + 77) % 128];
      if (kFlaw != Flaw::kOverwrite) prim::sync_block();
    }
    prim::cp_async_wait<0>();
  });
  for (u32 i = 0; i < out.size(); ++i)
    expect(out[i] == in[i / 32 * 128 + (4 * (i % 32) + 77) % 128], "ring", i);
}

void source_changed(std::uint64_t seed) {
  std::vector<float> in(4, 1.0F);
  launch({.block = {64}, .shared_bytes = 16, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x;
    if (t == 0) {
      prim::cp_async16(shared_floats(), in.data());
      prim::cp_async_commit();
    }
    if (t == 32) in[0] = 2.0F;
    prim::sync_block();
    if (t == 0) prim::cp_async_wait<0>();
  });
}

void never_waited(std::uint64_t seed) {
  std::vector<float> in(4);
  launch({.block = {1}, .shared_bytes = 16, .seed = seed}, [&] {
    prim::cp_async16(shared_floats(), in.data());
    prim::cp_async_commit();
  });
}

void never_committed(std::uint64_t seed) {
  std::vector<float> in(4);
  launch({.block = {1}, .shared_bytes = 16, .seed = seed}, [&] {
    prim::cp_async16(shared_floats(), in.data());
    prim::cp_async_wait<0>();
  });
}

void two_blocks_one_place(std::uint64_t seed) {
  u32 place = 0;
  launch({.grid = {2}, .block = {1}, .seed = seed}, [&] { place = 3; });
}

void in_place_across_blocks(std::uint64_t seed) {
  std::vector<u32> state(4, 1);
  launch({.grid = {4}, .block = {1}, .cluster = 0, .seed = seed}, [&] {
    const u32 b = prim::block_idx().x;
    state[b] += state[(b + 1) % 4];
  });
}

void no_grid_barrier(std::uint64_t seed) {
  std::vector<u32> state(2 * 3, 1);
  launch({.grid = {3}, .block = {32}, .cluster = 0, .seed = seed}, [&] {
    const u32 b = prim::block_idx().x;
    for (u32 step = 0; step < 3; ++step) {
      if (prim::thread_idx().x == 0)
        state[(step + 1) % 2 * 3 + b] = state[step % 2 * 3 + (b + 1) % 3];
      prim::sync_block();
    }
  });
}

void relaxed_flag(std::uint64_t seed) {
  // In two words: the sanitizer keeps four accesses per word, and polling the flag would drive out the message.
  alignas(8) u32 value = 0;
  alignas(8) u32 flag = 0;
  launch({.grid = {2}, .block = {1}, .cluster = 0, .seed = seed}, [&] {
    if (prim::block_idx().x == 0) {
      value = 42;
      prim::atomic_add(&flag, 1);  // relaxed: publishes nothing
    } else {
      while (prim::ld_acquire(&flag) == 0) prim::backoff();
      expect(value == 42, "message");
    }
  });
}

void not_resident(std::uint64_t seed) {
  u32 counter = 0;
  launch({.grid = {2}, .block = {32}, .seed = seed}, [&] { prim::grid_barrier(&counter, 1); });
}

void missed_grid_arrival(std::uint64_t seed) {
  u32 counter = 0;
  launch({.grid = {2}, .block = {32}, .cluster = 0, .seed = seed}, [&] {
    if (prim::block_idx().x == 0) prim::grid_barrier(&counter, 1);
  });
}

void two_barriers(std::uint64_t seed) {
  launch({.block = {64}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 32) {
      prim::sync_block();
    } else {
      prim::sync_block();
    }
  });
}

void exit_before_barrier(std::uint64_t seed) {
  launch({.block = {64}, .seed = seed}, [&] {
    if (prim::thread_idx().x == 0) return;
    prim::sync_block();
  });
}

void divergent_shuffle(std::uint64_t seed) {
  launch({.block = {32}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 16) prim::shfl_xor(1, 1);
  });
}

void different_collectives(std::uint64_t seed) {
  launch({.block = {32}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 16) {
      prim::shfl_xor(1, 1);
    } else {
      prim::ballot(true);
    }
  });
}

void different_masks(std::uint64_t seed) {
  launch({.block = {32}, .seed = seed},
         [&] { prim::ballot(true, prim::thread_idx().x < 16 ? ~0U : 0xffff0000U); });
}

void lane_not_in_mask(std::uint64_t seed) {
  launch({.block = {32}, .seed = seed}, [&] { prim::ballot(true, 0xffffU); });
}

void source_not_in_mask(std::uint64_t seed) {
  launch({.block = {32}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 16) prim::shfl(1, 20, 0xffffU);
  });
}

void named_deadlock(std::uint64_t seed) {
  launch({.block = {64}, .seed = seed}, [&] {
    if (prim::thread_idx().x < 32) prim::named_sync(1, 64);
  });
}

void named_odd_count(std::uint64_t seed) {
  launch({.block = {64}, .seed = seed}, [&] { prim::named_sync(1, 40); });
}

void named_two_counts(std::uint64_t seed) {
  launch({.block = {64}, .seed = seed},
         [&] { prim::named_sync(1, prim::thread_idx().x < 32 ? 64 : 96); });
}

void named_id(std::uint64_t seed) {
  launch({.block = {32}, .seed = seed}, [&] { prim::named_sync(16, 32); });
}

void block_barrier_for_cluster(std::uint64_t seed) {
  std::vector<u32> out(2 * 32);
  launch({.grid = {2}, .block = {32}, .shared_bytes = 128, .cluster = 2, .seed = seed}, [&] {
    const u32 t = prim::thread_idx().x, rank = prim::cluster_rank();
    prim::cluster_sync();
    prim::remote_store(shared_words() + t, 1 - rank, t);
    prim::sync_block();
    out[rank * 32 + t] = shared_words()[t];
    prim::cluster_sync();
  });
}

void remote_too_early(std::uint64_t seed) {
  launch({.grid = {2}, .block = {1}, .shared_bytes = 128, .cluster = 2, .seed = seed},
         [&] { prim::remote_store(shared_words(), 1 - prim::cluster_rank(), 1); });
}

void remote_too_late(std::uint64_t seed) {
  u32 gone = 0;
  launch({.grid = {2}, .block = {1}, .shared_bytes = 128, .cluster = 2, .seed = seed}, [&] {
    prim::cluster_sync();
    if (prim::cluster_rank() == 0) {
      prim::red_release_add(&gone, 1);
      return;
    }
    while (prim::ld_acquire(&gone) == 0) prim::backoff();
    for (u32 i = 0; i < 4; ++i) prim::backoff();
    prim::remote_store(shared_words(), 0, 1);
  });
}

void remote_rank(std::uint64_t seed) {
  launch({.grid = {2}, .block = {1}, .shared_bytes = 128, .cluster = 2, .seed = seed}, [&] {
    prim::cluster_sync();
    prim::remote_store(shared_words(), 2, 1);
  });
}

void cluster_wait_alone(std::uint64_t seed) {
  launch({.grid = {2}, .block = {1}, .cluster = 2, .seed = seed}, [&] { prim::cluster_wait(); });
}

const Planted kBugs[] = {
    {"no barrier between write and read", missing_barrier, nullptr, true},
    {"write of the same value while others read", same_value_while_read, nullptr, true},
    {"no __syncwarp between write and read", missing_sync_warp, nullptr, true},
    {"stage overwritten before a barrier", ring<Flaw::kOverwrite>, nullptr, true},
    {"wait_group too weak", ring<Flaw::kWeakWait>, "wrong values"},
    {"no barrier after wait_group", ring<Flaw::kNoBarrier>, nullptr, true},
    {"source changed during a copy", source_changed, nullptr, true},
    {"copies never waited for", never_waited, "never waited for"},
    {"copies never committed", never_committed, "never committed"},
    {"two blocks write one place", two_blocks_one_place, nullptr, true},
    {"in-place update across blocks", in_place_across_blocks, nullptr, true},
    {"no grid barrier", no_grid_barrier, nullptr, true},
    {"relaxed flag", relaxed_flag, nullptr, true},
    {"grid barrier of blocks that are not resident", not_resident, "livelock"},
    {"a block misses the grid barrier", missed_grid_arrival, "livelock"},
    {"two different barriers", two_barriers, "divergent barrier"},
    {"exit before a barrier", exit_before_barrier, "__syncthreads"},
    {"shuffle in divergent code", divergent_shuffle, "deadlock: {16 threads in shfl.bfly"},
    {"two different collectives", different_collectives, "divergent warp collective"},
    {"different masks", different_masks, "divergent warp collective"},
    {"lane not in its mask", lane_not_in_mask, "not in its mask"},
    {"shuffle from a lane not in the mask", source_not_in_mask, "source lane"},
    {"named barrier without its partners", named_deadlock, "deadlock: {32 threads in bar.sync"},
    {"named barrier, odd count", named_odd_count, "multiple of 32"},
    {"named barrier, two counts", named_two_counts, "two counts"},
    {"named barrier, id", named_id, "1 to 15"},
    {"block barrier in place of the cluster's", block_barrier_for_cluster, nullptr, true},
    {"remote store before the first cluster barrier", remote_too_early, "first cluster barrier"},
    {"remote store into a block that has exited", remote_too_late, "has exited"},
    {"rank outside the cluster", remote_rank, "outside the cluster"},
    {"cluster wait without arrive", cluster_wait_alone, "without arrive"},
};

}  // namespace

List<Planted> sm80_bugs() { return {kBugs, sizeof kBugs / sizeof *kBugs}; }

}  // namespace simt_test
