#pragma once
// Vectors of float or double as wide as the instruction set (compiler vector extensions, so that everything inlines),
// exponentials on them, and loads and stores in the tensors' dtypes.
#include <cstdint>
#include <cstring>

#include "csrc/ops/cpu/slstm_params.h"

#define XLSTM_INLINE inline __attribute__((always_inline))

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 32 registers: 6 x 4 accumulators, 4 operands
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;  // 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 5;  // 32 registers: 5 x 4 accumulators, 4 operands, 5 factors
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 3;
#endif

template <class Real>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / 4, kMantissa = 23, kTerms = 7, kLogTerms = 8;
  static constexpr int32_t kSign = INT32_MIN;
  static constexpr float kRound =
      12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer; + exponent bias
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLowest = -87.3f;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / 8, kMantissa = 52, kTerms = 13, kLogTerms = 18;
  static constexpr int64_t kSign = INT64_MIN;
  static constexpr double kRound = 6755399441055744.0 + 1023.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6,
                          kLowest = -708.3;
};
template <class Real>
using Vec = typename Simd<Real>::Vec;
template <class Real>
using Int = typename Simd<Real>::Int;

template <class Real>
XLSTM_INLINE Vec<Real> load(const Real* p) {
  Vec<Real> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class Real>
XLSTM_INLINE void store(Real* p, Vec<Real> v) {
  memcpy(p, &v, sizeof v);
}
/// The first `count` lanes from memory, the others `fill`.
template <class Real>
XLSTM_INLINE Vec<Real> load_part(const Real* p, int64_t count, Real fill) {
  if (count >= Simd<Real>::kWidth) return load(p);
  Real lanes[Simd<Real>::kWidth];
  for (int i = 0; i < Simd<Real>::kWidth; ++i) lanes[i] = i < count ? p[i] : fill;
  return load(lanes);
}
template <class Real>
XLSTM_INLINE void store_part(Real* p, Vec<Real> v, int64_t count) {
  if (count >= Simd<Real>::kWidth) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

template <class Real>
XLSTM_INLINE Vec<Real> absolute(Vec<Real> x) {
  return (Vec<Real>)((Int<Real>)x & ~Simd<Real>::kSign);
}
/// |magnitude| with the sign of `sign`.
template <class Real>
XLSTM_INLINE Vec<Real> with_sign(Vec<Real> magnitude, Vec<Real> sign) {
  return (Vec<Real>)((Int<Real>)magnitude | ((Int<Real>)sign & Simd<Real>::kSign));
}

struct InverseFactorials {
  double of[14];
  constexpr InverseFactorials() : of{1.0} {
    for (int n = 1; n < 14; ++n) of[n] = of[n - 1] / n;
  }
};
constexpr InverseFactorials kInverseFactorials;

/// exp(x) = scale + scale * p for x in [kLowest, 0]: x = n ln2 + r, |r| <= ln2/2, p = e^r - 1 by its Taylor series
/// (truncated below half a unit in the last place). NaN gives a NaN p.
template <class Real>
XLSTM_INLINE void exp_parts(Vec<Real> x, Vec<Real>& scale, Vec<Real>& p) {
  using S = Simd<Real>;
  const Vec<Real> shifted = x * Real(1.44269504088896340736) + S::kRound;
  const Vec<Real> n = shifted - S::kRound;
  scale = (Vec<Real>)((Int<Real>)shifted << S::kMantissa);
  const Vec<Real> r = (x - n * S::kLn2High) - n * S::kLn2Low;
  Vec<Real> q =
      r * Real(kInverseFactorials.of[S::kTerms]) + Real(kInverseFactorials.of[S::kTerms - 1]);
#pragma GCC unroll 16
  for (int k = S::kTerms - 2; k >= 2; --k) q = q * r + Real(kInverseFactorials.of[k]);
  p = r + r * r * q;
}
/// exp(x) for x <= 0; below the smallest normal number 0. NaN stays NaN.
template <class Real>
XLSTM_INLINE Vec<Real> exp_negative(Vec<Real> x) {
  const Vec<Real> lowest = Vec<Real>{} + Simd<Real>::kLowest;
  const Int<Real> tiny = x < lowest;
  Vec<Real> scale, p;
  exp_parts<Real>(tiny ? lowest : x, scale, p);
  return tiny ? Vec<Real>{} : scale + scale * p;
}
/// exp(x) - 1 for x <= 0, to full relative precision. NaN stays NaN.
template <class Real>
XLSTM_INLINE Vec<Real> expm1_negative(Vec<Real> x) {
  const Vec<Real> lowest = Vec<Real>{} + Simd<Real>::kLowest;
  Vec<Real> scale, p;
  exp_parts<Real>(x < lowest ? lowest : x, scale, p);
  return scale * p + (scale - Real(1));
}
/// 2 atanh(s) = log((1 + s) / (1 - s)) for s in [0, 1/3]; log(1 + u) with s = u / (2 + u).
template <class Real>
XLSTM_INLINE Vec<Real> twice_atanh(Vec<Real> s) {
  constexpr int terms = Simd<Real>::kLogTerms;
  const Vec<Real> square = s * s;
  Vec<Real> q = Vec<Real>{} + Real(2.0 / (2 * terms - 1));
#pragma GCC unroll 20
  for (int k = terms - 2; k >= 0; --k) q = q * square + Real(2.0 / (2 * k + 1));
  return s * q;
}

struct BFloat16 {
  uint16_t bits;
};
#if defined(__aarch64__)  // GCC before 13 has no _Float16 in C++ there
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif
XLSTM_INLINE float to_real(float x) { return x; }
XLSTM_INLINE double to_real(double x) { return x; }
XLSTM_INLINE float to_real(Float16 x) { return static_cast<float>(x); }
XLSTM_INLINE float to_real(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
XLSTM_INLINE void from_real(float x, float& out) { out = x; }
XLSTM_INLINE void from_real(double x, double& out) { out = x; }
XLSTM_INLINE void from_real(float x, Float16& out) { out = static_cast<Float16>(x); }
XLSTM_INLINE void from_real(float x, BFloat16& out) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

/// A vector of elements `stride` apart (1 or a constant: then it is vectorised).
template <class Real, class Element>
XLSTM_INLINE Vec<Real> load_elements(const Element* p, int64_t stride) {
  Real lanes[Simd<Real>::kWidth];
  for (int i = 0; i < Simd<Real>::kWidth; ++i) lanes[i] = to_real(p[i * stride]);
  return load(lanes);
}

/// Calls f with a value of the tensors' element type.
template <class Real, class F>
XLSTM_INLINE void with_element(SlstmDtype dtype, const F& f) {
  if constexpr (sizeof(Real) == 8) {
    f(double{});
  } else if (dtype == SlstmDtype::kFloat32) {
    f(float{});
  } else if (dtype == SlstmDtype::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

/// How many of the rows, sorted by falling length, still have a token t.
XLSTM_INLINE int64_t alive_rows(const SlstmRow* rows, int64_t count, int64_t t) {
  while (count > 0 && rows[count - 1].length <= t) --count;
  return count;
}

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
