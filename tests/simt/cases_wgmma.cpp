// wgmma: descriptors, layouts of the operands and accumulators, products against plain loops, whole pipelines.
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
u32 tile_address(u32 offset) { return prim::shared_u32(prim::dynamic_shared() + kTile) + offset; }

void descriptors(std::uint64_t) {
  expect(prim::wgmma_descriptor(0x8400, 16, 1024, Swizzle::k128) == 0x4000004000010840, "K-major");
  expect(prim::wgmma_descriptor(0x8420, 16, 1024, Swizzle::k128) == 0x4000004000010842, "next k16");
  expect(prim::wgmma_descriptor(0x8400, 8192, 1024, Swizzle::k128) == 0x4000004002000840,
         "MN-major");
  expect(prim::wgmma_descriptor(0x8c00, 8192, 1024, Swizzle::k128) == 0x40000040020008c0,
         "next k16");
  const Operand k{false, Swizzle::k128, 64, 128}, mn{true, Swizzle::k128, 128, 64};
  expect(k.descriptor(0x8400, 1) == 0x4000004000010842, "K-major operand");
  expect(mn.descriptor(0x8400, 1) == 0x40000040020008c0, "MN-major operand");
}

/// Element (mn, k) of an operand whose byte is known: k >= 16 by way of a later start. The other operand is the identity.
struct Place {
  bool transposed;
  Swizzle mode;
  u32 leading, stride, step, mn, k, byte;
};

template <bool kTransposed>
void check_place(const Place& place, std::uint64_t seed) {
  std::vector<float> out(64 * 128);
  launch({.block = {128}, .shared_bytes = kTile + 40960, .seed = seed}, [&] {
    auto* tile = reinterpret_cast<u16*>(prim::dynamic_shared() + kTile);
    const u32 t = prim::thread_idx().x;
    for (u32 i = t; i < 20480; i += 128) tile[i] = 0;
    prim::sync_block();
    if (t == 0) tile[place.byte / 2] = 0x3f80;
    // The identity, K-major without swizzle, 32 KB behind: chunks of eight k, 64 rows each.
    if (t < 16) tile[16384 + t / 8 * 512 + t * 8 + t % 8] = 0x3f80;
    prim::fence_proxy_async();
    prim::sync_block();
    float d[64];
    const u64 a = prim::wgmma_descriptor(tile_address(32768), 1024, 128, Swizzle::kNone);
    const u64 b = prim::wgmma_descriptor(tile_address(place.k / 16 * place.step), place.leading,
                                         place.stride, place.mode);
    prim::wgmma_fence();
    prim::wgmma_bf16<128, false, kTransposed>(d, a, b, false);
    prim::wgmma_commit();
    prim::wgmma_wait<0>();
    store_accumulator(out.data(), 128, d);
  });
  for (u32 i = 0; i < out.size(); ++i) {
    const bool here = i / 128 == place.k % 16 && i % 128 == place.mn;
    expect(out[i] == (here ? 1.0F : 0.0F), "byte of an element", place.byte);
  }
}

void operand_layouts(std::uint64_t seed) {
  const Place places[] = {
      {false, Swizzle::k128, 16, 1024, 32, 5, 24, 736},
      {false, Swizzle::k128, 16, 1024, 32, 70, 13, 9082},
      {false, Swizzle::k64, 16, 512, 32, 5, 24, 336},
      {false, Swizzle::k64, 16, 512, 32, 70, 13, 4522},
      {true, Swizzle::k128, 8192, 1024, 2048, 5, 24, 3082},
      {true, Swizzle::k128, 8192, 1024, 2048, 70, 13, 9948},
      {true, Swizzle::k64, 4096, 512, 1024, 5, 24, 1546},
      {true, Swizzle::k64, 4096, 512, 1024, 70, 13, 9068},
      {true, Swizzle::k32, 2048, 256, 512, 5, 24, 778},
      {true, Swizzle::k32, 2048, 256, 512, 70, 13, 8636},
      {true, Swizzle::kNone, 128, 1024, 256, 5, 24, 394},
      {true, Swizzle::kNone, 128, 1024, 256, 70, 13, 8412},
      {true, Swizzle::kNone, 2048, 128, 4096, 5, 24, 6154},
      {true, Swizzle::kNone, 2048, 128, 4096, 70, 13, 3164},
      {false, Swizzle::kNone, 2048, 128, 4096, 5, 24, 6224},
      {false, Swizzle::kNone, 2048, 128, 4096, 70, 13, 3178},
  };
  for (const Place& place : places) {
    if (place.transposed) {
      check_place<true>(place, seed);
    } else {
      check_place<false>(place, seed);
    }
  }
}

