// wgmma products: every shape, both orders of the operands, every swizzle, A from shared memory and from registers.
#include "tests/cuda/product.h"

namespace conformance {
namespace {

template <int N, bool kHalf, bool kTransA, bool kTransB>
KERNEL_FUNCTION(128, 1)
shared_kernel(const GRID_CONSTANT Product p) {
#if PRIM_HAS_SM90A
  load_operands(p, true);
  const u32 start_a = prim::shared_u32(tiles()), start_b = start_a + p.a.bytes();
  float d[N / 2];
#pragma unroll
  for (u32 i = 0; i < N / 2; ++i) d[i] = 7;  // the first product replaces it
  prim::fence_registers(d);
  for (u32 j = 0; j < p.a.depth / 16; ++j) {
    const u64 a = p.a.descriptor(start_a, j) ^ p.flip_a, b = p.b.descriptor(start_b, j) ^ p.flip_b;
    prim::wgmma_fence();
    if constexpr (kHalf) {
      prim::wgmma_f16<N, kTransA, kTransB>(d, a, b, j > 0);
    } else {
      prim::wgmma_bf16<N, kTransA, kTransB>(d, a, b, j > 0);
    }
  }
  prim::wgmma_commit();
  prim::wgmma_wait<0>();
  prim::fence_registers(d);
  store_accumulator(p.out, N, d);
#endif
}

template <int N, bool kHalf, bool kTransB>
KERNEL_FUNCTION(128, 1)
registers_kernel(const GRID_CONSTANT Product p) {
#if PRIM_HAS_SM90A
  load_operands(p, false);
  const u32 start_b = prim::shared_u32(tiles());
  float d[N / 2];
#pragma unroll
  for (u32 i = 0; i < N / 2; ++i) d[i] = 7;  // to which the products are added
  prim::fence_registers(d);
  for (u32 j = 0; j < p.a.depth / 16; ++j) {
    u32 a[4];
#pragma unroll
    for (u32 r = 0; r < 4; ++r) a[r] = fragment(p, j, r);
    prim::fence_registers(a);
    const u64 b = p.b.descriptor(start_b, j);
    prim::wgmma_fence();
    if constexpr (kHalf) {
      prim::wgmma_f16_rs<N, kTransB>(d, a, b, true);
    } else {
      prim::wgmma_bf16_rs<N, kTransB>(d, a, b, true);
    }
    prim::wgmma_commit();
    prim::wgmma_wait<0>();
    prim::fence_registers(d);
  }
  store_accumulator(p.out, N, d);
#endif
}

/// Name of a product: the shape, k or mn for the order of A (r: registers) and B, their swizzles.
struct Shape {
  u32 n;
  bool half, registers, trans_a, trans_b;
  Swizzle mode_a, mode_b;
  u32 depth = 64;

