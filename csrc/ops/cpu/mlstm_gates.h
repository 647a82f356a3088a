#pragma once
// Gates of one chunk of the mLSTM: everything that depends on the gates alone (stabilised chunkwise form of arXiv
// 2405.04517, eq. 19-27). Sums and maxima are kept in double, so that the exponents, differences of large numbers, stay
// exact to rounding of the result; only their exponentials are in the working type.
#include "csrc/ops/cpu/mlstm_tiles.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {

/// out[j] = factor * exp(a[j] + shift) for results at most about 1e38. The range reduction is in double, the polynomial in
/// float: 2e-7 relative whatever the size of a and shift. Results below float's normal numbers are 0. Two loops, because
/// compilers vectorise loops of one width.
inline void exp_shifted(float* __restrict out, const double* __restrict a, double shift,
                        float factor, int64_t count) {
  constexpr double kLog2e = 1.4426950408889634074, kRound = 6755399441055744.0;  // 1.5 * 2^52
  constexpr int64_t kBlock = 64;
  float rest[kBlock], whole[kBlock];
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t left = min_of(count - j, kBlock);
    for (int64_t i = 0; i < left; ++i) {
      const double x = (a[j + i] + shift) * kLog2e;
      const double n = (x + kRound) - kRound;
      rest[i] = static_cast<float>(x - n);
      whole[i] = static_cast<float>(n);
    }
    for (int64_t i = 0; i < left; ++i) {
      const float r = rest[i], n = whole[i];
      float y = 1.5252734e-5f;  // 2^r on [-1/2, 1/2]: Taylor coefficients ln(2)^n / n!
      y = y * r + 1.5403530e-4f;
      y = y * r + 1.3333558e-3f;
      y = y * r + 9.6181291e-3f;
      y = y * r + 5.5504109e-2f;
      y = y * r + 2.4022651e-1f;
      y = y * r + 6.9314718e-1f;
      y = y * r + 1.0f;
      const float biased = n + 12583039.0f;  // 1.5 * 2^23 + 127: n + 127 in the low bits
      uint32_t bits;
      __builtin_memcpy(&bits, &biased, sizeof(bits));
      bits <<= 23;
      float two_n;
      __builtin_memcpy(&two_n, &bits, sizeof(two_n));
      const float value = factor * (y * two_n);
      out[j + i] = n < -125.5f ? 0.0f : value;
    }
  }
}

inline void exp_shifted(double* out, const double* a, double shift, double factor, int64_t count) {
  constexpr int64_t kStep = Vec<double>::size();
  for (int64_t j = 0; j < count; j += kStep) {
    const int left = static_cast<int>(min_of(count - j, kStep));
    const Vec<double> x = Vec<double>::loadu(a + j, left) + Vec<double>(shift);
    (x.exp() * Vec<double>(factor)).store(out + j, left);
  }
}

/// x = log sigmoid(x) = min(x, 0) - log1p(exp(-|x|)), in place
inline void log_sigmoid_row(double* x, int64_t count) {
  constexpr int64_t kStep = Vec<double>::size();
  for (int64_t j = 0; j < count; j += kStep) {
    const int left = static_cast<int>(min_of(count - j, kStep));
    const Vec<double> value = Vec<double>::loadu(x + j, left);
    const Vec<double> rest = value.abs().neg().exp().log1p();
    (at::vec::minimum(value, Vec<double>(0.0)) - rest).store(x + j, left);
  }
}

/// Multiplies gradients by sigmoid(-x), the derivative of log sigmoid.
inline void times_sigmoid_neg(double* gradient, const double* x, int64_t count) {
  constexpr int64_t kStep = Vec<double>::size();
  for (int64_t j = 0; j < count; j += kStep) {
    const int left = static_cast<int>(min_of(count - j, kStep));
    const Vec<double> denominator = Vec<double>(1.0) + Vec<double>::loadu(x + j, left).exp();
    (Vec<double>::loadu(gradient + j, left) / denominator).store(gradient + j, left);
  }
}

