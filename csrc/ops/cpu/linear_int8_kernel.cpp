// Matrices of 8 bits on the CPU. A product with few rows takes the time of reading the integers: a tile has as many rows of
// the matrix as streams of memory are worth having, and the integers of a tile are converted once for all its rows of x.
#include "csrc/ops/cpu/linear_int8_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int64_t kWidth = kLanes<float>;
constexpr int64_t kPage = 4096;  // bytes, at whose ends the processor's own prefetching stops

/// The next integers as numbers; rows end in zeros and a scale, so that a whole vector may always be read.
inline Vec<float> load_integers(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
#else
  float lanes[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

/// Sizes of numbers are ordered as their bits without the sign are, those of inf and NaN last: a maximum of integers, which
/// the compiler vectorises.
inline uint32_t size_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

/// The scale is NaN where the row holds inf or NaN.
template <class T>
void quantize_row(const T* values, int64_t in, int8_t* integers, float* scale) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < in; ++i) {
    const uint32_t size = size_bits(static_cast<float>(values[i]));
    bits = size > bits ? size : bits;
  }
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof largest);
  const bool finite = bits < 0x7f800000u;
  float step = finite ? largest / 127 : __builtin_nanf("");
  if (step < __FLT_MIN__) step = 0;  // a denormal one would be too coarse
  *scale = step;
  if (!(step > 0)) {
    for (int64_t i = 0; i < in; ++i) integers[i] = 0;
    return;
  }
  for (int64_t i = 0; i < in; ++i)
    integers[i] = static_cast<int8_t>(__builtin_rintf(static_cast<float>(values[i]) / step));
}

template <class T>
void dequantize_row(const int8_t* integers, float scale, int64_t in, T* values) {
  for (int64_t i = 0; i < in; ++i)
    values[i] = static_cast<T>(static_cast<Acc<T>>(scale) * static_cast<Acc<T>>(integers[i]));
}

template <>
void dequantize_row(const int8_t* integers, float scale, int64_t in, c10::BFloat16* values) {
  for (int64_t i = 0; i < in; i += kWidth)
    store(values + i, load_integers(integers + i) * Vec<float>(scale), smaller(kWidth, in - i));
}

/// y[r,o] of kRows rows of x and kOut rows of the matrix.
template <int kRows, int kOut, class T>
void tile(const LinearInt8Params& p, int64_t first_row, int64_t first_out) {
  Vec<float> sums[kRows][kOut];
  for (auto& row : sums)
    for (auto& sum : row) sum = Vec<float>(0.0f);
  const float* x = p.x + first_row * p.matrix.in;
  const int8_t* integers[kOut];
  for (int o = 0; o < kOut; ++o) integers[o] = p.matrix.row(first_out + o);
  const auto add = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    Vec<float> inputs[kRows];
    for (int r = 0; r < kRows; ++r) inputs[r] = load(x + r * p.matrix.in + i, lanes);
    for (int o = 0; o < kOut; ++o) {
      __builtin_prefetch(integers[o] + i + kPage);
      const Vec<float> weight = load_integers(integers[o] + i);
      for (int r = 0; r < kRows; ++r) sums[r][o] = at::vec::fmadd(weight, inputs[r], sums[r][o]);
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= p.matrix.in; i += kWidth) add(i, kWidth);
  if (i < p.matrix.in) add(i, p.matrix.in - i);
  for (int o = 0; o < kOut; ++o) {
    const float scale = *p.matrix.scale(first_out + o),
                bias = p.bias != nullptr ? p.bias[first_out + o] : 0.0f;
    for (int r = 0; r < kRows; ++r)
      static_cast<T*>(p.y)[(first_row + r) * p.matrix.out + first_out + o] =
          static_cast<T>(scale * horizontal_sum(sums[r][o]) + bias);
  }
}

template <int kOut, class T>
void all_rows(const LinearInt8Params& p, int64_t first_out) {
  int64_t r = 0;
  for (; r + 4 <= p.rows; r += 4) tile<4, kOut, T>(p, r, first_out);
  if (r + 2 <= p.rows) {
    tile<2, kOut, T>(p, r, first_out);
    r += 2;
  }
  if (r < p.rows) tile<1, kOut, T>(p, r, first_out);
}

/// Rows [begin, end) of the matrix.
template <int kOut, class T>
void outputs(const LinearInt8Params& p, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kOut <= end; o += kOut) {
    if (p.rows == 1) {
      tile<1, kOut, T>(p, 0, o);
    } else {
      for (int half = 0; half < kOut; half += 4) all_rows<4, T>(p, o + half);
    }
  }
  for (; o < end; ++o) all_rows<1, T>(p, o);
}

}  // namespace

void quantize_int8(const Int8ConversionParams& p) {
  const Int8Matrix& matrix = p.matrix;
  visit_dtype(p.dtype, [&](auto example) {
    using T = decltype(example);
    const auto* values = static_cast<const T*>(p.values);
    at::parallel_for(0, matrix.out, larger(1, 32768 / matrix.in), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        quantize_row(values + o * matrix.in, matrix.in, matrix.row(o), matrix.scale(o));
        *matrix.columns(o) = static_cast<int32_t>(matrix.in);
      }
    });
  });
}

void dequantize_int8(const Int8ConversionParams& p) {
  const Int8Matrix& matrix = p.matrix;
  visit_dtype(p.dtype, [&](auto example) {
    using T = decltype(example);
    auto* values = static_cast<T*>(p.values);
    at::parallel_for(0, matrix.out, larger(1, 32768 / matrix.in), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        dequantize_row(matrix.row(o), *matrix.scale(o), matrix.in, values + o * matrix.in);
    });
  });
}

void linear_int8(const LinearInt8Params& p) {
  constexpr int kOut = 8;
  const int64_t tiles = ceil_div(p.matrix.out, kOut);
  const int64_t grain = larger(1, 32768 / (kOut * p.matrix.in * p.rows));
  visit_dtype(p.dtype, [&](auto example) {
    using T = decltype(example);
    at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      outputs<kOut, T>(p, begin * kOut, smaller(end * kOut, p.matrix.out));
    });
  });
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
