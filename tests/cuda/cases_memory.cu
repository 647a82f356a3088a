// cp.async, the order of memory across blocks, grid barriers; mbarriers on sm_90a.
#include "cuda/prim/store16.h"
#include "tests/cuda/conformance.h"

namespace conformance {
namespace {

constexpr u32 kRingSteps = 6;

KERNEL_FUNCTION(32) copy_ring_kernel(Words p) {  // two stages, copies of 16, 8 and 4 bytes
  u32* s = reinterpret_cast<u32*>(prim::dynamic_shared());
  const u32 t = prim::thread_idx().x;
  const auto load = [&](u32 step) {
    u32* stage = s + step % 2 * 128;
    const u32* source = p.in + step * 128;
    if (t < 16) prim::cp_async16(stage + 4 * t, source + 4 * t);
    if (t < 16) prim::cp_async8(stage + 64 + 2 * t, source + 64 + 2 * t);
    prim::cp_async4(stage + 96 + t, source + 96 + t);
    prim::cp_async_commit();
  };
  load(0);
  for (u32 step = 0; step < kRingSteps; ++step) {
    if (step + 1 < kRingSteps) {
      load(step + 1);
      prim::cp_async_wait<1>();
    } else {
      prim::cp_async_wait<0>();
    }
    prim::sync_block();
    for (u32 i = 0; i < 4; ++i)
      p.out[step * 128 + 32 * i + t] = s[step % 2 * 128 + (32 * i + t + 5) % 128];
    prim::sync_block();
  }
}

KERNEL_FUNCTION(32) zero_fill_kernel(Words p) {  // every number of valid bytes
  unsigned char* s = prim::dynamic_shared();
  const u32 t = prim::thread_idx().x;
  u32* own = reinterpret_cast<u32*>(s + 32 * t);
  for (u32 i = 0; i < 8; ++i) own[i] = 0xeeeeeeeeU;
  if (t <= 16) prim::cp_async16(own, p.in, t);
  if (t <= 8) prim::cp_async8(own + 4, p.in + 2, t);
  if (t <= 4) prim::cp_async4(own + 6, p.in + 1, t);
  prim::cp_async_commit();
  prim::cp_async_wait<0>();
  for (u32 i = 0; i < 8; ++i) p.out[8 * t + i] = own[i];
}

struct Persistent {
  u32* state;
  u32* counter;
  u32 steps;
};

KERNEL_FUNCTION(64) grid_kernel(Persistent p) {  // each number adds those of two other blocks
  const u32 blocks = prim::grid_dim().x, b = prim::block_idx().x, t = prim::thread_idx().x;
  const u32 size = 64 * blocks;
  for (u32 step = 0; step < p.steps; ++step) {
    const u32* from = p.state + step % 2 * size;
    p.state[(step + 1) % 2 * size + 64 * b + t] =
        from[64 * ((b + 1) % blocks) + (t + 1) % 64] + 3 * from[64 * ((b + 5) % blocks) + t] + step;
    prim::grid_barrier(p.counter, step + 1);
  }
}

void grid_barriers(Dump& dump) {
  constexpr u32 kBlocks = 8;
  Buffer<u32> state(2 * 64 * kBlocks), counter(1);
  for (u32 i = 0; i < 64 * kBlocks; ++i) state[i] = mixed(i);
  run(grid_kernel, {kBlocks, 64, 0, 0}, Persistent{state.upload(), counter.upload(), 50});
  dump.exact(state.fetch());
}

struct Messages {
  u32* values;
  u32* flag;
  u32* out;
};

KERNEL_FUNCTION(32) message_kernel(Messages p) {  // block 0 sends, block 1 answers, forty times
  const u32 b = prim::block_idx().x, t = prim::thread_idx().x;
  for (u32 i = 0; i < 40; ++i) {
    if (b == 0) {
      p.values[t] = 100 * i + t;
      prim::sync_warp();
      if (t == 0) prim::st_release(p.flag, i + 1);
      while (prim::ld_acquire(p.flag + 1) != 32 * (i + 1)) prim::backoff();
      prim::sync_warp();
    } else {
      while (prim::ld_acquire(p.flag) != i + 1) prim::backoff();
      p.out[32 * i + t] = p.values[(t + 1) % 32];
      prim::red_release_add(p.flag + 1, 1);
    }
  }
}

void messages(Dump& dump) {
  Buffer<u32> values(32), flag(2), out(40 * 32);
  run(message_kernel, {2, 32, 0, 0}, Messages{values.upload(), flag.upload(), out.upload()});
  dump.exact(out.fetch());
}

KERNEL_FUNCTION(32) arrival_kernel(Messages p) {  // the last block has what all others wrote
  const u32 b = prim::block_idx().x, t = prim::thread_idx().x, blocks = prim::grid_dim().x;
  p.values[32 * b + t] = 2654435761U * (32 * b + t);
  prim::sync_block();
  u32 arrived = 0;
  if (t == 0) arrived = prim::atomic_add_acq_rel(p.flag, 1);
  arrived = prim::shfl(arrived, 0);
  prim::sync_block();
  if (arrived != blocks - 1) return;
  for (u32 i = 0; i < blocks; ++i) p.out[32 * i + t] = p.values[32 * i + t];
  if (t == 0) *p.flag = 0;
}

void arrivals(Dump& dump) {
  constexpr u32 kBlocks = 300;
  Buffer<u32> values(32 * kBlocks), flag(1), out(32 * kBlocks), both(32 * kBlocks + 1);
  run(arrival_kernel, {kBlocks, 32}, Messages{values.upload(), flag.upload(), out.upload()});
  out.fetch();
  for (std::size_t i = 0; i < out.size(); ++i) both[i] = out[i];
  both[out.size()] = flag.fetch()[0];
  dump.exact(both);
}

struct Numbers {
  const float* from;
  u32* out;
};

KERNEL_FUNCTION(32) conditional_kernel(Numbers p) {  // what is not wanted has no address
  const u32 t = prim::thread_idx().x;
  const bool wanted = t % 3 != 1;
  p.out[t] = prim::bits_of(prim::load_if(wanted ? p.from + t : nullptr, wanted));
}

void conditional_loads(Dump& dump) {
  Buffer<float> from(32);
  Buffer<u32> out(32);
  for (u32 t = 0; t < 32; ++t) from[t] = 1.5F + static_cast<float>(t);
  run(conditional_kernel, {1, 32, 0, 0}, Numbers{from.upload(), out.upload()});
  dump.exact(out.fetch());
}

KERNEL_FUNCTION(32) wide_store_kernel(Words p) {
  const u32 t = prim::thread_idx().x;
  const u32 words[4] = {p.in[t], p.in[t + 1], p.in[t + 2], p.in[t + 3]};
  prim::store16(p.out + 4 * t, words);
}

// mbarriers ---------------------------------------------------------------------------------------------------------------

KERNEL_FUNCTION(32) parity_kernel(Words p) {
#if PRIM_HAS_SM90A
  if (prim::thread_idx().x != 0) return;
  u64* bar = barriers();
  u32* tile = reinterpret_cast<u32*>(bar + 2);
  u32 answers = 0;
  const auto ask = [&] {
    answers =
        answers << 2 | (prim::mbar_test(bar, 0) ? 1U : 0U) | (prim::mbar_test(bar, 1) ? 2U : 0U);
  };
  prim::mbar_init(bar, 2);
  prim::fence_mbar_init();
  ask();
  prim::mbar_arrive(bar);
  ask();
  prim::mbar_arrive(bar);
  ask();
  prim::mbar_expect_tx(bar, 16);
  prim::mbar_arrive(bar);
  prim::mbar_arrive_expect_tx(bar, 32);
  ask();  // the arrivals are complete, the bytes are not
  prim::bulk_load(tile, p.in, 16, bar);
  prim::bulk_load(tile + 4, p.in + 8, 32, bar);
  prim::mbar_wait(bar, 1);
  ask();
  prim::mbar_inval(bar);
  prim::mbar_init(bar, 1);
  ask();
  prim::mbar_arrive(bar);
  ask();
  p.out[0] = answers;
  for (u32 i = 0; i < 12; ++i) p.out[1 + i] = tile[i];
#endif
}

constexpr u32 kUses = 9;

KERNEL_FUNCTION(96) ring_kernel(Words p) {  // one warp produces for two, through two slots
#if PRIM_HAS_SM90A
  constexpr u32 kSlots = 2;
  u64 *full = barriers(), *empty = full + kSlots;
  u32* slots = reinterpret_cast<u32*>(full + 8);
  const u32 t = prim::thread_idx().x;
  if (t == 0) {
    for (u32 s = 0; s < kSlots; ++s) {
      prim::mbar_init(full + s, 32);
      prim::mbar_init(empty + s, 64);
    }
    prim::fence_mbar_init();
  }
  prim::sync_block();
  for (u32 i = 0; i < kUses; ++i) {
    const u32 s = i % kSlots, parity = i / kSlots & 1;
    if (t < 32) {
      prim::mbar_wait(empty + s, parity ^ 1);
      slots[32 * s + t] = p.in[32 * i + t];
      prim::mbar_arrive(full + s);
    } else {
      prim::mbar_wait(full + s, parity);
      p.out[64 * i + t - 32] = slots[32 * s + (t + 9) % 32];
      prim::mbar_arrive(empty + s);
    }
  }
#endif
}

/// cp.async by one warp, waited for by another; twice, and the second time nothing is copied.
template <bool kCounted>
KERNEL_FUNCTION(64)
copies_arrive_kernel(Words p) {
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  u32* tile = reinterpret_cast<u32*>(bar + 2);
  const u32 t = prim::thread_idx().x;
  if (t == 0) {
    prim::mbar_init(bar, 32);
    prim::fence_mbar_init();
  }
  prim::sync_block();
  if (t < 32) {
    prim::cp_async16(tile + 4 * t, p.in + 4 * t);
    if (kCounted) {
      prim::cp_async_mbar_arrive_noinc(bar);
    } else {
      prim::cp_async_mbar_arrive(bar);
      prim::mbar_arrive(bar);
    }
    return;
  }
  prim::mbar_wait(bar, 0);
  for (u32 i = 0; i < 4; ++i) p.out[4 * (t - 32) + i] = tile[4 * (63 - t) + i];
#endif
}

void add(Cases& cases, const char* name, Needs needs, void (*kernel)(Words),
         const prim::LaunchShape& shape, std::size_t in_count, std::size_t out_count) {
  cases.push_back({name, needs, [=](Dump& dump) {
                     Buffer<u32> in(in_count), out(out_count);
                     for (u32 i = 0; i < in.size(); ++i) in[i] = mixed(i);
                     run(kernel, shape, Words{in.upload(), out.upload()});
                     dump.exact(out.fetch());
                   }});
}

}  // namespace

void add_memory_cases(Cases& cases) {
  add(cases, "cp_async_ring", Needs::kSm80, copy_ring_kernel, {1, 32, 1024}, kRingSteps * 128,
      kRingSteps * 128);
  add(cases, "cp_async_zero_fill", Needs::kSm80, zero_fill_kernel, {1, 32, 1024}, 4, 256);
  cases.push_back({"grid_barrier", Needs::kSm80, grid_barriers});
  cases.push_back({"release_acquire", Needs::kSm80, messages});
  cases.push_back({"last_arrival", Needs::kSm80, arrivals});
  cases.push_back({"load_if", Needs::kSm80, conditional_loads});
  add(cases, "store16", Needs::kSm80, wide_store_kernel, {1, 32, 0}, 35, 128);
  add(cases, "mbarrier_parity", Needs::kSm90a, parity_kernel, {1, 32, 128}, 16, 13);
  add(cases, "mbarrier_ring", Needs::kSm90a, ring_kernel, {1, 96, 512}, 32 * kUses, 64 * kUses);
  add(cases, "cp_async_mbarrier", Needs::kSm90a, copies_arrive_kernel<false>, {1, 64, 1024}, 128,
      128);
  add(cases, "cp_async_mbarrier_noinc", Needs::kSm90a, copies_arrive_kernel<true>, {1, 64, 1024},
      128, 128);
}

}  // namespace conformance
