// Conversions, approximate functions, accumulation.
#include <cmath>

#include "tests/cuda/conformance.h"

namespace conformance {
namespace {

struct Numbers {
  const float* in;
  float* out;
};

constexpr u32 kConversions = 12, kConverted = 1024;

/// Any NaN is as good as another.
DEVICE_FUNCTION u32 tidy16(u32 bits, u32 infinity) {
  return (bits & 0x7fffU) > infinity ? infinity + 1 : bits;
}
DEVICE_FUNCTION u32 tidy(float value) {
  return value != value ? 0x7fc00000U : prim::bits_of(value);
}
DEVICE_FUNCTION u32 tidy_pair(u32 bits, u32 infinity) {
  return tidy16(bits & 0xffffU, infinity) | tidy16(bits >> 16, infinity) << 16;
}

KERNEL_FUNCTION(128) convert_kernel(Words p) {
  const u32 i = prim::block_idx().x * 128 + prim::thread_idx().x;
  const float x = prim::float_of(p.in[i]), y = prim::float_of(p.in[(i + 1) % kConverted]);
  u32* out = p.out + kConversions * i;
  out[0] = tidy16(prim::float_to_bf16(x), 0x7f80);
  out[1] = tidy16(prim::float_to_f16(x), 0x7c00);
  out[2] = tidy_pair(prim::pack_bf16x2(x, y), 0x7f80);
  out[3] = tidy_pair(prim::pack_f16x2(x, y), 0x7c00);
  out[4] = tidy(prim::bf16_to_float(static_cast<u16>(p.in[i] >> 16)));
  out[5] = tidy(prim::f16_to_float(static_cast<u16>(p.in[i] >> 16)));
  // Subnormal numbers: whether cvt keeps them is nothing that a kernel relies on.
  const bool normal = x != x || (p.in[i] & 0x7f800000U) != 0;
  out[6] = normal ? tidy(prim::float_of(prim::to_tf32(x))) : 0;
  // Products of pairs whose exponents are kept from the ends of the range.
  const u32 a = (p.in[i] & 0x9fff9fffU) | 0x20002000U,
            b = (p.in[i] >> 3 & 0x9fff9fffU) | 0x20002000U;
  out[7] = prim::mul_bf16x2(a, b);
  // Sums as exact as the kernels want them.
  const u32 low = p.in[i] & 0x007f007fU, sign = p.in[i] & 0x00800080U;
  out[8] = prim::add_f16x2(low | 0x64006400U, sign | 0xe400e400U);
  out[9] = prim::add_bf16x2(low | 0x43004300U, sign | 0xc300c300U);
  out[10] = prim::byte_perm(p.in[i], prim::bits_of(y), p.in[i] >> 16 & 0x7777U);
  out[11] = prim::bits_of(x);
}

void conversions(Dump& dump) {
  const u32 special[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff,
                         0xff7fffff, 0x00000001, 0x007fffff, 0x00800000, 0x3f808000, 0x3f818000,
                         0x3f80ffff, 0x3f801000, 0x3f803000, 0x477fe000, 0x477ff000, 0x477fefff,
                         0x33800000, 0x33000000, 0x33000001, 0x387fc000, 0x387fe000, 0xb8800000};
  constexpr u32 kSpecial = sizeof special / sizeof *special;
  Buffer<u32> in(kConverted), out(kConversions * kConverted);
  for (u32 i = 0; i < kConverted; ++i) {
    in[i] = i < kSpecial ? special[i] : mixed(i);
    // Half of them where float16 has numbers.
    if (i >= kSpecial && i % 2 == 0) in[i] = (in[i] & 0x87ffffffU) + 0x34000000U;
  }
  run(convert_kernel, {kConverted / 128, 128}, Words{in.upload(), out.upload()});
  dump.exact(out.fetch());
}

enum class Function { kEx2, kRcp, kTanh };

template <Function kFunction>
KERNEL_FUNCTION(128)
function_kernel(Numbers p) {
  const u32 i = prim::block_idx().x * 128 + prim::thread_idx().x;
  const float x = p.in[i];
  p.out[i] = kFunction == Function::kEx2   ? prim::ex2(x)
             : kFunction == Function::kRcp ? prim::rcp(x)
                                           : prim::tanh_approx(x);
}

/// `reach`: inputs lie in -reach .. reach.
template <Function kFunction>
void function(Dump& dump, float reach, double absolute, double relative) {
  Buffer<float> in(1024), out(1024);
  const float special[] = {0.0F, 1.0F, -1.0F, 3.0F, INFINITY, -INFINITY, NAN, 1e-30F, -1e-30F};
  constexpr u32 kSpecial = sizeof special / sizeof *special;
  for (u32 i = 0; i < in.size(); ++i) {
    in[i] = i < kSpecial ? special[i] : reach * fraction(i) * (i % 2 == 0 ? 1.0F : fraction(7 * i));
    if (kFunction == Function::kRcp && in[i] == 0) in[i] = 2;
  }
  run(function_kernel<kFunction>, {8, 128}, Numbers{in.upload(), out.upload()});
  dump.near(out.fetch(), absolute, relative);
}

// Accumulation ------------------------------------------------------------------------------------------------------------

enum class Format { kBf16, kF16, kTf32 };

/// 8 products of 16x16 (tf32: 16x8) with 16x8 in one accumulator.
template <Format kFormat>
KERNEL_FUNCTION(32)
accumulate_kernel(Words p) {
  const u32 l = prim::thread_idx().x;
  float d[4] = {};
  for (u32 step = 0; step < 8; ++step) {
    const u32* in = p.in + (step * 32 + l) * 6;
    const u32 a[4] = {in[0], in[1], in[2], in[3]};
    if (kFormat == Format::kBf16) prim::mma_bf16(d, a, in[4], in[5]);
    if (kFormat == Format::kF16) prim::mma_f16(d, a, in[4], in[5]);
    if (kFormat == Format::kTf32) prim::mma_tf32(d, a, in[4], in[5]);
  }
#pragma unroll
  for (u32 r = 0; r < 4; ++r) p.out[4 * l + r] = prim::bits_of(d[r]);
}

/// Bits of a register whose numbers are near 1, positive or negative.
template <Format kFormat>
u32 register_bits(u32 i) {
  const u32 noise = mixed(i);
  if (kFormat == Format::kTf32) return (noise & 0x807fe000U) | 0x3f000000U;
  return kFormat == Format::kBf16 ? (noise & 0x807f807fU) | 0x3f003f00U
                                  : (noise & 0x83ff83ffU) | 0x38003800U;
}

template <Format kFormat>
void accumulate(Dump& dump) {
  Buffer<u32> in(8 * 32 * 6), out(128);
  for (u32 i = 0; i < in.size(); ++i) in[i] = register_bits<kFormat>(i);
  run(accumulate_kernel<kFormat>, {1, 32}, Words{in.upload(), out.upload()});
  out.fetch();
  Buffer<float> numbers(128);
  for (u32 i = 0; i < 128; ++i) std::memcpy(&numbers[i], &out[i], 4);
  // 128 terms below 1: some units of the last place of the largest partial sums.
  dump.near(numbers, 5e-5, 0);
}

/// 1 + 2^(10 - step) small terms that vanish or stay: which bits the adder of the tensor cores keeps.
KERNEL_FUNCTION(32) adder_kernel(Words p) {
  const u32 l = prim::thread_idx().x;
  for (u32 shift = 0; shift < 32; ++shift) {
    // Row g, column n: 1 * 1 + 2^-shift * 1, the second term negative in odd columns.
    u32 a[4] = {}, b0 = 0, b1 = 0;
    const u32 small = prim::float_to_bf16(prim::float_of((127 - shift) << 23));
    if (l % 4 == 0) {  // k = 0 and 1
      a[0] = a[1] = 0x3f80U | small << 16;
      b0 = 0x3f80U | (l / 4 % 2 == 0 ? 0x3f80U : 0xbf80U) << 16;
    }
    float d[4] = {};
    prim::mma_bf16(d, a, b0, b1);
    if (l == 0) {
      p.out[2 * shift] = prim::bits_of(d[0]);
      p.out[2 * shift + 1] = prim::bits_of(d[1]);
    }
  }
}

void adder(Dump& dump) {
  Buffer<u32> in(1), out(64);
  run(adder_kernel, {1, 32}, Words{in.upload(), out.upload()});
  out.fetch();
  Buffer<float> numbers(64);
  for (u32 i = 0; i < 64; ++i) std::memcpy(&numbers[i], &out[i], 4);
  // At least the bits of float32 less the last one.
  dump.near(numbers, 1.2e-7 * 2, 0);
  for (u32 sign = 0; sign < 2; ++sign) {
    u32 kept = 0;
    while (kept < 31 && numbers[2 * (kept + 1) + sign] != 1.0F) ++kept;
    dump.info("1 " + std::string(sign == 0 ? "+" : "-") +
              " 2^-n is not 1 up to n = " + std::to_string(kept));
  }
}

KERNEL_FUNCTION(32) unrounded_kernel(Words p) {  // A = in everywhere at k = 0, B = 1
  const u32 l = prim::thread_idx().x;
  const u32 a[4] = {l % 4 == 0 ? p.in[0] : 0, l % 4 == 0 ? p.in[0] : 0, 0, 0};
  float d[4] = {};
  prim::mma_tf32(d, a, l % 4 == 0 ? 0x3f800000U : 0, 0);
  if (l == 0) p.out[0] = prim::bits_of(d[0]);
}

void unrounded(Dump& dump) {  // the emulator truncates; kernels round before
  for (const u32 bits : {0x3f801fffU, 0x3f801001U}) {
    Buffer<u32> in(1), out(1);
    in[0] = bits;
    run(unrounded_kernel, {1, 32}, Words{in.upload(), out.upload()});
    const u32 got = out.fetch()[0];
    char text[64];
    std::snprintf(text, sizeof text, "%x becomes %x: %s", bits, got,
                  got == 0x3f800000U   ? "truncated"
                  : got == 0x3f802000U ? "rounded"
                                       : "neither");
    dump.info(text);
  }
}

}  // namespace

void add_numeric_cases(Cases& cases) {
  cases.push_back({"conversions", Needs::kSm80, conversions});
  // Errors of the PTX manual: 2^-22 relative; 1 unit; 2^-10.987 relative.
  cases.push_back(
      {"ex2", Needs::kSm80, [](Dump& dump) { function<Function::kEx2>(dump, 120, 0, 4e-7); }});
  cases.push_back(
      {"rcp", Needs::kSm80, [](Dump& dump) { function<Function::kRcp>(dump, 1000, 0, 2e-7); }});
  cases.push_back(
      {"tanh", Needs::kSm80, [](Dump& dump) { function<Function::kTanh>(dump, 6, 0, 6e-4); }});
  cases.push_back({"mma_bf16_accumulation", Needs::kSm80, accumulate<Format::kBf16>});
  cases.push_back({"mma_f16_accumulation", Needs::kSm80, accumulate<Format::kF16>});
  cases.push_back({"mma_tf32_accumulation", Needs::kSm80, accumulate<Format::kTf32>});
  cases.push_back({"mma_adder", Needs::kSm80, adder});
  cases.push_back({"mma_tf32_unrounded", Needs::kSm80, unrounded});
}

}  // namespace conformance
