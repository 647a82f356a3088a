#pragma once
// Small blocks of block_linear, memory-bound: one pass over the rows. Two ways to vectorise:
//   RotatedBlocks: square blocks of 2, 4 or 8 (at most the lanes). A vector holds whole blocks;
//     output channel o takes sum_k w[o, (o+k) mod S] * x[(o+k) mod S], so each k is one in-register
//     rotation inside the blocks.
//   PaddedBlocks: any other size up to 16. A vector holds the outputs of one block; each input is
//     broadcast.
// Both keep the sums for dweight in their own layout; unpack() brings them to the weight's order.
#include "csrc/ops/cpu/block_linear_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

/// Lane i of the result is lane (i / S) * S + (i + k) % S of the argument.
template <class A, int S>
class Rotation {
 public:
  Rotation() {
    for (int k = 0; k < S; ++k)
      for (int i = 0; i < kLanes<A>; ++i) set_lane(k, i, i / S * S + (i + k) % S);
  }

#if defined(CPU_CAPABILITY_AVX512)
  __attribute__((always_inline)) Vec<A> operator()(const Vec<A>& v, int k) const {
    const __m512i index = _mm512_load_si512(lanes_[k]);
    if constexpr (sizeof(A) == 4) {
      return _mm512_permutexvar_ps(index, v);
    } else {
      return _mm512_permutexvar_pd(index, v);
    }
  }

 private:
  using Lane = typename at::vec::int_same_size_t<A>;
  void set_lane(int k, int i, int from) { lanes_[k][i] = from; }
  alignas(64) Lane lanes_[S][kLanes<A>];
#elif defined(CPU_CAPABILITY_AVX2)
  __attribute__((always_inline)) Vec<A> operator()(const Vec<A>& v, int k) const {
    const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes_[k]));
    if constexpr (sizeof(A) == 4) {
      return _mm256_permutevar8x32_ps(v, index);
    } else {
      return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(v), index));
    }
  }

 private:
  void set_lane(int k, int i, int from) {
    constexpr int kWords = sizeof(A) / 4;
    for (int word = 0; word < kWords; ++word) lanes_[k][i * kWords + word] = from * kWords + word;
  }
  alignas(32) int32_t lanes_[S][8];
#elif defined(__aarch64__)
  __attribute__((always_inline)) Vec<A> operator()(const Vec<A>& v, int k) const {
    const uint8x16_t index = vld1q_u8(bytes_[k]);
    if constexpr (sizeof(A) == 4) {
      return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), index));
    } else {
      return vreinterpretq_f64_u8(vqtbl1q_u8(vreinterpretq_u8_f64(v), index));
    }
  }

 private:
  void set_lane(int k, int i, int from) {
    constexpr int kBytes = sizeof(A);
    for (int byte = 0; byte < kBytes; ++byte)
      bytes_[k][i * kBytes + byte] = static_cast<uint8_t>(from * kBytes + byte);
  }
  alignas(16) uint8_t bytes_[S][16];
#else
  Vec<A> operator()(const Vec<A>& v, int k) const {
    A from[kLanes<A>], to[kLanes<A>];
    v.store(from);
    for (int i = 0; i < kLanes<A>; ++i) to[i] = from[lanes_[k][i]];
    return load(to);
  }

 private:
  void set_lane(int k, int i, int from) { lanes_[k][i] = from; }
  int lanes_[S][kLanes<A>];
#endif
};

constexpr int kTileRows = 4;  // rows that share one load of the weights

template <class T, int S>
class RotatedBlocks {
 public:
  using A = Acc<T>;

  explicit RotatedBlocks(const BlockLinearParams& p)
      : p_(p), channels_(p.blocks * S), forward_(S * channels_), backward_(S * channels_) {
    const A* w = static_cast<const A*>(p.weight);
    for (int64_t c = 0; c < channels_; ++c) {
      const A* block = w + c / S * S * S;
      const int64_t o = c % S;
      for (int64_t k = 0; k < S; ++k) {
        const int64_t other = (o + k) % S;
        forward_.get()[k * channels_ + c] = block[o * S + other];
        backward_.get()[k * channels_ + c] = block[other * S + o];
      }
    }
  }

