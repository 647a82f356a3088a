// Questions about the hardware that the emulator answers with an error. Nothing in the library depends on the answers;
// they tell which rules of the kernels are needed and which are caution.
#include "tests/cuda/product.h"

namespace conformance {

#if defined(__CUDACC__)
namespace {

PRIM_FUNCTION constexpr Operand square() { return {false, Swizzle::k128, 64, 64}; }

struct Probe {
  TensorMap map;
  u64 base_offset;
  u32 delay_issue, delay_wait;
  int x, y;
  u16* words;
  float* out;
  u32* count;
};

/// A tensor copy of a box whose rows are narrower than the swizzle.
KERNEL_FUNCTION(32) narrow_kernel(const GRID_CONSTANT Probe p) {
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  u16* tile = reinterpret_cast<u16*>(tiles());
  const u32 t = prim::thread_idx().x;
  for (u32 i = t; i < 1024; i += 32) tile[i] = 0xffffU;
  prim::fence_proxy_async();
  if (t == 0) {
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
    prim::mbar_arrive_expect_tx(bar, 8 * 32);
  }
  prim::sync_block();
  if (t == 0) prim::tma_load_2d(tile, p.map, 0, 0, bar);
  prim::mbar_wait(bar, 0);
  for (u32 i = t; i < 1024; i += 32) p.words[i] = tile[i];
#endif
}

KERNEL_FUNCTION(32) negative_store_kernel(const GRID_CONSTANT Probe p) {
#if PRIM_HAS_SM90A
  u16* tile = reinterpret_cast<u16*>(tiles());
  const u32 t = prim::thread_idx().x;
  for (u32 i = t; i < 1024; i += 32) tile[i] = static_cast<u16>(i + 1);
  prim::fence_proxy_async();
  prim::sync_block();
  if (t != 0) return;
  prim::tma_store_2d(p.map, tile, p.x, p.y);
  prim::tma_store_commit();
  prim::tma_store_wait<0>();
#endif
}

/// A K-major operand whose swizzle pattern begins 128 bytes behind a multiple of 1024, times itself.
KERNEL_FUNCTION(128, 1) pattern_kernel(const GRID_CONSTANT Probe p) {
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  if (prim::thread_idx().x == 0) {
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
    prim::mbar_arrive_expect_tx(bar, 8192);
    prim::tma_load_2d(tiles() + 128, p.map, 0, 0, bar);
  }
  prim::sync_block();
  prim::mbar_wait(bar, 0);
  const u32 start = prim::shared_u32(tiles()) + 128;
  float d[32];
#pragma unroll
  for (u32 i = 0; i < 32; ++i) d[i] = 0;
  prim::fence_registers(d);
  prim::wgmma_fence();
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    const u64 both = square().descriptor(start, j) | p.base_offset << 49;
    prim::wgmma_bf16<64, false, false>(d, both, both, true);
  }
  prim::wgmma_commit();
  prim::wgmma_wait<0>();
  prim::fence_registers(d);
  store_accumulator(p.out, 64, d);
#endif
}

/// One warp of four says that a product has read its operands, and they are overwritten at once; the others are late.
KERNEL_FUNCTION(256, 1) one_arrival_kernel(const GRID_CONSTANT Probe p) {
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  u32* tile = reinterpret_cast<u32*>(tiles());
  const u32 t = prim::thread_idx().x;
  if (t == 0) {
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
  }
  u32 stale = 0;
  for (u32 trial = 0; trial < 200; ++trial) {
    for (u32 i = t; i < 4096; i += 256) tile[i] = 0x3f803f80U;
    prim::fence_proxy_async();
    prim::sync_block();
    if (t < 128) {
      prim::mbar_wait(bar, trial & 1);
      for (u32 i = t; i < 4096; i += 128) tile[i] = ~0U;
      prim::fence_proxy_async();
    } else {
      const u32 start = prim::shared_u32(tiles());
      float d[32];
#pragma unroll
      for (u32 i = 0; i < 32; ++i) d[i] = 0;
      prim::fence_registers(d);
      const bool late = t >= 160;
      for (u32 i = 0; late && i < p.delay_issue; ++i) prim::backoff();
      prim::wgmma_fence();
#pragma unroll
      for (u32 j = 0; j < 4; ++j)
        prim::wgmma_bf16<64, false, false>(d, square().descriptor(start, j),
                                           square().descriptor(start + 8192, j), true);
      prim::wgmma_commit();
      for (u32 i = 0; late && i < p.delay_wait; ++i) prim::backoff();
      prim::wgmma_wait<0>();
      prim::fence_registers(d);
      if (t == 128) prim::mbar_arrive(bar);
      bool wrong = false;
#pragma unroll
      for (u32 i = 0; i < 32; ++i) wrong = wrong || !(d[i] == 64.0F);
      stale += wrong ? 1 : 0;
    }
    prim::sync_block();
  }
  if (t >= 128 && stale != 0) prim::atomic_add(p.count, stale);
#endif
}

void narrow_box(Dump& dump) {
  Buffer<u16> in(64 * 8), out(1024);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i);
  Probe p{};
  p.map = prim::encode_tensor_map({in.upload(), 2, {64, 8}, {2, 128}, {16, 8}, 2, Swizzle::k128});
  p.words = out.upload();
  run(narrow_kernel, {1, 32, kTile + 2048}, p);
  out.fetch();
  std::string places;
  for (u32 y = 0; y < 8; ++y) {
    for (u32 i = 0; i < 1024; ++i)
      if (out[i] == 64 * y) places += " " + std::to_string(2 * i);
  }
  dump.info("rows of 32 bytes with the 128-byte swizzle begin at bytes" + places);
}