/// 64 x N x 64 from matrices in global memory, by tensor copies of one box per strip.
template <int N, bool kTransA, bool kTransB>
void product(Swizzle mode_a, Swizzle mode_b, std::uint64_t seed, u32 offset = 0) {
  constexpr u32 kDepth = 64;
  const Operand a{kTransA, mode_a, 64, kDepth}, b{kTransB, mode_b, N, kDepth};
  Matrix in_a(a), in_b(b, 1);
  std::vector<float> out(64 * N);
  launch({.block = {128},
          .shared_bytes = kTile + a.bytes() + b.bytes(),
          .seed = seed,
          .shared_offset = offset},
         [&] {
           u64* bar = shared_barriers();
           unsigned char* tiles = prim::dynamic_shared() + kTile;
           const u32 t = prim::thread_idx().x;
           if (t == 0) {
             prim::mbar_init(bar, 1);
             prim::fence_mbar_init();
             prim::mbar_arrive_expect_tx(bar, a.bytes() + b.bytes());
             load_strips(tiles, in_a, bar);
             load_strips(tiles + a.bytes(), in_b, bar);
           }
           prim::sync_block();
           prim::mbar_wait(bar, 0);
           float d[N / 2];
           prim::wgmma_fence();
           for (u32 j = 0; j < kDepth / 16; ++j) {
             prim::wgmma_bf16<N, kTransA, kTransB>(d, a.descriptor(tile_address(0), j),
                                                   b.descriptor(tile_address(a.bytes()), j), j > 0);
           }
           prim::wgmma_commit();
           expect(std::isnan(d[3]), "NaN until the wait");
           prim::wgmma_wait<0>();
           prim::fence_registers(d);
           store_accumulator(out.data(), N, d);
         });
  expect_product(out, in_a, in_b, N);
}

template <int N>
void all_majors(std::uint64_t seed) {
  for (const Swizzle mode : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
    product<N, false, false>(mode, mode, seed);
    if (prim::swizzle_bytes(mode) / 2 > N) continue;  // a strip is wider than the operand
    product<N, false, true>(Swizzle::k128, mode, seed);
    product<N, true, false>(mode, Swizzle::k128, seed);
    product<N, true, true>(mode, mode, seed);
  }
}

template <bool kTransB>
void registers_product(std::uint64_t seed) {  // A as a product's accumulator would be packed
  constexpr u32 kDepth = 64;
  const Operand a{false, Swizzle::k128, 64, kDepth}, b{kTransB, Swizzle::k128, 64, kDepth};
  Matrix in_a(a), in_b(b, 1);
  std::vector<float> out(64 * 64);
  launch({.block = {128}, .shared_bytes = kTile + b.bytes(), .seed = seed}, [&] {
    u64* bar = shared_barriers();
    const u32 t = prim::thread_idx().x, row = 16 * (t / 32) + t % 32 / 4, column = 2 * (t % 4);
    if (t == 0) {
      prim::mbar_init(bar, 1);
      prim::fence_mbar_init();
      prim::mbar_arrive_expect_tx(bar, b.bytes());
      load_strips(prim::dynamic_shared() + kTile, in_b, bar);
    }
    prim::sync_block();
    float s[32], d[32];
    for (u32 v = 0; v < 32; ++v) {
      d[v] = 1;
      s[v] = in_a.at(row + 8 * (v / 2 % 2), 8 * (v / 4) + column + v % 2);
    }
    u32 fragments[4][4];
    for (u32 j = 0; j < 4; ++j)
      for (u32 r = 0; r < 4; ++r)
        fragments[j][r] = prim::pack_bf16x2(s[8 * j + 2 * r], s[8 * j + 2 * r + 1]);
    prim::mbar_wait(bar, 0);
    prim::wgmma_fence();
    for (u32 j = 0; j < 4; ++j)
      prim::wgmma_bf16_rs<64, kTransB>(d, fragments[j], b.descriptor(tile_address(0), j), true);
    prim::wgmma_commit();
    expect(fragments[2][1] == ~0U, "NaN in the fragments until the wait");
    prim::wgmma_wait<0>();
    expect(fragments[0][0] == prim::pack_bf16x2(s[0], s[1]), "fragments after the wait");
    for (float& v : d) v -= 1;
    store_accumulator(out.data(), 64, d);
  });
  expect_product(out, in_a, in_b, 64);
}

