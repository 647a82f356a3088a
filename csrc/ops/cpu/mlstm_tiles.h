#pragma once
// Tiles of the mLSTM CPU kernels: scratch memory, loading and storing of strided tensors, row arithmetic. Included by
// kernel sources only; everything lives in the namespace of the instruction set.
#include <ATen/cpu/vec/vec.h>

#include <cstdlib>
#include <new>

#include "csrc/ops/cpu/mlstm_params.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {

template <class T>
using Vec = at::vec::Vectorized<T>;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/// Uninitialised memory on a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(max_of(count, 1)) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// ---- conversion of rows -------------------------------------------------------------------------------------------

inline auto widen(const Vec<c10::BFloat16>& x) { return at::vec::convert_bfloat16_float(x); }
inline auto widen(const Vec<c10::Half>& x) { return at::vec::convert_half_float(x); }
inline void narrow(const Vec<float>& low, const Vec<float>& high, Vec<c10::BFloat16>& out) {
  out = at::vec::convert_float_bfloat16(low, high);
}
inline void narrow(const Vec<float>& low, const Vec<float>& high, Vec<c10::Half>& out) {
  out = at::vec::convert_float_half(low, high);
}

template <class S>
inline void widen_row(float* dst, const S* src, int64_t count) {
  constexpr int64_t kStep = Vec<S>::size(), kHalf = Vec<float>::size();
  for (int64_t j = 0; j < count; j += kStep) {
    const int64_t left = min_of(count - j, kStep);
    const auto [low, high] = widen(left == kStep ? Vec<S>::loadu(src + j)
                                                 : Vec<S>::loadu(src + j, static_cast<int>(left)));
    low.store(dst + j, static_cast<int>(min_of(left, kHalf)));
    if (left > kHalf) high.store(dst + j + kHalf, static_cast<int>(left - kHalf));
  }
}

template <class S>
inline void narrow_row(S* dst, const float* src, int64_t count) {
  constexpr int64_t kStep = Vec<S>::size(), kHalf = Vec<float>::size();
  for (int64_t j = 0; j < count; j += kStep) {
    const int64_t left = min_of(count - j, kStep);
    const auto low = Vec<float>::loadu(src + j, static_cast<int>(min_of(left, kHalf)));
    const auto high = left > kHalf
                          ? Vec<float>::loadu(src + j + kHalf, static_cast<int>(left - kHalf))
                          : Vec<float>(0);
    Vec<S> both;
    narrow(low, high, both);
    both.store(dst + j, static_cast<int>(left));
  }
}

/// dst[j] = src[j * stride], 16-bit types by way of a block of floats.
template <class T, class S>
inline void gather_narrow(T* dst, const S* src, int64_t stride, int64_t count) {
  constexpr int64_t kBlock = 64;
  alignas(64) S raw[kBlock];
  alignas(64) float wide[kBlock];
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t left = min_of(count - j, kBlock);
    const S* block = src + j;
    if (stride != 1) {
      for (int64_t i = 0; i < left; ++i) raw[i] = src[(j + i) * stride];
      block = raw;
    }
    widen_row(wide, block, left);
    for (int64_t i = 0; i < left; ++i) dst[j + i] = static_cast<T>(wide[i]);
  }
}

template <class T, class S>
inline void scatter_narrow(S* dst, int64_t stride, const T* src, int64_t count) {
  constexpr int64_t kBlock = 64;
  alignas(64) S raw[kBlock];
  alignas(64) float wide[kBlock];
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t left = min_of(count - j, kBlock);
    for (int64_t i = 0; i < left; ++i) wide[i] = static_cast<float>(src[j + i]);
    narrow_row(raw, wide, left);
    for (int64_t i = 0; i < left; ++i) dst[(j + i) * stride] = raw[i];
  }
}

template <class T>
inline void gather_row(T* dst, const void* src, Dtype dtype, int64_t offset, int64_t stride,
                       int64_t count) {
  switch (dtype) {
    case Dtype::kFloat: {
      const float* s = static_cast<const float*>(src) + offset;
      for (int64_t j = 0; j < count; ++j) dst[j] = static_cast<T>(s[j * stride]);
      return;
    }
    case Dtype::kDouble: {
      const double* s = static_cast<const double*>(src) + offset;
      for (int64_t j = 0; j < count; ++j) dst[j] = static_cast<T>(s[j * stride]);
      return;
    }
    case Dtype::kBFloat16:
      return gather_narrow(dst, static_cast<const c10::BFloat16*>(src) + offset, stride, count);
    case Dtype::kHalf:
      return gather_narrow(dst, static_cast<const c10::Half*>(src) + offset, stride, count);
  }
}

template <class T>
inline void scatter_row(void* dst, Dtype dtype, int64_t offset, int64_t stride, const T* src,
                        int64_t count) {
  switch (dtype) {
    case Dtype::kFloat: {
      float* d = static_cast<float*>(dst) + offset;
      for (int64_t j = 0; j < count; ++j) d[j * stride] = static_cast<float>(src[j]);
      return;
    }
    case Dtype::kDouble: {
      double* d = static_cast<double*>(dst) + offset;
      for (int64_t j = 0; j < count; ++j) d[j * stride] = static_cast<double>(src[j]);
      return;
    }
    case Dtype::kBFloat16:
      return scatter_narrow(static_cast<c10::BFloat16*>(dst) + offset, stride, src, count);
    case Dtype::kHalf:
      return scatter_narrow(static_cast<c10::Half*>(dst) + offset, stride, src, count);
  }
}

