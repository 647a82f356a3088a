#pragma once
// Vectors of float or double with loads and stores in any dtype, for the kernels alone
// (csrc/ops/cpu/*_kernel.cpp): everything lives in the namespace of the instruction set.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <new>

#include "csrc/ops/cpu/rows.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
/// The type of arithmetic and accumulation for data of type T.
template <class T>
using Acc = typename AccOf<T>::type;

template <class A>
using Vec = at::vec::Vectorized<A>;
template <class A>
constexpr int64_t kLanes = Vec<A>::size();

/// Calls f with a value of the C++ type that dtype names.
template <class F>
void visit_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(float{});
    case Dtype::kDouble:
      return f(double{});
    case Dtype::kBFloat16:
      return f(c10::BFloat16{});
    case Dtype::kHalf:
      return f(c10::Half{});
  }
}

/// Memory of one task, freed at the end of the scope (std::vector is shared with code of other
/// instruction sets).
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(operator new(size * sizeof(A), kAlignment))) {}
  ~Scratch() { operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{alignof(A)};  // of vectors too
  A* data_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// load(p): all lanes; load(p, n): n <= lanes, the rest are zero. store likewise.
inline Vec<float> load(const float* p) { return Vec<float>::loadu(p); }
inline Vec<double> load(const double* p) { return Vec<double>::loadu(p); }
#if defined(__aarch64__)  // at::vec takes lane after lane here
inline Vec<float> load(const c10::BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->x), 16));
}
inline Vec<float> load(const c10::Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->x)));
}
#else
inline Vec<float> load(const c10::BFloat16* p) {
  Vec<float> v;
  at::vec::load_fp32_from_bf16(p, v);
  return v;
}
inline Vec<float> load(const c10::Half* p) {
  Vec<float> v;
  at::vec::load_fp32_from_fp16(p, v);
  return v;
}
#endif

inline void store(float* p, const Vec<float>& v) { v.store(p); }
inline void store(double* p, const Vec<double>& v) { v.store(p); }
#if defined(CPU_CAPABILITY_AVX512)
inline void store(c10::BFloat16* p, const Vec<float>& v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(v));
}
inline void store(c10::Half* p, const Vec<float>& v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_fp16(v));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline void store(c10::BFloat16* p, const Vec<float>& v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(v));
}
inline void store(c10::Half* p, const Vec<float>& v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_fp16(v));
}
#elif defined(__aarch64__)
inline void store(c10::BFloat16* p, const Vec<float>& v) {
  at::vec::convert_float_bfloat16(v, v).store(p, kLanes<float>);
}
inline void store(c10::Half* p, const Vec<float>& v) {
  vst1_u16(&p->x, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
#else
template <class T>
inline void store_lanes(T* p, const Vec<float>& v) {
  float lanes[kLanes<float>];
  v.store(lanes);
  for (int64_t i = 0; i < kLanes<float>; ++i) p[i] = static_cast<T>(lanes[i]);
}
inline void store(c10::BFloat16* p, const Vec<float>& v) { store_lanes(p, v); }
inline void store(c10::Half* p, const Vec<float>& v) { store_lanes(p, v); }
#endif

template <class T>
inline Vec<Acc<T>> load(const T* p, int64_t n) {
  constexpr int64_t kSize = kLanes<Acc<T>>;
  if (n == kSize) return load(p);
  if constexpr (sizeof(T) >= sizeof(float)) {
    return Vec<Acc<T>>::loadu(p, n);
  } else {
    T lanes[kSize] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
}
template <class T>
inline void store(T* p, const Vec<Acc<T>>& v, int64_t n) {
  constexpr int64_t kSize = kLanes<Acc<T>>;
  if (n == kSize) return store(p, v);
  if constexpr (sizeof(T) >= sizeof(float)) {
    v.store(p, static_cast<int>(n));
  } else {
    T lanes[kSize];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
}

/// The first n lanes of v, zero in the rest.
template <class A>
inline Vec<A> first_lanes(const Vec<A>& v, int64_t n) {
  return n == kLanes<A> ? v : Vec<A>::set(Vec<A>(A(0)), v, n);
}

template <class A>
inline A horizontal_sum(const Vec<A>& v) {
  return at::vec::vec_reduce_all<A>([](const Vec<A>& a, const Vec<A>& b) { return a + b; }, v);
}

inline Vec<double> exp(const Vec<double>& x) { return x.exp(); }

/// The larger of each lane; where a is NaN, b (at::vec::maximum keeps NaN and costs three times as
/// much).
template <class A>
inline Vec<A> larger_lanes(const Vec<A>& a, const Vec<A>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(A) == 4) {
    return _mm512_max_ps(a, b);
  } else {
    return _mm512_max_pd(a, b);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(A) == 4) {
    return _mm256_max_ps(a, b);
  } else {
    return _mm256_max_pd(a, b);
  }
#else
  return Vec<A>::blendv(b, a, a > b);
#endif
}

/// p * 2^n for whole n of at least -126 (any n with AVX-512) and at most 127.
inline Vec<float> scale_by_power(const Vec<float>& p, const Vec<float>& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return p * Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
#else
  const auto exponent = at::vec::convert_to_int_of_same_size(n) + Vec<int32_t>(127);
  return p * at::vec::cast<float>(exponent << Vec<int32_t>(23));
#endif
}

/// e^x to 2 units in the last place, at a third of the cost of Sleef's call. Zero below -87.3 (the
/// denormal results), e^88 above 88; NaN stays NaN. It and what is made of it would be calls for aarch64.
__attribute__((always_inline)) inline Vec<float> exp(const Vec<float>& x) {
  const Vec<float> low(-87.3f), high(88.0f);
  // min(x, high) as -max(-x, -high), so that NaN is the second operand both times and stays.
  const Vec<float> clamped = larger_lanes(low, larger_lanes(high.neg(), x.neg()).neg());
  const Vec<float> n = (clamped * Vec<float>(1.44269504088896341f)).round();
  Vec<float> r = at::vec::fmadd(n, Vec<float>(-0.693359375f), clamped);
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  Vec<float> p = at::vec::fmadd(Vec<float>(1.9875691500e-4f), r, Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec<float>(1.0f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), scale_by_power(p, n));
#else
  return Vec<float>::blendv(scale_by_power(p, n), Vec<float>(0.0f), x < low);
#endif
}

template <class A>
__attribute__((always_inline)) inline Vec<A> sigmoid(const Vec<A>& x) {
  return Vec<A>(A(1)) / (Vec<A>(A(1)) + exp(x.neg()));
}

/// d/dx of x * sigmoid(x), from x and s = sigmoid(x).
template <class A>
inline Vec<A> silu_slope(const Vec<A>& x, const Vec<A>& s) {
  return s * at::vec::fmadd(x, Vec<A>(A(1)) - s, Vec<A>(A(1)));
}

/// out[i] = sum over parts of partials[part * stride + i], in the order of the parts
/// (deterministic).
template <class A>
void sum_partials(const A* partials, int64_t parts, int64_t stride, int64_t size, A* out) {
  constexpr int64_t kSize = kLanes<A>;
  const int64_t grain = larger(1, 16384 / larger(parts * kSize, 1));
  at::parallel_for(0, ceil_div(size, kSize), grain, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t c = v * kSize, n = smaller(kSize, size - c);
      Vec<A> sum(A(0));
      for (int64_t part = 0; part < parts; ++part)
        sum = sum + load(partials + part * stride + c, n);
      store(out + c, sum, n);
    }
  });
}

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