void half_product(std::uint64_t seed) {  // f16, both forms, two groups in flight
  const Operand operand{false, Swizzle::k32, 64, 16};
  Matrix in_a(operand), in_b(operand, 1);
  std::vector<float> first(64 * 64), second(64 * 64);
  launch({.block = {128}, .shared_bytes = kTile + 4096, .seed = seed}, [&] {
    auto* tiles = reinterpret_cast<u16*>(prim::dynamic_shared() + kTile);
    const u32 t = prim::thread_idx().x, row = 16 * (t / 32) + t % 32 / 4, column = 2 * (t % 4);
    for (u32 i = t; i < 1024; i += 128) {
      const u32 at = prim::swizzled(2 * i, Swizzle::k32) / 2;
      tiles[at] = prim::float_to_f16(in_a.at(i / 16, i % 16));
      tiles[1024 + at] = prim::float_to_f16(in_b.at(i / 16, i % 16));
    }
    prim::fence_proxy_async();
    prim::sync_block();
    u32 fragment[4];
    for (u32 r = 0; r < 4; ++r) {
      const u32 m = row + 8 * (r % 2), k = column + 8 * (r / 2);
      fragment[r] = prim::pack_f16x2(in_a.at(m, k), in_a.at(m, k + 1));
    }
    float d[32], e[32];
    const u64 a = operand.descriptor(tile_address(0), 0),
              b = operand.descriptor(tile_address(2048), 0);
    prim::wgmma_fence();
    prim::wgmma_f16<64, false, false>(d, a, b, false);
    prim::wgmma_commit();
    prim::wgmma_f16_rs<64, false>(e, fragment, b, false);
    prim::wgmma_commit();
    prim::wgmma_wait<1>();
    expect(!std::isnan(d[0]) && std::isnan(e[0]), "the older group is done");
    store_accumulator(first.data(), 64, d);
    prim::wgmma_wait<0>();
    store_accumulator(second.data(), 64, e);
  });
  expect_product(first, in_a, in_b, 64);
  expect_product(second, in_a, in_b, 64);
}

// An accumulator goes through shared memory (stmatrix, swizzled) into the next product: (A B^T) B = A (B^T B).
void through_shared(std::uint64_t seed) {
  const Operand k_major{false, Swizzle::k128, 64, 64}, mn_major{true, Swizzle::k128, 64, 64};
  Matrix in_a(k_major), in_b(k_major, 1);
  std::vector<float> out(64 * 64);
  launch({.block = {128}, .shared_bytes = kTile + 3 * 8192, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    unsigned char* tiles = prim::dynamic_shared() + kTile;
    const u32 t = prim::thread_idx().x, warp = t / 32, lane = t % 32;
    if (t == 0) {
      prim::mbar_init(bar, 1);
      prim::fence_mbar_init();
      prim::mbar_arrive_expect_tx(bar, 16384);
      load_strips(tiles, in_a, bar);
      load_strips(tiles + 8192, in_b, bar);
    }
    prim::sync_block();
    prim::mbar_wait(bar, 0);
    float d[32];
    prim::wgmma_fence();
    for (u32 j = 0; j < 4; ++j)
      prim::wgmma_bf16<64, false, false>(d, k_major.descriptor(tile_address(0), j),
                                         k_major.descriptor(tile_address(8192), j), j > 0);
    prim::wgmma_commit();
    prim::wgmma_wait<0>();
    for (u32 n = 0; n < 64; n += 16) {
      const float* c = d + n / 2;
      u32 r[4] = {prim::pack_bf16x2(c[0], c[1]), prim::pack_bf16x2(c[2], c[3]),
                  prim::pack_bf16x2(c[4], c[5]), prim::pack_bf16x2(c[6], c[7])};
      const u32 row = 16 * warp + lane % 16, column = n + 8 * (lane / 16);
      prim::stmatrix_x4(tiles + 16384 + prim::swizzled(128 * row + 2 * column, Swizzle::k128), r);
    }
    prim::fence_proxy_async();
    prim::sync_block();
    prim::wgmma_fence();
    for (u32 j = 0; j < 4; ++j)
      prim::wgmma_bf16<64, false, true>(d, k_major.descriptor(tile_address(16384), j),
                                        mn_major.descriptor(tile_address(8192), j), j > 0);
    prim::wgmma_commit();
    prim::wgmma_wait<0>();
    store_accumulator(out.data(), 64, d);
  });
  for (u32 m = 0; m < 64; ++m) {
    std::vector<double> s(64), want(64);
    for (u32 n = 0; n < 64; ++n) {
      double sum = 0;
      for (u32 k = 0; k < 64; ++k) sum += double{in_a.at(m, k)} * in_b.at(n, k);
      s[n] = prim::bf16_to_float(prim::float_to_bf16(static_cast<float>(sum)));
    }
    for (u32 k = 0; k < 64; ++k)
      for (u32 n = 0; n < 64; ++n) want[k] += s[n] * in_b.at(n, k);
    expect_near(&out[64 * m], want.data(), 64, 0.5, "two products");
  }
}