// ---- tiles --------------------------------------------------------------------------------------------------------

template <class T>
constexpr Dtype dtype_of() {
  return sizeof(T) == sizeof(double) ? Dtype::kDouble : Dtype::kFloat;
}

/// Rows = tokens of a chunk, columns = head features, row-major with a leading dimension BLAS accepts.
template <class T>
struct Tile {
  T* data;
  int64_t ld;
  T* row(int64_t t) const { return data + t * ld; }
};

inline int64_t offset_of(const MlstmView& view, const MlstmChunk& chunk, int64_t head) {
  return chunk.batch * view.batch + chunk.begin * view.time + head * view.head;
}

template <class T>
inline bool in_place(const MlstmView& view, int64_t width) {
  constexpr int64_t kMaxLeading = 0x7fffffff;
  return view.dtype == dtype_of<T>() && (view.inner == 1 || width <= 1) &&
         view.time >= max_of(width, 1) && view.time <= kMaxLeading;
}

/// The chunk's rows of a (B,T,NH,width) tensor: in place where BLAS can read them so, else converted into scratch.
template <class T>
inline Tile<const T> load_tile(const MlstmView& view, const MlstmChunk& chunk, int64_t head,
                               int64_t width, T* scratch) {
  const int64_t offset = offset_of(view, chunk, head);
  if (in_place<T>(view, width)) return {static_cast<const T*>(view.data) + offset, view.time};
  for (int64_t t = 0; t < chunk.length; ++t)
    gather_row(scratch + t * width, view.data, view.dtype, offset + t * view.time, view.inner,
               width);
  return {scratch, max_of(width, 1)};
}

/// Where to write the chunk's rows: the tensor itself or scratch; finish with store_tile.
template <class T>
inline Tile<T> output_tile(const MlstmView& view, const MlstmChunk& chunk, int64_t head,
                           int64_t width, T* scratch) {
  if (in_place<T>(view, width))
    return {static_cast<T*>(view.data) + offset_of(view, chunk, head), view.time};
  return {scratch, max_of(width, 1)};
}

template <class T>
inline void store_tile(const MlstmView& view, const MlstmChunk& chunk, int64_t head, int64_t width,
                       const Tile<T>& tile) {
  if (in_place<T>(view, width)) return;
  const int64_t offset = offset_of(view, chunk, head);
  for (int64_t t = 0; t < chunk.length; ++t)
    scatter_row(view.data, view.dtype, offset + t * view.time, view.inner, tile.row(t), width);
}

// ---- row arithmetic -----------------------------------------------------------------------------------------------

template <class T>
inline T sum_lanes(const Vec<T>& v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  T sum = 0;
  for (const T lane : lanes) sum += lane;
  return sum;
}

template <class T>
inline T dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t kStep = Vec<T>::size();
  Vec<T> sum0(0), sum1(0);
  int64_t j = 0;
  for (; j + 2 * kStep <= count; j += 2 * kStep) {
    sum0 = at::vec::fmadd(Vec<T>::loadu(a + j), Vec<T>::loadu(b + j), sum0);
    sum1 = at::vec::fmadd(Vec<T>::loadu(a + j + kStep), Vec<T>::loadu(b + j + kStep), sum1);
  }
  T tail = 0;
  for (; j + kStep <= count; j += kStep)
    sum0 = at::vec::fmadd(Vec<T>::loadu(a + j), Vec<T>::loadu(b + j), sum0);
  for (; j < count; ++j) tail += a[j] * b[j];
  return sum_lanes(sum0 + sum1) + tail;
}

/// a[j] *= b[j]; returns the sum.
template <class T>
inline T multiply_sum(T* a, const T* b, int64_t count) {
  constexpr int64_t kStep = Vec<T>::size();
  Vec<T> sum(0);
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    const Vec<T> product = Vec<T>::loadu(a + j) * Vec<T>::loadu(b + j);
    product.store(a + j);
    sum = sum + product;
  }
  T tail = 0;
  for (; j < count; ++j) tail += a[j] *= b[j];
  return sum_lanes(sum) + tail;
}

/// y = factor * x
template <class T>
inline void scale_row(T* y, const T* x, T factor, int64_t count) {
  for (int64_t j = 0; j < count; ++j) y[j] = factor * x[j];
}

/// y += factor * x
template <class T>
inline void add_row(T* y, const T* x, T factor, int64_t count) {
  for (int64_t j = 0; j < count; ++j) y[j] += factor * x[j];
}

template <class T>
inline void copy_row(T* y, const T* x, int64_t count) {
  __builtin_memcpy(y, x, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline void zero_row(T* y, int64_t count) {
  __builtin_memset(y, 0, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
