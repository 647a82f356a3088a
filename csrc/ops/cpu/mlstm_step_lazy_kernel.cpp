// One token of the mLSTM on the CPU with a state that lags behind a ring of tokens (equations in csrc/ops/mlstm.h): C is read
// at every token and written when the ring is full. Reading it is what the time goes into.
#include <ATen/Parallel.h>

#include "csrc/ops/cpu/gemm.h"
#include "csrc/ops/cpu/mlstm_gates.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int64_t kColumns =
    256;  // of C, per task: sums and values of a task stay in the first-level cache

/// What the columns of C need of the items' tokens.
template <class T>
struct LazyTokens {
  explicit LazyTokens(const MlstmLazyParams& p)
      : state(p.items),
        carry(p.items),
        present(p.items),
        scores(p.items * p.tokens),
        keys(p.items * p.tokens * p.dqk) {}
  Buffer<T> state, carry;   // (items): what q . C counts in h, what C keeps when it is folded
  Buffer<int64_t> present;  // (items): tokens in the ring
  Buffer<T> scores;         // (items,R): what a token's value counts in h
  Buffer<T> keys;           // (items,R,DQK): of an item to be folded with their weights
};

/// The token joins the ring of an item; a full ring is folded into n and m, and what remains is C.
template <class T>
void join(const MlstmLazyParams& p, int64_t item, LazyTokens<T>& tokens) {
  const T* q = static_cast<const T*>(p.q) + item * p.dqk;
  T* n = static_cast<T*>(p.n) + item * p.dqk;
  T* m = static_cast<T*>(p.m) + item;
  T* gates = static_cast<T*>(p.gates) + item * p.tokens * 2;
  T* keys = tokens.keys + item * p.tokens * p.dqk;
  T* scores = tokens.scores + item * p.tokens;
  const int64_t last = p.count[item], present = last + 1, slot = item * p.tokens + last;
  scatter_row(p.keys, p.ring_dtype, slot * p.dqk, 1, static_cast<const T*>(p.k) + item * p.dqk,
              p.dqk);
  scatter_row(p.values, p.ring_dtype, slot * p.dv, 1, static_cast<const T*>(p.v) + item * p.dv,
              p.dv);
  double log_forget = static_cast<const T*>(p.fgate)[item],
         log_input = static_cast<const T*>(p.igate)[item];
  log_sigmoid_row(&log_forget, 1);
  if (p.sigmoid_input_gate) log_sigmoid_row(&log_input, 1);
  gates[2 * last] = static_cast<T>(log_forget);
  gates[2 * last + 1] = static_cast<T>(log_input);

  // Exponents of the tokens' weights, the state's and the least normaliser, then these themselves.
  const Buffer<double> exponents(present + 2);
  const Buffer<T> factors(present + 2);
  double sum = 0, highest = kMinLogInput;
  for (int64_t j = last; j >= 0; --j) {
    exponents[j] = floor_nan(static_cast<double>(gates[2 * j + 1]), kMinLogInput) + sum;
    sum += floor_nan(static_cast<double>(gates[2 * j]), kMinLogForget);
    highest = j == last ? exponents[j] : max_nan(highest, exponents[j]);
  }
  if (!p.sigmoid_input_gate) sum += floor_nan(static_cast<double>(*m), kMinLogInput);
  const double m_new =
      p.sigmoid_input_gate ? 0.0 : static_cast<double>(static_cast<T>(max_nan(sum, highest)));
  for (int64_t j = 0; j < present; ++j) exponents[j] -= m_new;
  exponents[present] = sum - m_new;
  exponents[present + 1] = log_floor(m_new);
  exp_shifted(factors, exponents, 0.0, T(1), present + 2);
  const T carry = factors[present], scale = static_cast<T>(p.scale);

  T product = carry * scale * dot<T>(q, n, p.dqk);
  for (int64_t j = 0; j < present; ++j) {
    T* key = keys + j * p.dqk;
    gather_row(key, p.keys, p.ring_dtype, (item * p.tokens + j) * p.dqk, 1, p.dqk);
    scores[j] = factors[j] * scale * dot<T>(q, key, p.dqk);
    product += scores[j];
  }
  T norm = 1;
  if (p.normalize) {
    const T size = product < 0 ? -product : product, least = factors[present + 1];
    norm = T(1) / ((least > size ? least : size) + static_cast<T>(p.eps));
  }
  for (int64_t j = 0; j < present; ++j) scores[j] *= norm;
  tokens.state[item] = norm * carry * scale;
  tokens.carry[item] = carry;
  tokens.present[item] = present;
  p.count[item] = static_cast<int32_t>(present);
  if (present < p.tokens) return;
  for (int64_t i = 0; i < p.dqk; ++i) n[i] *= carry;
  for (int64_t j = 0; j < present; ++j) {
    T* key = keys + j * p.dqk;
    for (int64_t i = 0; i < p.dqk; ++i) {
      key[i] *= factors[j];
      n[i] += key[i];
    }
  }
  *m = static_cast<T>(m_new);
  p.count[item] = 0;
}

