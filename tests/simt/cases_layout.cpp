// Fragment layouts against numbers of the PTX manual, and products against plain loops.
#include <vector>

#include "cuda/prim/prim.h"
#include "tests/simt/cases.h"

namespace simt_test {
namespace {

using prim::u16;
using prim::u32;
using simt::launch;

void load_tiles(
    std::uint64_t seed) {  // four tiles, element = 8 row + column; rows 8j..8j+7 are tile j
  std::vector<u32> out(32 * 14);
  launch({.block = {32}, .shared_bytes = 512, .seed = seed}, [&] {
    auto* s = reinterpret_cast<u16*>(prim::dynamic_shared());
    const u32 l = prim::thread_idx().x;
    for (u32 i = 0; i < 8; ++i) s[8 * l + i] = static_cast<u16>(8 * l + i);
    prim::sync_warp();
    u32 r1[1], r2[2], r4[4];
    u32* o = &out[14 * l];
    prim::ldmatrix_x4(r4, s + 8 * l);
    for (u32 j = 0; j < 4; ++j) o[j] = r4[j];
    prim::ldmatrix_x4_trans(r4, s + 8 * l);
    for (u32 j = 0; j < 4; ++j) o[4 + j] = r4[j];
    prim::ldmatrix_x2(r2, l < 16 ? s + 8 * l : nullptr);  // addresses of other lanes are ignored
    o[8] = r2[0], o[9] = r2[1];
    prim::ldmatrix_x2_trans(r2, l < 16 ? s + 8 * l : nullptr);
    o[10] = r2[0], o[11] = r2[1];
    prim::ldmatrix_x1(r1, l < 8 ? s + 8 * l : nullptr);
    o[12] = r1[0];
    prim::ldmatrix_x1_trans(r1, l < 8 ? s + 8 * l : nullptr);
    o[13] = r1[0];
  });
  for (u32 j = 0; j < 4; ++j) {  // lane 13
    expect(out[14 * 13 + j] == (64 * j + 26) + (64 * j + 27) * 65536, "plain", j);
    expect(out[14 * 13 + 4 + j] == (64 * j + 19) + (64 * j + 27) * 65536, "trans", j);
  }
  for (u32 l = 0; l < 32; ++l) {
    for (u32 j = 0; j < 2; ++j) expect(out[14 * l + 8 + j] == out[14 * l + j], "x2", l);
    for (u32 j = 0; j < 2; ++j) expect(out[14 * l + 10 + j] == out[14 * l + 4 + j], "x2 trans", l);
    expect(out[14 * l + 12] == out[14 * l] && out[14 * l + 13] == out[14 * l + 4], "x1", l);
  }
}

void store_tiles(std::uint64_t seed) {  // stmatrix undoes ldmatrix; movmatrix transposes
  std::vector<u16> out(2 * 256);
  std::vector<u32> moved(64);
  launch({.block = {32}, .shared_bytes = 1536, .seed = seed}, [&] {
    auto* s = reinterpret_cast<u16*>(prim::dynamic_shared());
    const u32 l = prim::thread_idx().x;
    for (u32 i = 0; i < 8; ++i) s[8 * l + i] = static_cast<u16>(8 * l + i);
    prim::sync_warp();
    u32 r[4];
    prim::ldmatrix_x4(r, s + 8 * l);
    moved[l] = prim::movmatrix_trans(r[0]);
    prim::stmatrix_x4(s + 256 + 8 * l, r);
    prim::stmatrix_x4_trans(s + 512 + 8 * l, r);
    prim::ldmatrix_x4_trans(r, s + 8 * l);
    moved[32 + l] = r[0];
    prim::sync_warp();
    for (u32 i = 0; i < 8; ++i) {
      out[8 * l + i] = s[256 + 8 * l + i];
      out[256 + 8 * l + i] = s[512 + 8 * l + i];
    }
  });
  for (u32 i = 0; i < 256; ++i) {
    expect(out[i] == i, "stmatrix", i);
    expect(out[256 + i] == i / 64 * 64 + i % 8 * 8 + i / 8 % 8, "stmatrix trans", i);
  }
  for (u32 l = 0; l < 32; ++l) expect(moved[l] == moved[32 + l], "movmatrix", l);
}

enum class Format { kBf16, kF16, kTf32 };

// One-hot fragments: which element of A and B each register of lane 13 is, read off the product.
template <Format kFormat>
void fragments(std::uint64_t seed) {
  constexpr u32 kDepth = kFormat == Format::kTf32 ? 8 : 16;
  constexpr u32 kLane = 13, kOne = kFormat == Format::kBf16  ? 0x3f80
                                   : kFormat == Format::kF16 ? 0x3c00
                                                             : 0x3f800000;
  constexpr u32 kPerRegister = kFormat == Format::kTf32 ? 1 : 2;
  // (row, k) of A and (k, n) of B per register and half, from the tables of the manual
  const u32 a16[8][2] = {{3, 2}, {3, 3}, {11, 2}, {11, 3}, {3, 10}, {3, 11}, {11, 10}, {11, 11}};
  const u32 a8[4][2] = {{3, 1}, {11, 1}, {3, 5}, {11, 5}};
  for (u32 i = 0; i < 4 * kPerRegister; ++i) {
    const u32 row = kDepth == 16 ? a16[i][0] : a8[i % 4][0],
              k = kDepth == 16 ? a16[i][1] : a8[i % 4][1];
    std::vector<float> out(128);
    launch({.block = {32}, .seed = seed}, [&] {
      const u32 l = prim::thread_idx().x, g = l / 4, t = l % 4;
      float d[4] = {};
      u32 a[4] = {}, b[2] = {};
      if (l == kLane) a[i / kPerRegister] = kOne << 16 * (i % kPerRegister);
      for (u32 r = 0; r < 2; ++r) {  // B[k][n] = 16 if n == 3 and k is the hot one
        for (u32 e = 0; e < kPerRegister; ++e) {
          const u32 own = kDepth == 16 ? 2 * t + e + 8 * r : t + 4 * r;
          if (own == k && g == 3) b[r] |= kOne << 16 * e;
        }
      }
      if (kFormat == Format::kBf16) prim::mma_bf16(d, a, b[0], b[1]);
      if (kFormat == Format::kF16) prim::mma_f16(d, a, b[0], b[1]);
      if (kFormat == Format::kTf32) prim::mma_tf32(d, a, b[0], b[1]);
      for (u32 r = 0; r < 4; ++r) out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = d[r];
    });
    for (u32 j = 0; j < 128; ++j)
      expect(out[j] == (j == row * 8 + 3 ? 1.0F : 0.0F), "one-hot product", j);
  }
}

// D (16x16) = A B with every way of the address table, then E = D A by handing the accumulators on as an A operand.
void products(std::uint64_t seed) {
  std::vector<float> got(2 * 256);
  std::vector<double> a(256), b(256), want(512);
  for (u32 i = 0; i < 256; ++i) a[i] = small_value(i), b[i] = small_value(1000 + i) / 8;
  for (u32 r = 0; r < 16; ++r)
    for (u32 c = 0; c < 16; ++c)
      for (u32 k = 0; k < 16; ++k) want[16 * r + c] += a[16 * r + k] * b[16 * k + c];
  for (u32 variant = 0; variant < 4; ++variant) {
    const bool a_flipped = variant % 2 != 0, b_flipped = variant / 2 != 0;
    launch({.block = {32}, .shared_bytes = 1024, .seed = seed}, [&] {
      auto* sa = reinterpret_cast<u16*>(prim::dynamic_shared());
      u16* sb = sa + 256;
      const u32 l = prim::thread_idx().x;
      for (u32 i = l; i < 256; i += 32) {
        const u32 flip = i % 16 * 16 + i / 16;
        sa[i] = prim::float_to_bf16(static_cast<float>(a[a_flipped ? flip : i]));
        sb[i] = prim::float_to_bf16(static_cast<float>(b[b_flipped ? flip : i]));
      }
      prim::sync_warp();
      u32 ra[4], rb[4];
      float d[2][4] = {};
      if (a_flipped) {  // [k][m]
        prim::ldmatrix_x4_trans(ra, sa + (l % 8 + 8 * (l / 16)) * 16 + 8 * (l / 8 % 2));
      } else {
        prim::ldmatrix_x4(ra, sa + l % 16 * 16 + 8 * (l / 16));
      }
      if (b_flipped) {  // [n][k]
        prim::ldmatrix_x4(rb, sb + (l % 8 + 8 * (l / 16)) * 16 + 8 * (l / 8 % 2));
      } else {
        prim::ldmatrix_x4_trans(rb, sb + l % 16 * 16 + 8 * (l / 16));
      }
      for (u32 n = 0; n < 2; ++n) prim::mma_bf16(d[n], ra, rb[2 * n], rb[2 * n + 1]);
      for (u32 n = 0; n < 2; ++n) {
        for (u32 r = 0; r < 4; ++r) {
          got[(l / 4 + 8 * (r / 2)) * 16 + 8 * n + 2 * (l % 4) + r % 2] = d[n][r];
        }
      }
      float e[4] = {};
      const u32 handed[4] = {
          prim::pack_bf16x2(d[0][0], d[0][1]), prim::pack_bf16x2(d[0][2], d[0][3]),
          prim::pack_bf16x2(d[1][0], d[1][1]), prim::pack_bf16x2(d[1][2], d[1][3])};
      prim::mma_bf16(e, handed, rb[0], rb[1]);
      for (u32 r = 0; r < 4; ++r) got[256 + (l / 4 + 8 * (r / 2)) * 8 + 2 * (l % 4) + r % 2] = e[r];
    });
    for (u32 r = 0; r < 16; ++r) {
      for (u32 c = 0; c < 8; ++c) {
        double& sum = want[256 + 8 * r + c] = 0;
        for (u32 k = 0; k < 16; ++k) {
          const double rounded =
              prim::bf16_to_float(prim::float_to_bf16(static_cast<float>(want[16 * r + k])));
          sum += rounded * b[16 * k + c];
        }
      }
    }
    expect_near(got.data(), want.data(), 256, 1e-4, "A B");
    expect_near(got.data() + 256, want.data() + 256, 128, 1e-2, "(A B) B");
  }
}

void bank_conflicts(std::uint64_t seed) {
  for (const bool swizzle : {false, true}) {
    const simt::Counters counts = launch({.block = {32}, .shared_bytes = 4096, .seed = seed}, [&] {
      const u32 l = prim::thread_idx().x;
      u32 r[4], chunk = l / 16;
      if (swizzle) chunk ^= l % 8;
      prim::ldmatrix_x4(r, prim::dynamic_shared() + l % 16 * 128 + 16 * chunk);
    });
    expect(counts.ldmatrix == 1 && counts.ldmatrix_conflicts == (swizzle ? 0 : 28),
           "bank conflicts", swizzle);
  }
}

const Case kCases[] = {
    {"ldmatrix", load_tiles},
    {"stmatrix and movmatrix", store_tiles},
    {"mma bf16 fragments", fragments<Format::kBf16>},
    {"mma f16 fragments", fragments<Format::kF16>},
    {"mma tf32 fragments", fragments<Format::kTf32>},
    {"products by the address table", products},
    {"bank conflicts are counted", bank_conflicts},
};

}  // namespace

List<Case> layout_cases() { return {kCases, sizeof kCases / sizeof *kCases}; }

}  // namespace simt_test
