#include "csrc/ops/cpu/linear_cross_entropy_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

template <class A>
class Row {
 public:
  Row(A* logits, int64_t vocab, A soft_cap) : logits_(logits), vocab_(vocab), cap_(soft_cap) {}

  /// Caps the logits; the largest one. A NaN may be passed over: the sum of exponentials shows it.
  A cap_and_max() {
    const Vec<A> lowest(-static_cast<A>(__builtin_inf()));
    const Vec<A> cap(cap_), inverse(cap_ > 0 ? A(1) / cap_ : A(0));
    Vec<A> most[2] = {lowest, lowest};
    int64_t turn = 0;
    for (int64_t i = 0; i < vocab_; i += kSize, turn ^= 1) {
      const int64_t n = lanes(i);
      Vec<A> v = load(logits_ + i, n);
      if (cap_ > 0) {
        v = (v * inverse).tanh() * cap;
        store(logits_ + i, v, n);
      }
      most[turn] = larger_lanes(most[turn], n == kSize ? v : Vec<A>::set(lowest, v, n));
    }
    return at::vec::vec_reduce_all<A>(
        [](const Vec<A>& a, const Vec<A>& b) { return larger_lanes(a, b); },
        larger_lanes(most[0], most[1]));
  }

  /// Sum of exp(logit - max); keeps the terms in place of the logits where keep.
  A sum_exponentials(A max, bool keep) {
    const Vec<A> shift(max);
    Vec<A> sum(A(0));
    for (int64_t i = 0; i < vocab_; i += kSize) {
      const int64_t n = lanes(i);
      const Vec<A> e = exp(load(logits_ + i, n) - shift);
      if (keep) store(logits_ + i, e, n);
      sum = sum + first_lanes(e, n);
    }
    return horizontal_sum(sum);
  }

  /// Multiplies the kept exponentials.
  void scale(A factor) {
    const Vec<A> by(factor);
    for (int64_t i = 0; i < vocab_; i += kSize)
      store(logits_ + i, load(logits_ + i, lanes(i)) * by, lanes(i));
  }

  /// Capped logits become scale * exp(logit - lse) * (1 - (logit / cap)^2): the probabilities times
  /// the cap's slope.
  void capped_gradient(A lse, A scale) {
    const Vec<A> shift(lse), by(scale), one(A(1)), inverse(A(1) / cap_);
    for (int64_t i = 0; i < vocab_; i += kSize) {
      const Vec<A> v = load(logits_ + i, lanes(i)), tanh = v * inverse;
      store(logits_ + i, exp(v - shift) * by * (one - tanh * tanh), lanes(i));
    }
  }

  A slope(A capped) const {
    const A tanh = cap_ > 0 ? capped / cap_ : A(0);
    return A(1) - tanh * tanh;
  }

 private:
  static constexpr int64_t kSize = kLanes<A>;
  int64_t lanes(int64_t i) const { return smaller(kSize, vocab_ - i); }

  A* logits_;
  int64_t vocab_;
  A cap_;
};

template <class A>
void run_row(const SoftmaxCrossEntropyParams& p, int64_t r) {
  A* logits = static_cast<A*>(p.logits) + r * p.vocab;
  const int64_t target = p.targets[r];
  const bool capped = p.soft_cap > 0;
  Row<A> row(logits, p.vocab, static_cast<A>(p.soft_cap));
  const A max = row.cap_and_max();
  const A chosen = logits[target];
  const A sum = row.sum_exponentials(max, p.gradient && !capped);
  // In this order a sure prediction keeps its tiny loss: max - chosen is exact near the maximum.
  const A log_sum = logarithm(sum);
  if (p.loss) static_cast<A*>(p.loss)[r] = (max - chosen) + log_sum;
  if (!p.gradient) return;
  A scale = static_cast<A>(p.scale);
  if (p.row_scales) scale *= static_cast<const A*>(p.row_scales)[r];
  if (capped) {
    row.capped_gradient(max + log_sum, scale);
  } else {
    row.scale(scale / sum);
  }
  logits[target] -= scale * row.slope(chosen);
}

template <class A>
void run(const SoftmaxCrossEntropyParams& p) {
  at::parallel_for(0, p.rows, larger(1, 16384 / larger(1, p.vocab)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) run_row<A>(p, r);
                   });
}

}  // namespace

void softmax_cross_entropy(const SoftmaxCrossEntropyParams& p) {
  if (p.dtype == Dtype::kDouble) {
    run<double>(p);
  } else {
    run<float>(p);
  }
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