  std::string name() const {
    return std::string("wgmma_") + (half ? "f16" : "bf16") + "_n" + std::to_string(n) + "k" +
           std::to_string(depth) + "_" +
           (registers ? "r" : (trans_a ? "mn" : "k") + std::string(mode_name(mode_a))) + "_" +
           (trans_b ? "mn" : "k") + mode_name(mode_b);
  }
};

struct Fills {
  Fill a = Fill::kWhole, b = Fill::kWhole;
  u64 flip_a = 0, flip_b = 0;
};

void product(Dump& dump, void (*kernel)(Product), const Shape& shape, const Fills& fills) {
  Matrix a({shape.trans_a, shape.mode_a, 64, shape.depth}, fills.a, 0, shape.half);
  Matrix b({shape.trans_b, shape.mode_b, shape.n, shape.depth}, fills.b, 1, shape.half);
  Buffer<float> out(64 * shape.n);
  const u32 bytes = b.operand.bytes() + (shape.registers ? 0 : a.operand.bytes());
  run(kernel, {1, 128, kTile + bytes},
      Product{a.map, b.map, a.operand, b.operand, a.data.upload(), fills.flip_a, fills.flip_b,
              out.upload()});
  // Sums of whole numbers are exact in any order.
  dump.near(out.fetch(), fills.a == Fill::kFraction ? 5e-5 : 0, 0);
}

void adder(Dump& dump) {  // which bits the adder of the tensor cores keeps
  Matrix a({false, Swizzle::k128, 64, 64}, Fill::kAdder, 0, false);
  Matrix b({false, Swizzle::k128, 8, 64}, Fill::kAdder, 1, false);
  Buffer<float> out(64 * 8);
  run(shared_kernel<8, false, false, false>,
      {1, 128, kTile + a.operand.bytes() + b.operand.bytes()},
      Product{a.map, b.map, a.operand, b.operand, a.data.upload(), 0, 0, out.upload()});
  dump.near(out.fetch(), 2.4e-7, 0);
  for (u32 sign = 0; sign < 2; ++sign) {
    u32 kept = 0;
    while (kept < 63 && out[8 * (kept + 1) + sign] != 1.0F) ++kept;
    dump.info("1 " + std::string(sign == 0 ? "+" : "-") +
              " 2^-n is not 1 up to n = " + std::to_string(kept));
  }
}

void add(Cases& cases, const std::string& suffix, void (*kernel)(Product), const Shape& shape,
         const Fills& fills) {
  cases.push_back({shape.name() + suffix, Needs::kSm90a,
                   [=](Dump& dump) { product(dump, kernel, shape, fills); }});
}

/// Small whole numbers; for the usual widths also each operand by itself, the other being the identity.
void add_fills(Cases& cases, void (*kernel)(Product), const Shape& shape) {
  add(cases, "", kernel, shape, {});
  if (shape.half || (shape.n != 64 && shape.n != 128)) return;
  add(cases, "_b", kernel, shape, {Fill::kIdentity, Fill::kCoded});
  add(cases, "_a", kernel, shape, {Fill::kCoded, Fill::kIdentity});
}

template <int N>
void add_width(Cases& cases) {
  for (const Swizzle mode : kModes) {
    add_fills(cases, shared_kernel<N, false, false, false>,
              {N, false, false, false, false, mode, mode});
    if (prim::swizzle_bytes(mode) / 2 > N) continue;  // a strip is wider than the operand
    add_fills(cases, shared_kernel<N, false, false, true>,
              {N, false, false, false, true, Swizzle::k128, mode});
    add_fills(cases, shared_kernel<N, false, true, false>,
              {N, false, false, true, false, mode, Swizzle::k128});
    add_fills(cases, shared_kernel<N, false, true, true>,
              {N, false, false, true, true, mode, mode});
    add_fills(cases, registers_kernel<N, false, true>,
              {N, false, true, false, true, Swizzle::kNone, mode});
  }
  add_fills(cases, registers_kernel<N, false, false>,
            {N, false, true, false, false, Swizzle::kNone, Swizzle::k128});
  add_fills(cases, shared_kernel<N, true, false, false>,
            {N, true, false, false, false, Swizzle::k128, Swizzle::k128});
  add_fills(cases, registers_kernel<N, true, false>,
            {N, true, true, false, false, Swizzle::kNone, Swizzle::k128});
}

}  // namespace

void add_product_cases(Cases& cases) {
  add_width<8>(cases);
  add_width<16>(cases);
  add_width<32>(cases);
  add_width<64>(cases);
  add_width<128>(cases);
  add_width<192>(cases);
  add_width<256>(cases);
  const Swizzle wide = Swizzle::k128;
  // K of two strips; transposed f16; accumulation in float32.
  add_fills(cases, shared_kernel<64, false, false, false>,
            {64, false, false, false, false, wide, wide, 128});
  add_fills(cases, shared_kernel<128, false, false, true>,
            {128, false, false, false, true, wide, wide, 128});
  add_fills(cases, shared_kernel<64, true, true, true>, {64, true, false, true, true, wide, wide});
  add_fills(cases, registers_kernel<64, true, true>,
            {64, true, true, false, true, Swizzle::kNone, wide});
  add(cases, "_accumulation", shared_kernel<128, false, false, false>,
      {128, false, false, false, false, wide, wide, 128}, {Fill::kFraction, Fill::kFraction});
  cases.push_back({"wgmma_adder", Needs::kSm90a, adder});
  // The leading offset does not matter where an operand is one atom wide, nor in a swizzled K-major operand.
  const u64 leading = u64{0x2aa} << 16;
  add(cases, "_any_leading", shared_kernel<64, false, true, true>,
      {64, false, false, true, true, wide, wide}, {Fill::kWhole, Fill::kWhole, leading, leading});
  add(cases, "_any_leading", shared_kernel<64, false, false, false>,
      {64, false, false, false, false, wide, wide}, {Fill::kWhole, Fill::kWhole, leading, leading});
}

}  // namespace conformance
