#include "csrc/ops/cpu/norm_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class A>
struct Statistics {
  A mean, rstd;
};

// Sum over i < dim of f(vector at i, lanes), f giving zero in the lanes past n. Four sums hide the
// latency.
template <class A, class F>
inline A sum_over(int64_t dim, const F& f) {
  constexpr int64_t kSize = kLanes<A>;
  Vec<A> s0(A(0)), s1(A(0)), s2(A(0)), s3(A(0));
  int64_t i = 0;
  for (; i + 4 * kSize <= dim; i += 4 * kSize) {
    s0 = s0 + f(i, kSize);
    s1 = s1 + f(i + kSize, kSize);
    s2 = s2 + f(i + 2 * kSize, kSize);
    s3 = s3 + f(i + 3 * kSize, kSize);
  }
  for (; i < dim; i += kSize) s0 = s0 + f(i, smaller(kSize, dim - i));
  return horizontal_sum((s0 + s1) + (s2 + s3));
}

// Two passes over a row in the first-level cache: no cancellation for a mean far from zero.
template <class T>
inline Statistics<Acc<T>> statistics(const T* x, int64_t dim, bool rms, double eps) {
  using A = Acc<T>;
  const A count = static_cast<A>(dim);
  A mean = 0;
  if (!rms) mean = sum_over<A>(dim, [&](int64_t i, int64_t n) { return load(x + i, n); }) / count;
  const Vec<A> mean_vector(mean);
  const A squares = sum_over<A>(dim, [&](int64_t i, int64_t n) {
    const Vec<A> d = first_lanes(load(x + i, n) - mean_vector, n);
    return d * d;
  });
  return {mean, A(1) / static_cast<A>(__builtin_sqrt(squares / count + static_cast<A>(eps)))};
}

// The pointers of one vector of dim channels. Absent tensors are null.
template <class T>
struct Head {
  const T *x, *skip, *gate;
  const Acc<T>*weight, *bias, *skip_weight;
};

template <class T>
inline Head<T> head_of(const HeadwiseNormParams& p, int64_t r, int64_t h) {
  const int64_t c = h * p.dim;
  const auto channel = [c](const void* data) {
    return data ? static_cast<const Acc<T>*>(data) + c : nullptr;
  };
  return {p.x.row<T>(r) + h * p.x_head_stride,
          p.skip.data ? p.skip.row<T>(r) + c : nullptr,
          p.gate.data ? p.gate.row<T>(r) + c : nullptr,
          channel(p.weight),
          channel(p.bias),
          channel(p.skip_weight)};
}

// A row of x becomes the sum of its terms; the norm then finds it in the first-level cache.
template <class T>
inline void add_terms(const HeadwiseNormParams& p, int64_t r) {
  constexpr int64_t kSize = kLanes<Acc<T>>;
  const int64_t channels = p.heads * p.dim;
  const T *a = p.terms[0].row<T>(r), *b = p.terms[1].row<T>(r);
  T* const sum = static_cast<T*>(p.sum) + r * channels;
  for (int64_t i = 0; i < channels; i += kSize) {
    const int64_t n = smaller(kSize, channels - i);
    store(sum + i, load(a + i, n) + load(b + i, n), n);
  }
}

// norm(x) * weight + bias + skip_weight * skip, of normalised x.
template <class T>
inline Vec<Acc<T>> before_gate(const Head<T>& head, Vec<Acc<T>> v, int64_t i, int64_t n) {
  if (head.weight && head.bias) {
    v = at::vec::fmadd(v, load(head.weight + i, n), load(head.bias + i, n));
  } else {
    if (head.weight) v = v * load(head.weight + i, n);
    if (head.bias) v = v + load(head.bias + i, n);
  }
  if (head.skip) v = at::vec::fmadd(load(head.skip_weight + i, n), load(head.skip + i, n), v);
  return v;
}

template <class T>
inline void forward_head(const HeadwiseNormParams& p, const Head<T>& head, T* y) {
  using A = Acc<T>;
  constexpr int64_t kSize = kLanes<A>;
  const auto [mean, rstd] = statistics(head.x, p.dim, p.rms, p.eps);
  const Vec<A> mean_vector(mean), rstd_vector(rstd);
  for (int64_t i = 0; i < p.dim; i += kSize) {
    const int64_t n = smaller(kSize, p.dim - i);
    const Vec<A> normed = (load(head.x + i, n) - mean_vector) * rstd_vector;
    Vec<A> v = before_gate(head, normed, i, n);
    if (head.gate) {
      const Vec<A> g = load(head.gate + i, n), s = sigmoid(g);
      v = v * (p.sigmoid_gate ? s : g * s);
    }
    store(y + i, v, n);
  }
}

// Where the gradients of one head go; sums over rows are added up in weight, bias and skip_weight.
template <class T>
struct HeadGrads {
  T *x, *skip, *gate;
  Acc<T>*weight, *bias, *skip_weight;
  const T* past;  // what is added to x's; null where absent
};

template <class A>
inline void add_to(A* sum, const Vec<A>& v, int64_t n) {
  store(sum, load(sum, n) + v, n);
}

