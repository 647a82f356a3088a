// Barriers, shuffles, matrix fragments: what a warp and a block do on sm_80.
#include "tests/cuda/conformance.h"

namespace conformance {
namespace {

KERNEL_FUNCTION(32) shuffle_kernel(Words p) {
  const u32 l = prim::thread_idx().x;
  u32* out = p.out + 7 * l;
  const u32 own = p.in[l];
  out[0] = prim::shfl_xor(own, 5);
  out[1] = prim::shfl(own, (7 * l + 3) % 32);
  out[2] = prim::shfl_up(own, 4);
  out[3] = prim::shfl_down(own, 7);
  out[4] = prim::ballot(l % 3 == 0);
  if (l < 16) {  // each half of the warp alone
    out[5] = prim::shfl_xor(own, 8, 0xffffU);
    out[6] = prim::ballot(l == 5, 0xffffU);
  } else {
    out[5] = prim::shfl_down(own, 1, 0xffff0000U);
    out[6] = prim::ballot(l == 20, 0xffff0000U);
  }
}

KERNEL_FUNCTION(64) index_kernel(Words p) {  // every thread once, at its place
  const u32 i = prim::block_idx().x * prim::block_dim().x + prim::thread_idx().x;
  prim::atomic_add(p.out + i, i + 1 + 1000 * prim::grid_dim().x);
  prim::atomic_add(p.out + 64 * prim::grid_dim().x, 1);
}

KERNEL_FUNCTION(128) exchange_kernel(Words p) {  // through shared memory, in parts of a warp
  u32* s = reinterpret_cast<u32*>(prim::dynamic_shared());
  const u32 t = prim::thread_idx().x, mask = t % 32 < 8 ? 0xffU : 0xffffff00U;
  for (u32 i = 0; i < 4; ++i) {
    s[t] = p.in[t] + i;
    prim::sync_warp(mask);
    p.out[4 * t + i] = s[t ^ 1];
    prim::sync_warp(mask);
  }
  prim::sync_block();
  s[t] = p.in[t];
  prim::sync_block();
  p.out[512 + t] = s[(5 * t + 37) % 128];
}

KERNEL_FUNCTION(96) named_barrier_kernel(Words p) {  // a warp produces for two others
  u32* s = reinterpret_cast<u32*>(prim::dynamic_shared());
  const u32 t = prim::thread_idx().x;
  for (u32 i = 0; i < 5; ++i) {
    if (t < 32) {
      if (i > 0) prim::named_sync(2, 96);
      s[t] = p.in[32 * i + t];
      prim::named_arrive(1, 96);
    } else {
      prim::named_sync(1, 96);
      p.out[64 * i + t - 32] = s[(t + i) % 32];
      if (i < 4) prim::named_arrive(2, 96);
    }
  }
}

KERNEL_FUNCTION(32) shared_base_kernel(Words p) {
  unsigned char* s = prim::dynamic_shared();
  prim::require_aligned(s, 1024);
  if (prim::thread_idx().x == 0) {
    p.out[0] = prim::shared_u32(s) % 1024;
    p.out[1] = prim::shared_u32(s + 72) - prim::shared_u32(s);
  }
}

// Fragments ---------------------------------------------------------------------------------------------------------------

template <u32 kCount>
DEVICE_FUNCTION void write(u32* out, const u32 (&r)[kCount]) {
#pragma unroll
  for (u32 i = 0; i < kCount; ++i) out[i] = r[i];
}

KERNEL_FUNCTION(32)
ldmatrix_kernel(Words p) {  // element = its index; row j of lane j, rows not adjacent
  u16* s = reinterpret_cast<u16*>(prim::dynamic_shared());
  const u32 l = prim::thread_idx().x;
  for (u32 i = l; i < 32 * 24; i += 32) s[i] = static_cast<u16>(p.in[0] + i);
  prim::sync_warp();
  const u16* row = s + 24 * ((5 * l + 3) % 32);
  u32 r1[1], r2[2], r4[4];
  u32* out = p.out + 14 * l;
  prim::ldmatrix_x4(r4, row);
  write(out, r4);
  prim::ldmatrix_x4_trans(r4, row);
  write(out + 4, r4);
  prim::ldmatrix_x2(r2, row);
  write(out + 8, r2);
  prim::ldmatrix_x2_trans(r2, row);
  write(out + 10, r2);
  prim::ldmatrix_x1(r1, row);
  write(out + 12, r1);
  prim::ldmatrix_x1_trans(r1, row);
  write(out + 13, r1);
}

KERNEL_FUNCTION(32) movmatrix_kernel(Words p) {
  const u32 l = prim::thread_idx().x;
  p.out[l] = prim::movmatrix_trans(p.in[l]);
}

enum class Format { kBf16, kF16, kTf32 };

/// 0 .. 255 in the format: half `e` of a register, or the register.
template <Format kFormat>
DEVICE_FUNCTION u32 coded(u32 value, u32 e) {
  const float number = static_cast<float>(value);
  if (kFormat == Format::kTf32) return prim::to_tf32(number);
  return static_cast<u32>(kFormat == Format::kBf16 ? prim::float_to_bf16(number)
                                                   : prim::float_to_f16(number))
         << 16 * e;
}
template <Format kFormat>
DEVICE_FUNCTION void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if (kFormat == Format::kBf16) prim::mma_bf16(d, a, b[0], b[1]);
  if (kFormat == Format::kF16) prim::mma_f16(d, a, b[0], b[1]);
  if (kFormat == Format::kTf32) prim::mma_tf32(d, a, b[0], b[1]);
}

/// Three products: A coded by lane, register and half times two parts of the identity; and the identity times such a B.
template <Format kFormat>
KERNEL_FUNCTION(32)
fragment_kernel(Words p) {
  constexpr u32 kHalves = kFormat == Format::kTf32 ? 1 : 2;
  const u32 l = prim::thread_idx().x, g = l / 4, t = l % 4;
  for (u32 variant = 0; variant < 3; ++variant) {
    u32 a[4] = {}, b[2] = {};
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
#pragma unroll
      for (u32 e = 0; e < kHalves; ++e) {
        const u32 row = g + 8 * (r % 2);
        const u32 k = kHalves == 2 ? 2 * t + e + 8 * (r / 2) : t + 4 * (r / 2);
        a[r] |= coded<kFormat>(variant < 2 ? 8 * l + 2 * r + e : row == k, e);
      }
    }
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
#pragma unroll
      for (u32 e = 0; e < kHalves; ++e) {
        const u32 k = kHalves == 2 ? 2 * t + e + 8 * r : t + 4 * r;
        b[r] |= coded<kFormat>(variant == 2 ? 4 * l + 2 * r + e : k == g + 8 * variant, e);
      }
    }
    float d[4] = {1, 2, 3, 4};  // the product is added
    multiply<kFormat>(d, a, b);
#pragma unroll
    for (u32 r = 0; r < 4; ++r) p.out[128 * variant + 4 * l + r] = prim::bits_of(d[r]);
  }
}

