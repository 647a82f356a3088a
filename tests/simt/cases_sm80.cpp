// Barriers, shuffles, asynchronous copies, clusters, grid barriers: correct kernels.
#include <vector>

#include "cuda/prim/prim.h"
#include "tests/simt/cases.h"

namespace simt_test {
namespace {

using prim::u32;
using simt::launch;
using simt::Launch;

void shuffles(std::uint64_t seed) {
  std::vector<u32> out(32 * 6);
  launch({.block = {32}, .seed = seed}, [&] {
    const u32 l = prim::thread_idx().x;
    out[l] = prim::shfl_xor(100 + l, 5);
    out[32 + l] = prim::shfl(100 + l, (l + 3) % 32);
    out[64 + l] = prim::shfl_up(100 + l, 4);
    out[96 + l] = prim::shfl_down(100 + l, 7);
    out[128 + l] = prim::ballot(l % 3 == 0);
    if (l < 16) {  // one half of the warp alone
      out[160 + l] = prim::shfl_xor(l, 8, 0xffffU);
    } else {
      out[160 + l] = prim::ballot(l == 20, 0xffff0000U);
    }
  });
  for (u32 l = 0; l < 32; ++l) {
    expect(out[l] == 100 + (l ^ 5), "shfl_xor", l);
    expect(out[32 + l] == 100 + (l + 3) % 32, "shfl", l);
    expect(out[64 + l] == 100 + (l < 4 ? l : l - 4), "shfl_up", l);
    expect(out[96 + l] == 100 + (l > 24 ? l : l + 7), "shfl_down", l);
    expect(out[128 + l] == 0x49249249U, "ballot", l);
    expect(out[160 + l] == (l < 16 ? (l ^ 8) : 1U << 20), "parts of a warp", l);
  }
}

void conversions(std::uint64_t) {
  expect(prim::pack_bf16x2(1.0F, -2.0F) == 0xc0003f80U, "pack_bf16x2");
  expect(prim::pack_f16x2(1.0F, -2.0F) == 0xc0003c00U, "pack_f16x2");
  expect(prim::add_f16x2(0x64006403U, 0xe480e400U) == 0xd8004200U, "add_f16x2");
  expect(prim::add_bf16x2(0x43004303U, 0xc380c300U) == 0xc3004040U, "add_bf16x2");
  expect(prim::byte_perm(0x33221100U, 0x77665544U, 0x7250U) == 0x77225500U, "byte_perm");
  expect(prim::float_to_bf16(1.00390625F) == 0x3f80, "a tie goes to even");
  expect(prim::float_to_bf16(1.01171875F) == 0x3f82, "a tie goes to even, upwards");
  expect(prim::float_to_bf16(3.4e38F) == 0x7f80, "overflow is infinite");
  expect(std::isnan(prim::bf16_to_float(prim::float_to_bf16(NAN))), "NaN stays NaN");
  expect(
      prim::float_to_f16(65520.0F) == 0x7c00 && prim::f16_to_float(0x0001) == std::ldexp(1.0F, -24),
      "f16 range");
  expect(prim::to_tf32(1.0F + std::ldexp(1.0F, -11)) == 0x3f802000U, "tf32 ties away from zero");
  expect(prim::ex2(3.0F) == 8.0F && prim::ex2(-200.0F) == 0.0F && prim::rcp(4.0F) == 0.25F,
         "ex2, rcp");
  expect(prim::ex2(-INFINITY) == 0.0F && std::fabs(prim::tanh_approx(0.5F) - 0.46211716F) < 1e-5F,
         "ex2, tanh");
}

void indices(std::uint64_t seed) {
  std::vector<u32> seen(2 * 3 * 2 * 4 * 2 * 2);
  launch({.grid = {2, 3, 2}, .block = {4, 2, 2}, .seed = seed}, [&] {
    const auto t = prim::thread_idx(), b = prim::block_idx();
    const u32 block = (b.z * prim::grid_dim().y + b.y) * prim::grid_dim().x + b.x;
    prim::atomic_add(&seen[block * 16 + (t.z * 2 + t.y) * prim::block_dim().x + t.x], 1);
  });
  for (u32 i = 0; i < seen.size(); ++i) expect(seen[i] == 1, "every thread once", i);
}

void block_reduction(std::uint64_t seed) {
  float total = 0;
  launch({.block = {128}, .shared_bytes = 512, .seed = seed}, [&] {
    auto* s = reinterpret_cast<float*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    expect(std::isnan(s[t]), "shared memory begins as NaN");
    s[t] = static_cast<float>(t);
    for (u32 half = 64; half > 0; half /= 2) {
      prim::sync_block();
      if (t < half) s[t] += s[t + half];
    }
    if (t == 0) total = s[0];
  });
  expect(total == 8128.0F, "sum of 0..127");
}

void warp_exchange(std::uint64_t seed) {
  std::vector<u32> out(64);
  launch({.block = {64}, .shared_bytes = 256, .seed = seed}, [&] {
    auto* s = reinterpret_cast<u32*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    const u32 mask = t % 32 < 8 ? 0xffU : 0xffffff00U;
    for (u32 i = 0; i < 4; ++i) {
      s[t] = t + i;
      prim::sync_warp(mask);
      out[t] = s[t ^ 1] - i;
      prim::sync_warp(mask);
    }
  });
  for (u32 t = 0; t < 64; ++t) expect(out[t] == (t ^ 1), "neighbour's value", t);
}

void named_barriers(std::uint64_t seed) {  // one warp produces for two, in both directions
  std::vector<u32> out(64);
  launch({.block = {96}, .shared_bytes = 128, .seed = seed}, [&] {
    auto* s = reinterpret_cast<u32*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    for (u32 i = 0; i < 5; ++i) {
      if (t < 32) {
        if (i > 0) prim::named_sync(2, 96);
        s[t] = 10 * t + i;
        prim::named_arrive(1, 96);
      } else {
        prim::named_sync(1, 96);
        out[t - 32] = s[t % 32];
        if (i < 4) prim::named_arrive(2, 96);
      }
    }
  });
  for (u32 t = 0; t < 64; ++t) expect(out[t] == 10 * (t % 32) + 4, "named barriers", t);
}

void copy_ring(std::uint64_t seed) {  // two stages, groups of 16, 8 and 4 bytes
  constexpr u32 kSteps = 6;
  std::vector<float> in(kSteps * 128), out(kSteps * 128);
  for (u32 i = 0; i < in.size(); ++i) in[i] = small_value(i);
  launch({.block = {32}, .shared_bytes = 1024, .seed = seed}, [&] {
    auto* s = reinterpret_cast<float*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    const auto load = [&](u32 step) {
      float* stage = s + step % 2 * 128;
      const float* source = in.data() + step * 128;
      if (t < 16) prim::cp_async16(stage + 4 * t, source + 4 * t);
      if (t < 16) prim::cp_async8(stage + 64 + 2 * t, source + 64 + 2 * t);
      prim::cp_async4(stage + 96 + t, source + 96 + t);
      prim::cp_async_commit();
    };
    load(0);
    for (u32 step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) {
        load(step + 1);
        prim::cp_async_wait<1>();
      } else {
        prim::cp_async_wait<0>();
      }
      prim::sync_block();
      for (u32 i = 0; i < 4; ++i)
        out[step * 128 + 32 * i + t] = s[step % 2 * 128 + (32 * i + t + 5) % 128];
      prim::sync_block();
    }
  });
  for (u32 i = 0; i < out.size(); ++i)
    expect(out[i] == in[i / 128 * 128 + (i + 5) % 128], "ring", i);
}

void copy_zero_fill(std::uint64_t seed) {
  std::vector<float> in(3, 7.0F), out(8);
  launch({.block = {2}, .shared_bytes = 32, .seed = seed}, [&] {
    auto* s = reinterpret_cast<float*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    prim::cp_async16(s + 4 * t, in.data(), t == 0 ? 12 : 0);
    expect(std::isnan(s[4 * t]), "NaN until the wait");
    prim::cp_async_commit();
    prim::cp_async_wait<0>();
    for (u32 i = 0; i < 4; ++i) out[4 * t + i] = s[4 * t + i];
  });
  for (u32 i = 0; i < 8; ++i) expect(out[i] == (i < 3 ? 7.0F : 0.0F), "zero fill", i);
}

void grid_barriers(
    std::uint64_t seed) {  // each block adds its neighbour's value of the step before
  constexpr u32 kBlocks = 3, kSteps = 5;
  std::vector<u32> state(2 * kBlocks);
  u32 counter = 0;
  for (u32 i = 0; i < kBlocks; ++i) state[i] = i + 1;
  launch({.grid = {kBlocks}, .block = {32}, .cluster = 0, .seed = seed}, [&] {
    const u32 b = prim::block_idx().x;
    for (u32 step = 0; step < kSteps; ++step) {
      const u32* from = &state[step % 2 * kBlocks];
      if (prim::thread_idx().x == 7)
        state[(step + 1) % 2 * kBlocks + b] = from[b] + from[(b + 1) % kBlocks];
      prim::grid_barrier(&counter, step + 1);
    }
  });
  u32 a[3] = {1, 2, 3};
  for (u32 step = 0; step < kSteps; ++step) {
    const u32 b[3] = {a[0] + a[1], a[1] + a[2], a[2] + a[0]};
    for (u32 i = 0; i < 3; ++i) a[i] = b[i];
  }
  for (u32 i = 0; i < kBlocks; ++i)
    expect(state[kSteps % 2 * kBlocks + i] == a[i], "persistent kernel", i);
}

void cluster_exchange(std::uint64_t seed) {
  std::vector<u32> out(8 * 32);
  launch({.grid = {8}, .block = {32}, .shared_bytes = 256, .cluster = 4, .seed = seed}, [&] {
    auto* s = reinterpret_cast<u32*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x, rank = prim::cluster_rank();
    expect(prim::cluster_size() == 4 && rank == prim::block_idx().x % 4, "rank");
    s[32 + t] = 1000 * prim::block_idx().x + t;
    prim::cluster_sync();
    prim::remote_store(s + t, (rank + 1) % 4, prim::block_idx().x * 100 + t);
    const u32 seen = prim::remote_load(s + 32 + t, (rank + 2) % 4);
    prim::cluster_arrive();
    prim::cluster_wait();
    out[prim::block_idx().x * 32 + t] = s[t] + seen;
  });
  for (u32 b = 0; b < 8; ++b) {
    const u32 base = b / 4 * 4, left = base + (b + 3) % 4, opposite = base + (b + 2) % 4;
    for (u32 t = 0; t < 32; ++t) {
      expect(out[b * 32 + t] == left * 100 + t + opposite * 1000 + t, "cluster", b * 32 + t);
    }
  }
}

void cluster_exit(std::uint64_t seed) {  // the cluster barrier counts threads that have not exited
  u32 passed = 0;
  launch({.grid = {2}, .block = {32}, .cluster = 2, .seed = seed}, [&] {
    if (prim::cluster_rank() == 1 && prim::thread_idx().x < 16) return;
    prim::cluster_sync();
    prim::atomic_add(&passed, 1);
  });
  expect(passed == 48, "threads past the barrier");
}

void release_acquire(std::uint64_t seed) {
  u32 value = 0, flag = 0, got = 0;
  launch({.grid = {2}, .block = {1}, .cluster = 0, .seed = seed}, [&] {
    if (prim::block_idx().x == 0) {
      value = 42;
      prim::st_release(&flag, 1);
    } else {
      while (prim::ld_acquire(&flag) == 0) prim::backoff();
      got = value;
    }
  });
  expect(got == 42, "message passing");
}

void last_arrival(std::uint64_t seed) {  // the last block sees what all others wrote, and clears
  constexpr u32 kBlocks = 5;
  std::vector<u32> values(kBlocks);
  u32 arrivals = 0, sum = 0;
  launch({.grid = {kBlocks}, .block = {1}, .seed = seed}, [&] {
    values[prim::block_idx().x] = prim::block_idx().x + 1;
    if (prim::atomic_add_acq_rel(&arrivals, 1) != kBlocks - 1) return;
    for (const u32 value : values) sum += value;
    arrivals = 0;
  });
  expect(sum == 15 && arrivals == 0, "last arrival");
}

const Case kCases[] = {
    {"shuffles and votes", shuffles},
    {"conversions", conversions},
    {"indices", indices},
    {"block reduction", block_reduction},
    {"exchange within parts of a warp", warp_exchange},
    {"named barriers", named_barriers},
    {"cp.async ring", copy_ring},
    {"cp.async zero fill and poison", copy_zero_fill},
    {"grid barrier", grid_barriers},
    {"cluster and remote shared memory", cluster_exchange},
    {"cluster barrier after exits", cluster_exit},
    {"release and acquire", release_acquire},
    {"last arrival", last_arrival},
};

}  // namespace

List<Case> sm80_cases() { return {kCases, sizeof kCases / sizeof *kCases}; }

}  // namespace simt_test