void negative_store(Dump& dump) {
  Buffer<u16> target(64 * 64);
  Probe p{};
  p.map = matrix_map(target.upload(), 64, 64, 64, 64, 16, Swizzle::kNone);
  p.x = 0, p.y = -8;
  run(negative_store_kernel, {1, 32, kTile + 2048}, p);
  u32 right = 0, other = 0;
  target.fetch();
  for (u32 i = 0; i < target.size(); ++i) {
    const u32 want = i < 8 * 64 ? i + 8 * 64 + 1 : 0;
    if (target[i] == want) ++right;
    if (target[i] != want) ++other;
  }
  dump.info("a store from row -8 on: " + std::to_string(right) + " numbers as clipped, " +
            std::to_string(other) + " others");
}

void pattern_start(Dump& dump) {
  Matrix a(square(), Fill::kWhole, 0, false);
  for (u64 base = 0; base < 2; ++base) {
    Buffer<float> out(4096);
    Probe p{};
    p.map = a.map;
    p.base_offset = base;
    p.out = out.upload();
    run(pattern_kernel, {1, 128, kTile + 8192 + 128}, p);
    out.fetch();
    u32 wrong = 0;
    for (u32 i = 0; i < 4096; ++i) {
      float want = 0;
      for (u32 k = 0; k < 64; ++k)
        want += filled(Fill::kWhole, 0, i / 64, k) * filled(Fill::kWhole, 0, i % 64, k);
      if (out[i] != want) ++wrong;
    }
    dump.info("swizzle pattern begun at 128 of 1024, base offset " + std::to_string(base) + ": " +
              std::to_string(wrong) + " of 4096 wrong");
  }
}

void one_arrival(Dump& dump) {
  const u32 delays[][2] = {{0, 0}, {0, 50}, {50, 0}};
  for (const auto& delay : delays) {
    Buffer<u32> count(1);
    Probe p{};
    p.delay_issue = delay[0];
    p.delay_wait = delay[1];
    p.count = count.upload();
    run(one_arrival_kernel, {1, 256, kTile + 16384}, p);
    dump.info("three warps late by " + std::to_string(20 * delay[0]) + " ns before the product, " +
              std::to_string(20 * delay[1]) + " ns before the wait: " +
              std::to_string(count.fetch()[0]) + " of 25600 threads read what came after");
  }
}

}  // namespace
#endif

void add_probes(Cases& cases) {
#if defined(__CUDACC__)
  cases.push_back({"probe_narrow_box", Needs::kProbe, narrow_box});
  cases.push_back({"probe_pattern_start", Needs::kProbe, pattern_start});
  cases.push_back({"probe_one_arrival", Needs::kProbe, one_arrival});
  cases.push_back({"probe_negative_store", Needs::kProbe, negative_store});
#else
  (void)cases;
#endif
}

}  // namespace conformance