  void forward(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; r += kTileRows) {
      if (end - r >= kTileRows) {
        forward_tile<kTileRows>(r);
      } else {
        for (int64_t i = r; i < end; ++i) forward_tile<1>(i);
      }
    }
  }

  int64_t sum_size() const { return S * channels_; }

  /// dx of the rows; their dweight and dbias are added to the sums.
  void backward(int64_t begin, int64_t end, A* sums, A* bias_sums) const {
    for (int64_t r = begin; r < end; r += kTileRows) {
      if (end - r >= kTileRows) {
        backward_tile<kTileRows>(r, sums, bias_sums);
      } else {
        for (int64_t i = r; i < end; ++i) backward_tile<1>(i, sums, bias_sums);
      }
    }
  }

  void unpack(const A* sums, A* dweight) const {
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t k = 0; k < S; ++k) dweight[c * S + (c % S + k) % S] = sums[k * channels_ + c];
  }

 private:
  template <int R>
  void forward_tile(int64_t r) const {
    const T* x[R];
    T* y[R];
    for (int i = 0; i < R; ++i) {
      x[i] = p_.x.row<T>(r + i);
      y[i] = static_cast<T*>(p_.y) + (r + i) * channels_;
    }
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      const int64_t n = smaller(kLanes<A>, channels_ - c);
      const Vec<A> bias = p_.bias ? load(static_cast<const A*>(p_.bias) + c, n) : Vec<A>(A(0));
      Vec<A> w[S];
      for (int k = 0; k < S; ++k) w[k] = load(forward_.get() + k * channels_ + c, n);
      for (int i = 0; i < R; ++i) {
        const Vec<A> v = load(x[i] + c, n);
        store(y[i] + c, rest(w, v, at::vec::fmadd(w[0], v, bias)), n);
      }
    }
  }

  // sum + sum over k >= 1 of w[k] * rotate(v, k)
  Vec<A> rest(const Vec<A>* w, const Vec<A>& v, Vec<A> sum) const {
    for (int k = 1; k < S; ++k) sum = at::vec::fmadd(w[k], rotate_(v, k), sum);
    return sum;
  }

  template <int R>
  void backward_tile(int64_t r, A* sums, A* bias_sums) const {
    const T *x[R], *dy[R];
    T* dx[R];
    for (int i = 0; i < R; ++i) {
      x[i] = p_.x.row<T>(r + i);
      dy[i] = p_.dy.row<T>(r + i);
      dx[i] = static_cast<T*>(p_.dx) + (r + i) * channels_;
    }
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      const int64_t n = smaller(kLanes<A>, channels_ - c);
      Vec<A> w[S], dw[S];
      for (int k = 0; k < S; ++k) {
        w[k] = load(backward_.get() + k * channels_ + c, n);
        dw[k] = load(sums + k * channels_ + c, n);
      }
      Vec<A> db(A(0));
      for (int i = 0; i < R; ++i) {
        const Vec<A> xv = load(x[i] + c, n), dyv = load(dy[i] + c, n);
        store(dx[i] + c, rest(w, dyv, w[0] * dyv), n);
        dw[0] = at::vec::fmadd(dyv, xv, dw[0]);
        for (int k = 1; k < S; ++k) dw[k] = at::vec::fmadd(dyv, rotate_(xv, k), dw[k]);
        db = db + dyv;
      }
      for (int k = 0; k < S; ++k) store(sums + k * channels_ + c, dw[k], n);
      if (p_.dbias) store(bias_sums + c, load(bias_sums + c, n) + db, n);
    }
  }

  const BlockLinearParams& p_;
  int64_t channels_;
  Rotation<A, S> rotate_;
  Scratch<A> forward_, backward_;  // (S, channels): coefficient of rotation k for each channel
};

template <class T>
class PaddedBlocks {
 public:
  using A = Acc<T>;