/// sum[j] = sum_i q[i] c[i,j]: four rows of C at a time, which are as many streams of memory.
template <class T>
void product_with_state(const T* q, const T* c, int64_t rows, int64_t ld, int64_t width, T* sum) {
  for (int64_t j = 0; j < width; ++j) sum[j] = 0;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *r0 = c + i * ld, *r1 = r0 + ld, *r2 = r1 + ld, *r3 = r2 + ld;
    const T q0 = q[i], q1 = q[i + 1], q2 = q[i + 2], q3 = q[i + 3];
    for (int64_t j = 0; j < width; ++j)
      sum[j] += (q0 * r0[j] + q1 * r1[j]) + (q2 * r2[j] + q3 * r3[j]);
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) sum[j] += q[i] * c[i * ld + j];
}

/// h, and C where the ring is full, of columns [begin, end) of an item.
template <class T>
void columns(const MlstmLazyParams& p, int64_t item, int64_t begin, int64_t end,
             const LazyTokens<T>& tokens) {
  const int64_t width = end - begin, present = tokens.present[item];
  T* c = static_cast<T*>(p.c) + item * p.dqk * p.dv + begin;
  T* h = static_cast<T*>(p.h) + item * p.dv + begin;
  alignas(64) T sum[kColumns];
  product_with_state(static_cast<const T*>(p.q) + item * p.dqk, c, p.dqk, p.dv, width, sum);
  for (int64_t j = 0; j < width; ++j) h[j] = tokens.state[item] * sum[j];
  const Buffer<T> values(present * width);
  for (int64_t t = 0; t < present; ++t) {
    T* value = values + t * width;
    gather_row(value, p.values, p.ring_dtype, (item * p.tokens + t) * p.dv + begin, 1, width);
    const T score = tokens.scores[item * p.tokens + t];
    for (int64_t j = 0; j < width; ++j) h[j] += score * value[j];
  }
  if (present < p.tokens) return;
  gemm<T>(Op::kTranspose, Op::kNone, p.dqk, width, present, T(1),
          tokens.keys + item * p.tokens * p.dqk, p.dqk, values, width, tokens.carry[item], c, p.dv);
}

template <class T>
void step(const MlstmLazyParams& p) {
  LazyTokens<T> tokens(p);
  at::parallel_for(0, p.items, max_of(1, 4096 / max_of(1, p.dqk)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) join(p, item, tokens);
  });
  const int64_t blocks = (p.dv + kColumns - 1) / kColumns;
  const int64_t grain = max_of(1, 65536 / max_of(1, p.dqk * min_of(p.dv, kColumns)));
  at::parallel_for(0, p.items * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / blocks, first = task % blocks * kColumns;
      columns(p, item, first, min_of(p.dv, first + kColumns), tokens);
    }
  });
}

}  // namespace

void mlstm_step_lazy(const MlstmLazyParams& p) {
  if (p.float64) {
    step<double>(p);
  } else {
    step<float>(p);
  }
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
