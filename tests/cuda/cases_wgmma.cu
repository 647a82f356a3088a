// Groups of products in flight, products through stmatrix, a pipeline of specialised warps (sm_90a).
#include "tests/cuda/product.h"

namespace conformance {
namespace {

#if PRIM_HAS_SM90A
// Constants, so that nothing but products stands between two products.
PRIM_FUNCTION constexpr Operand square() { return {false, Swizzle::k128, 64, 64}; }
PRIM_FUNCTION constexpr Operand turned() { return {true, Swizzle::k128, 64, 64}; }
PRIM_FUNCTION constexpr Operand deep() { return {true, Swizzle::k128, 128, 128}; }
#endif

KERNEL_FUNCTION(32) stmatrix_kernel(Words p) {  // rows not adjacent
#if PRIM_HAS_SM90A
  u16* s = reinterpret_cast<u16*>(prim::dynamic_shared());
  const u32 l = prim::thread_idx().x;
  for (u32 i = l; i < 2 * 32 * 24; i += 32) s[i] = 0;
  prim::sync_warp();
  u32 r[4] = {p.in[4 * l], p.in[4 * l + 1], p.in[4 * l + 2], p.in[4 * l + 3]};
  u16* row = s + 24 * ((5 * l + 3) % 32);
  prim::stmatrix_x4(row, r);
  prim::stmatrix_x4_trans(row + 32 * 24, r);
  prim::sync_warp();
  for (u32 i = l; i < 2 * 32 * 24; i += 32) p.out[i] = s[i];
#endif
}

void stmatrix(Dump& dump) {
  Buffer<u32> in(128), out(2 * 32 * 24);
  for (u32 i = 0; i < in.size(); ++i) in[i] = mixed(i);
  run(stmatrix_kernel, {1, 32, 2 * 32 * 48}, Words{in.upload(), out.upload()});
  dump.exact(out.fetch());
}

/// A from registers, one group per k slice; each slice's fragments are loaded while kPending groups are in flight.
template <u32 kPending>
KERNEL_FUNCTION(128, 1)
groups_kernel(const GRID_CONSTANT Product p) {
#if PRIM_HAS_SM90A
  load_operands(p, false);
  const u32 start_b = prim::shared_u32(tiles());
  float d[64];
#pragma unroll
  for (u32 i = 0; i < 64; ++i) d[i] = 0;
  prim::fence_registers(d);
  u32 a[2][4];
#pragma unroll
  for (u32 r = 0; r < 4; ++r) a[0][r] = fragment(p, 0, r);
  prim::fence_registers(a[0]);
#pragma unroll
  for (u32 j = 0; j < 8; ++j) {
    prim::wgmma_fence();
    prim::wgmma_bf16_rs<128, true>(d, a[j % 2], deep().descriptor(start_b, j), true);
    prim::wgmma_commit();
    prim::wgmma_wait<kPending>();
    if (j == 7) break;
#pragma unroll
    for (u32 r = 0; r < 4; ++r) a[(j + 1) % 2][r] = fragment(p, j + 1, r);
    prim::fence_registers(a[(j + 1) % 2]);
  }
  prim::wgmma_wait<0>();
  prim::fence_registers(d);
  store_accumulator(p.out, 128, d);
#endif
}

template <u32 kPending>
void groups(Dump& dump) {
  Matrix a({false, Swizzle::k128, 64, 128}, Fill::kWhole, 0, false);
  Matrix b({true, Swizzle::k128, 128, 128}, Fill::kWhole, 1, false);
  Buffer<float> out(64 * 128);
  run(groups_kernel<kPending>, {1, 128, kTile + b.operand.bytes()},
      Product{a.map, b.map, a.operand, b.operand, a.data.upload(), 0, 0, out.upload()});
  dump.near(out.fetch(), 0, 0);
}

/// Two accumulators, two groups: the first is complete when one is still allowed to be under way.
KERNEL_FUNCTION(128, 1) two_groups_kernel(const GRID_CONSTANT Product p) {
#if PRIM_HAS_SM90A
  load_operands(p, true);
  const u32 start_a = prim::shared_u32(tiles()), start_b = start_a + p.a.bytes();
  float d[32], e[32];
#pragma unroll
  for (u32 i = 0; i < 32; ++i) d[i] = e[i] = 0;
  prim::fence_registers(d);
  prim::fence_registers(e);
  prim::wgmma_fence();
#pragma unroll
  for (u32 j = 0; j < 4; ++j)
    prim::wgmma_bf16<64, false, false>(d, square().descriptor(start_a, j),
                                       square().descriptor(start_b, j), true);
  prim::wgmma_commit();
#pragma unroll
  for (u32 j = 0; j < 4; ++j)
    prim::wgmma_bf16<64, false, false>(e, square().descriptor(start_b, j),
                                       square().descriptor(start_a, j), true);
  prim::wgmma_commit();
  prim::wgmma_wait<1>();
  prim::fence_registers(d);
  store_accumulator(p.out, 64, d);
  prim::wgmma_wait<0>();
  prim::fence_registers(e);
  store_accumulator(p.out + 4096, 64, e);
#endif
}

/// (A B^T) B: the first product goes through stmatrix and swizzled shared memory into the second.
KERNEL_FUNCTION(128, 1) chain_kernel(const GRID_CONSTANT Product p) {
#if PRIM_HAS_SM90A
  load_operands(p, true);
  const u32 start_a = prim::shared_u32(tiles()), start_b = start_a + 8192,
            start_s = start_a + 16384;
  const u32 warp = prim::thread_idx().x / 32, lane = prim::thread_idx().x % 32;
  float d[32];
#pragma unroll
  for (u32 i = 0; i < 32; ++i) d[i] = 0;
  prim::fence_registers(d);
  prim::wgmma_fence();
#pragma unroll
  for (u32 j = 0; j < 4; ++j)
    prim::wgmma_bf16<64, false, false>(d, square().descriptor(start_a, j),
                                       square().descriptor(start_b, j), true);
  prim::wgmma_commit();
  prim::wgmma_wait<0>();
  prim::fence_registers(d);
#pragma unroll
  for (u32 n = 0; n < 64; n += 16) {
    u32 r[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) r[i] = prim::pack_bf16x2(d[n / 2 + 2 * i], d[n / 2 + 2 * i + 1]);
    const u32 row = 16 * warp + lane % 16, column = n + 8 * (lane / 16);
    prim::stmatrix_x4(tiles() + 16384 + prim::swizzled(128 * row + 2 * column, Swizzle::k128), r);
  }
  prim::fence_proxy_async();
  prim::sync_block();
  prim::wgmma_fence();
#pragma unroll
  for (u32 j = 0; j < 4; ++j)
    prim::wgmma_bf16<64, false, true>(d, square().descriptor(start_s, j),
                                      turned().descriptor(start_b, j), j > 0);
  prim::wgmma_commit();
  prim::wgmma_wait<0>();
  prim::fence_registers(d);
  store_accumulator(p.out, 64, d);
#endif
}

void two_products(Dump& dump, void (*kernel)(Product), u32 results, u32 more_bytes) {
  Matrix a({false, Swizzle::k128, 64, 64}, Fill::kWhole, 0, false);
  Matrix b({false, Swizzle::k128, 64, 64}, Fill::kWhole, 1, false);
  Buffer<float> out(results * 4096);
  run(kernel, {1, 128, kTile + 16384 + more_bytes},
      Product{a.map, b.map, a.operand, b.operand, a.data.upload(), 0, 0, out.upload()});
  dump.near(out.fetch(), 0, 0);
}

// A producer warpgroup and two consumers with unequal registers: 128 x 64 x 512 through a ring of three slots -------------

constexpr u32 kSlots = 3, kSteps = 8, kSlotBytes = 3 * 8192;

#if PRIM_HAS_SM90A
DEVICE_FUNCTION void produce(const Product& p, u64* full, u64* empty) {
  for (u32 i = 0; i < kSteps; ++i) {
    const u32 s = i % kSlots;
    unsigned char* slot = tiles() + kSlotBytes * s;
    prim::mbar_wait(empty + s, (i / kSlots & 1) ^ 1);
    prim::mbar_arrive_expect_tx(full + s, kSlotBytes);
    prim::tma_load_2d(slot, p.map_a, static_cast<int>(64 * i), 0, full + s);
    prim::tma_load_2d(slot + 16384, p.map_b, static_cast<int>(64 * i), 0, full + s);
  }
}

DEVICE_FUNCTION void consume(const Product& p, u64* full, u64* empty, u32 group) {
  const u32 start = prim::shared_u32(tiles());
  float d[32];
#pragma unroll
  for (u32 i = 0; i < 32; ++i) d[i] = 0;
  prim::fence_registers(d);
  for (u32 i = 0; i < kSteps; ++i) {
    const u32 s = i % kSlots;
    prim::mbar_wait(full + s, i / kSlots & 1);
    prim::wgmma_fence();
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
      prim::wgmma_bf16<64, false, false>(
          d, square().descriptor(start + kSlotBytes * s + 8192 * group, j),
          square().descriptor(start + kSlotBytes * s + 16384, j), true);
    prim::wgmma_commit();
    prim::wgmma_wait<0>();
    if (prim::thread_idx().x % 32 == 0) prim::mbar_arrive(empty + s);
  }
  prim::fence_registers(d);
  store_accumulator(p.out + 4096 * group, 64, d);
}
#endif

KERNEL_FUNCTION(384, 1) pipeline_kernel(const GRID_CONSTANT Product p) {
#if PRIM_HAS_SM90A
  u64 *full = barriers(), *empty = full + kSlots;
  const u32 t = prim::thread_idx().x;
  if (t == 0) {
    for (u32 s = 0; s < kSlots; ++s) {
      prim::mbar_init(full + s, 1);
      prim::mbar_init(empty + s, 8);  // warps that consume
    }
    prim::fence_mbar_init();
  }
  prim::sync_block();
  if (t < 128) {
    prim::set_max_registers_down<24>();
    if (t == 0) produce(p, full, empty);
  } else {
    prim::set_max_registers_up<240>();
    consume(p, full, empty, t / 128 - 1);
  }
#endif
}

void pipeline(Dump& dump) {
  constexpr u32 kDepth = 64 * kSteps;
  Buffer<u16> a(128 * kDepth), b(64 * kDepth);
  for (u32 i = 0; i < a.size(); ++i) a[i] = bf16_bits(whole(i));
  for (u32 i = 0; i < b.size(); ++i) b[i] = bf16_bits(whole(i + 99999));
  Buffer<float> out(128 * 64);
  const Operand tile{false, Swizzle::k128, 64, 64};
  run(pipeline_kernel, {1, 384, kTile + kSlots * kSlotBytes},
      Product{matrix_map(a.upload(), kDepth, 128, kDepth, 64, 128, Swizzle::k128),
              matrix_map(b.upload(), kDepth, 64, kDepth, 64, 64, Swizzle::k128), tile, tile,
              nullptr, 0, 0, out.upload()});
  dump.near(out.fetch(), 0, 0);
}

}  // namespace

void add_wgmma_cases(Cases& cases) {
  const auto add = [&](const char* name, std::function<void(Dump&)> body) {
    cases.push_back({name, Needs::kSm90a, std::move(body)});
  };
  add("stmatrix", stmatrix);
  add("wgmma_groups_wait_0", groups<0>);
  add("wgmma_groups_wait_1", groups<1>);
  add("wgmma_two_groups", [](Dump& dump) { two_products(dump, two_groups_kernel, 2, 0); });
  add("wgmma_through_shared", [](Dump& dump) { two_products(dump, chain_kernel, 1, 8192); });
  add("wgmma_pipeline", pipeline);
}

}  // namespace conformance