/// Larger of two, NaN if either is.
inline double max_nan(double a, double b) { return a > b || a != a ? a : b; }
inline double floor_nan(double x, double low) { return x < low ? low : x; }
/// The logarithm of what the normaliser is at least.
inline double log_floor(double m) { return -m > kMaxNegM ? kMaxNegM : floor_nan(-m, kMinNegM); }

template <class T>
class ChunkGates {
 public:
  explicit ChunkGates(const MlstmChunkwiseParams& params)
      : p(params),
        input(params.max_length),
        forget(params.max_length),
        alpha(params.max_length),
        shift(params.max_length),
        negative_m(params.max_length),
        w(params.max_length),
        u(params.max_length),
        exp_neg_m(params.max_length) {}

  /// Loads the gates; afterwards `total` and `peak` give the stabiliser after the chunk.
  void load(const MlstmChunk& chunk, int64_t head) {
    length = chunk.length;
    gather_row<double>(input, p.igate.data, p.igate.dtype, offset_of(p.igate, chunk, head),
                       p.igate.time, length);
    gather_row<double>(forget, p.fgate.data, p.fgate.dtype, offset_of(p.fgate, chunk, head),
                       p.fgate.time, length);
    copy_row<double>(alpha, input, length);
    copy_row<double>(shift, forget, length);
    if (p.sigmoid_input_gate) log_sigmoid_row(alpha, length);
    log_sigmoid_row(shift, length);
    double sum = 0, highest = kMinLogInput - 1;
    for (int64_t t = 0; t < length; ++t) {
      sum += floor_nan(shift[t], kMinLogForget);
      shift[t] = sum;
      alpha[t] = floor_nan(alpha[t], kMinLogInput) - sum;
      highest = max_nan(alpha[t], highest);
    }
    total = sum;
    peak = highest;
  }

  /// The stabiliser after a chunk, rounded as the state stores it.
  static double next_m(const MlstmChunkwiseParams& p, double total, double peak, double m_start) {
    return p.sigmoid_input_gate
               ? 0.0
               : static_cast<double>(static_cast<T>(total + max_nan(peak, m_start)));
  }

  /// The coefficients of the chunk that starts with stabiliser m_start.
  void compute(const MlstmChunk& chunk, int64_t head, double m_start) {
    load(chunk, head);
    m_end = next_m(p, total, peak, m_start);
    double highest = m_start;
    for (int64_t t = 0; t < length; ++t) {
      highest = max_nan(alpha[t], highest);
      const double m = p.sigmoid_input_gate ? 0.0 : shift[t] + highest;
      negative_m[t] = log_floor(m);
      shift[t] -= m;
    }
    exp_shifted(w, shift, m_start, static_cast<T>(p.scale), length);
    exp_shifted(u, alpha, total - m_end, T(1), length);
    if (p.normalize) exp_shifted(exp_neg_m, negative_m, 0.0, T(1), length);
    const double decay = total + m_start - m_end;
    exp_shifted(&gamma, &decay, 0.0, T(1), 1);
  }

  /// Row t of scale * D: factors of the pairs (t, s <= t).
  void decay_row(T* out, int64_t t) const {
    exp_shifted(out, alpha, shift[t], static_cast<T>(p.scale), t + 1);
  }

  const MlstmChunkwiseParams& p;
  int64_t length = 0;
  double total = 0, peak = 0, m_end = 0;
  T gamma = 0;                   // old state -> state after the chunk
  Buffer<double> input, forget;  // pre-activations
  Buffer<double> alpha;          // li_s - b_s
  Buffer<double> shift;          // b_t - m_t after compute (b_t after load)
  Buffer<double> negative_m;
  Buffer<T> w;  // old state -> row t, times the scale of q
  Buffer<T> u;  // token s -> state after the chunk
  Buffer<T> exp_neg_m;
};

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