void misplaced_window(
    std::uint64_t seed) {  // without swizzle the window may begin at any multiple of 128
  product<64, false, true>(Swizzle::kNone, Swizzle::kNone, seed, 384);
}

// A producer warpgroup and two consumers: 128 x 64 x 256 through a ring of three slots, with unequal registers.
void specialised(std::uint64_t seed) {
  constexpr u32 kSlots = 3, kSteps = 4, kSlotBytes = 3 * 8192;
  const Operand half{false, Swizzle::k128, 64, 64};
  std::vector<u16> a(128 * 256), b(64 * 256);
  for (u32 i = 0; i < a.size(); ++i) a[i] = prim::float_to_bf16(small_value(i));
  for (u32 i = 0; i < b.size(); ++i) b[i] = prim::float_to_bf16(small_value(i + 99));
  const TensorMap map_a = matrix_map(a.data(), 256, 128, 256, 64, 128, Swizzle::k128);
  const TensorMap map_b = matrix_map(b.data(), 256, 64, 256, 64, 64, Swizzle::k128);
  std::vector<float> out(128 * 64);
  launch({.block = {384}, .shared_bytes = kTile + kSlots * kSlotBytes, .seed = seed}, [&] {
    u64 *full = shared_barriers(), *empty = full + kSlots;
    const u32 t = prim::thread_idx().x, group = t / 128;
    if (t == 0) {
      for (u32 s = 0; s < kSlots; ++s) prim::mbar_init(full + s, 1), prim::mbar_init(empty + s, 8);
      prim::fence_mbar_init();
    }
    prim::sync_block();
    if (group == 0) {
      prim::set_max_registers_down<24>();
      for (u32 i = 0; t == 0 && i < kSteps; ++i) {
        const u32 s = i % kSlots;
        unsigned char* slot = prim::dynamic_shared() + kTile + kSlotBytes * s;
        prim::mbar_wait(empty + s, (i / kSlots & 1) ^ 1);
        prim::mbar_arrive_expect_tx(full + s, kSlotBytes);
        prim::tma_load_2d(slot, map_a, static_cast<int>(64 * i), 0, full + s);
        prim::tma_load_2d(slot + 16384, map_b, static_cast<int>(64 * i), 0, full + s);
      }
    } else {
      prim::set_max_registers_up<240>();
      float d[32];
      for (u32 i = 0; i < kSteps; ++i) {
        const u32 s = i % kSlots;
        prim::mbar_wait(full + s, i / kSlots & 1);
        prim::wgmma_fence();
        for (u32 j = 0; j < 4; ++j)
          prim::wgmma_bf16<64, false, false>(
              d, half.descriptor(tile_address(kSlotBytes * s + 8192 * (group - 1)), j),
              half.descriptor(tile_address(kSlotBytes * s + 16384), j), i + j > 0);
        prim::wgmma_commit();
        prim::wgmma_wait<0>();
        if (t % 32 == 0) prim::mbar_arrive(empty + s);
      }
      store_accumulator(&out[64 * 64 * (group - 1)], 64, d);
    }
  });
  for (u32 m = 0; m < 128; ++m)
    for (u32 n = 0; n < 64; ++n) {
      double want = 0;
      for (u32 k = 0; k < 256; ++k)
        want += double{small_value(256 * m + k)} * small_value(256 * n + k + 99);
      expect_near(&out[64 * m + n], &want, 1, 1e-3, "pipeline");
    }
}

const Case kCases[] = {
    {"wgmma descriptors", descriptors},
    {"operand layouts", operand_layouts},
    {"wgmma n8", all_majors<8>},
    {"wgmma n16", all_majors<16>},
    {"wgmma n32", all_majors<32>},
    {"wgmma n64", all_majors<64>},
    {"wgmma n128", all_majors<128>},
    {"wgmma n192", all_majors<192>},
    {"wgmma n256", all_majors<256>},
    {"wgmma, A from registers", registers_product<false>},
    {"wgmma, A from registers, B transposed", registers_product<true>},
    {"wgmma f16", half_product},
    {"accumulator through shared memory", through_shared},
    {"shared window at 384", misplaced_window},
    {"specialised warps", specialised},
};

}  // namespace

List<Case> wgmma_cases() { return {kCases, sizeof kCases / sizeof *kCases}; }

}  // namespace simt_test