  explicit PaddedBlocks(const BlockLinearParams& p)
      : p_(p),
        padded_in_(ceil_div(p.in, kLanes<A>) * kLanes<A>),
        padded_out_(ceil_div(p.out, kLanes<A>) * kLanes<A>),
        forward_(p.blocks * p.in * padded_out_),
        backward_(p.blocks * p.out * padded_in_) {
    const A* w = static_cast<const A*>(p.weight);
    for (int64_t b = 0; b < p.blocks; ++b, w += p.in * p.out) {
      for (int64_t i = 0; i < p.in; ++i)
        for (int64_t o = 0; o < padded_out_; ++o)
          forward_.get()[(b * p.in + i) * padded_out_ + o] = o < p.out ? w[o * p.in + i] : A(0);
      for (int64_t o = 0; o < p.out; ++o)
        for (int64_t i = 0; i < padded_in_; ++i)
          backward_.get()[(b * p.out + o) * padded_in_ + i] = i < p.in ? w[o * p.in + i] : A(0);
    }
  }

  void forward(int64_t begin, int64_t end) const {
    const int64_t width = p_.blocks * p_.out;
    for (int64_t r = begin; r < end; ++r)
      map_row(p_.x.row<T>(r), p_.in, forward_.get(), p_.out, padded_out_,
              static_cast<const A*>(p_.bias), static_cast<T*>(p_.y) + r * width);
  }

  int64_t sum_size() const { return p_.blocks * p_.in * padded_out_; }

  void backward(int64_t begin, int64_t end, A* sums, A* bias_sums) const {
    const int64_t width = p_.blocks * p_.in;
    for (int64_t r = begin; r < end; ++r) {
      const T* dy = p_.dy.row<T>(r);
      map_row(dy, p_.out, backward_.get(), p_.in, padded_in_, nullptr,
              static_cast<T*>(p_.dx) + r * width);
      add_outer_product(p_.x.row<T>(r), dy, sums);
      if (!p_.dbias) continue;
      for (int64_t c = 0; c < p_.blocks * p_.out; ++c) bias_sums[c] += static_cast<A>(dy[c]);
    }
  }

  void unpack(const A* sums, A* dweight) const {
    for (int64_t b = 0; b < p_.blocks; ++b)
      for (int64_t o = 0; o < p_.out; ++o)
        for (int64_t i = 0; i < p_.in; ++i) *dweight++ = sums[(b * p_.in + i) * padded_out_ + o];
  }

 private:
  // One row through all blocks; w is (blocks, in, padded_out).
  void map_row(const T* x, int64_t in, const A* w, int64_t out, int64_t padded_out, const A* bias,
               T* y) const {
    for (int64_t b = 0; b < p_.blocks; ++b, x += in, y += out, w += in * padded_out) {
      for (int64_t o = 0; o < out; o += kLanes<A>) {
        const int64_t n = smaller(kLanes<A>, out - o);
        Vec<A> sum = bias ? load(bias + b * out + o, n) : Vec<A>(A(0));
        for (int64_t i = 0; i < in; ++i)
          sum = at::vec::fmadd(Vec<A>(static_cast<A>(x[i])), load(w + i * padded_out + o), sum);
        store(y + o, sum, n);
      }
    }
  }

  void add_outer_product(const T* x, const T* dy, A* sums) const {
    for (int64_t b = 0; b < p_.blocks; ++b, x += p_.in, dy += p_.out) {
      for (int64_t o = 0; o < p_.out; o += kLanes<A>) {
        const Vec<A> dyv = load(dy + o, smaller(kLanes<A>, p_.out - o));
        for (int64_t i = 0; i < p_.in; ++i) {
          A* sum = sums + (b * p_.in + i) * padded_out_ + o;
          store(sum, at::vec::fmadd(Vec<A>(static_cast<A>(x[i])), dyv, load(sum)));
        }
      }
    }
  }

  const BlockLinearParams& p_;
  int64_t padded_in_, padded_out_;
  Scratch<A> forward_, backward_;
};

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