/// D = A B by every row of the address table, then D B with the accumulators handed on as an A operand.
KERNEL_FUNCTION(32) address_kernel(Words p) {
  u16* sa = reinterpret_cast<u16*>(prim::dynamic_shared());
  u16* sb = sa + 256;
  const u32 l = prim::thread_idx().x;
  for (u32 variant = 0; variant < 4; ++variant) {
    prim::sync_warp();
    for (u32 i = l; i < 256; i += 32) {
      const u32 flip = i % 16 * 16 + i / 16;
      sa[i] = static_cast<u16>(p.in[variant % 2 != 0 ? flip : i]);
      sb[i] = static_cast<u16>(p.in[256 + (variant / 2 != 0 ? flip : i)]);
    }
    prim::sync_warp();
    u32 a[4], b[4];
    if (variant % 2 != 0) {  // [k][m]
      prim::ldmatrix_x4_trans(a, sa + (l % 8 + 8 * (l / 16)) * 16 + 8 * (l / 8 % 2));
    } else {
      prim::ldmatrix_x4(a, sa + l % 16 * 16 + 8 * (l / 16));
    }
    if (variant / 2 != 0) {  // [n][k]
      prim::ldmatrix_x4(b, sb + (l % 8 + 8 * (l / 16)) * 16 + 8 * (l / 8 % 2));
    } else {
      prim::ldmatrix_x4_trans(b, sb + l % 16 * 16 + 8 * (l / 16));
    }
    float d[2][4] = {}, e[4] = {};
    prim::mma_bf16(d[0], a, b[0], b[1]);
    prim::mma_bf16(d[1], a, b[2], b[3]);
    const u32 handed[4] = {prim::pack_bf16x2(d[0][0], d[0][1]), prim::pack_bf16x2(d[0][2], d[0][3]),
                           prim::pack_bf16x2(d[1][0], d[1][1]),
                           prim::pack_bf16x2(d[1][2], d[1][3])};
    prim::mma_bf16(e, handed, b[0], b[1]);
    u32* out = p.out + 384 * variant + 12 * l;
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
      out[r] = prim::bits_of(d[0][r] + 0.0F);  // of a zero the sign is open
      out[4 + r] = prim::bits_of(d[1][r] + 0.0F);
      out[8 + r] = prim::bits_of(e[r] + 0.0F);
    }
  }
}

/// A case of words in and words out.
void add(Cases& cases, const char* name, void (*kernel)(Words), const prim::LaunchShape& shape,
         std::size_t in_count, std::size_t out_count) {
  cases.push_back({name, Needs::kSm80, [=](Dump& dump) {
                     Buffer<u32> in(in_count), out(out_count);
                     for (u32 i = 0; i < in.size(); ++i) in[i] = mixed(i);
                     run(kernel, shape, Words{in.upload(), out.upload()});
                     dump.exact(out.fetch());
                   }});
}

void address_table(Dump& dump) {
  Buffer<u32> in(512), out(4 * 384);
  for (u32 i = 0; i < 512; ++i) in[i] = bf16_bits(whole(i));
  run(address_kernel, {1, 32, 1024}, Words{in.upload(), out.upload()});
  dump.exact(out.fetch());
}

}  // namespace

void add_warp_cases(Cases& cases) {
  add(cases, "shared_base", shared_base_kernel, {1, 32, 128}, 1, 2);
  add(cases, "shuffles", shuffle_kernel, {1, 32}, 32, 7 * 32);
  add(cases, "indices", index_kernel, {5, 64}, 1, 5 * 64 + 1);
  add(cases, "barriers", exchange_kernel, {1, 128, 512}, 128, 640);
  add(cases, "named_barriers", named_barrier_kernel, {1, 96, 128}, 160, 320);
  add(cases, "ldmatrix", ldmatrix_kernel, {1, 32, 32 * 48}, 1, 32 * 14);
  add(cases, "movmatrix", movmatrix_kernel, {1, 32}, 32, 32);
  add(cases, "mma_bf16_fragments", fragment_kernel<Format::kBf16>, {1, 32}, 1, 3 * 128);
  add(cases, "mma_f16_fragments", fragment_kernel<Format::kF16>, {1, 32}, 1, 3 * 128);
  add(cases, "mma_tf32_fragments", fragment_kernel<Format::kTf32>, {1, 32}, 1, 3 * 128);
  cases.push_back({"mma_address_table", Needs::kSm80, address_table});
}

}  // namespace conformance