// With dp = dy * act(gate) and g = dp * weight: dx = rstd * (g - mean(g) - x^ * mean(g * x^)), x^ =
// norm(x), the middle term for layer norm only. g_row holds g between the two passes.
template <class T>
inline void backward_head(const HeadwiseNormParams& p, const Head<T>& head, const T* dy,
                          const HeadGrads<T>& grads, Acc<T>* g_row) {
  using A = Acc<T>;
  constexpr int64_t kSize = kLanes<A>;
  const auto [mean, rstd] = statistics(head.x, p.dim, p.rms, p.eps);
  const Vec<A> mean_vector(mean), rstd_vector(rstd);
  Vec<A> sum_g(A(0)), sum_gx(A(0));
  for (int64_t i = 0; i < p.dim; i += kSize) {
    const int64_t n = smaller(kSize, p.dim - i);
    const Vec<A> normed = (load(head.x + i, n) - mean_vector) * rstd_vector;
    Vec<A> dp = load(dy + i, n);
    if (head.gate) {
      const Vec<A> g = load(head.gate + i, n), s = sigmoid(g);
      const Vec<A> slope = p.sigmoid_gate ? s * (Vec<A>(A(1)) - s) : silu_slope(g, s);
      store(grads.gate + i, dp * before_gate(head, normed, i, n) * slope, n);
      dp = dp * (p.sigmoid_gate ? s : g * s);
    }
    if (head.skip) {
      store(grads.skip + i, dp * load(head.skip_weight + i, n), n);
      add_to(grads.skip_weight + i, dp * load(head.skip + i, n), n);
    }
    if (head.bias) add_to(grads.bias + i, dp, n);
    Vec<A> g = dp;
    if (head.weight) {
      add_to(grads.weight + i, dp * normed, n);
      g = dp * load(head.weight + i, n);
    }
    store(g_row + i, g, n);
    sum_g = sum_g + first_lanes(g, n);
    sum_gx = sum_gx + first_lanes(g * normed, n);
  }
  const A count = static_cast<A>(p.dim);
  const Vec<A> mean_g(p.rms ? A(0) : horizontal_sum(sum_g) / count);
  const Vec<A> mean_gx(horizontal_sum(sum_gx) / count);
  for (int64_t i = 0; i < p.dim; i += kSize) {
    const int64_t n = smaller(kSize, p.dim - i);
    const Vec<A> normed = (load(head.x + i, n) - mean_vector) * rstd_vector;
    Vec<A> dx = (load(g_row + i, n) - mean_g - normed * mean_gx) * rstd_vector;
    if (grads.past) dx = dx + load(grads.past + i, n);
    store(grads.x + i, dx, n);
  }
}

template <class T>
void forward(const HeadwiseNormParams& p) {
  const int64_t channels = p.heads * p.dim;
  at::parallel_for(0, p.rows, larger(1, 16384 / larger(1, channels)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       if (p.sum) add_terms<T>(p, r);
                       for (int64_t h = 0; h < p.heads; ++h)
                         forward_head<T>(p, head_of<T>(p, r, h),
                                         static_cast<T*>(p.y) + r * channels + h * p.dim);
                     }
                   });
}

template <class T>
void backward_block(const HeadwiseNormParams& p, int64_t block, Acc<T>* g_row) {
  using A = Acc<T>;
  const int64_t channels = p.heads * p.dim;
  A* sums = static_cast<A*>(p.partials) + block * 3 * channels;
  for (int64_t i = 0; i < 3 * channels; ++i) sums[i] = A(0);
  const int64_t end = smaller(p.rows, (block + 1) * p.block_rows);
  for (int64_t r = block * p.block_rows; r < end; ++r) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t c = h * p.dim, at = r * channels + c;
      const auto grad = [at](void* data) { return data ? static_cast<T*>(data) + at : nullptr; };
      const HeadGrads<T> grads{grad(p.dx),
                               grad(p.dskip),
                               grad(p.dgate),
                               sums + c,
                               sums + channels + c,
                               sums + 2 * channels + c,
                               p.dsum.data ? p.dsum.row<T>(r) + c : nullptr};
      backward_head<T>(p, head_of<T>(p, r, h), p.dy.row<T>(r) + c, grads, g_row);
    }
  }
}

template <class T>
void backward(const HeadwiseNormParams& p) {
  using A = Acc<T>;
  at::parallel_for(0, p.block_count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> g_row(p.dim);
    for (int64_t block = begin; block < end; ++block) backward_block<T>(p, block, g_row.get());
  });
  const int64_t channels = p.heads * p.dim;
  for (int i = 0; i < 3; ++i) {
    if (!p.parameter_grads[i]) continue;
    sum_partials(static_cast<const A*>(p.partials) + i * channels, p.block_count, 3 * channels,
                 channels, static_cast<A*>(p.parameter_grads[i]));
  }
}

}  // namespace

void headwise_norm(const HeadwiseNormParams& p) {
  visit_dtype(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
}

void headwise_norm_backward(const HeadwiseNormParams& p) {
  visit_dtype(p.dtype, [&](auto zero) { backward<decltype(zero)>(p); });
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
