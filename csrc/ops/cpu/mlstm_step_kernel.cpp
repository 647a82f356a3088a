// One token of the mLSTM on the CPU, in place on the state: a single pass over C, which is what the time goes into.
#include <ATen/Parallel.h>

#include "csrc/ops/cpu/mlstm_gates.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int64_t kColumns =
    256;  // of C, per task: h and v of a task stay in the first-level cache

template <class T>
struct StepGates {
  T forget, input, norm;  // f', i', 1 / N
};

/// New m and n of an item and what its columns of C need.
template <class T>
StepGates<T> step_gates(const MlstmStepParams& p, int64_t item) {
  T* n = static_cast<T*>(p.n) + item * p.dqk;
  T* m = static_cast<T*>(p.m) + item;
  const T* q = static_cast<const T*>(p.q) + item * p.dqk;
  const T* k = static_cast<const T*>(p.k) + item * p.dqk;
  double log_forget = static_cast<const T*>(p.fgate)[item],
         log_input = static_cast<const T*>(p.igate)[item];
  log_sigmoid_row(&log_forget, 1);
  if (p.sigmoid_input_gate) log_sigmoid_row(&log_input, 1);
  log_forget = floor_nan(log_forget, kMinLogForget);
  log_input = floor_nan(log_input, kMinLogInput);
  const double m_old =
      p.sigmoid_input_gate ? 0.0 : floor_nan(static_cast<double>(*m), kMinLogInput);
  const double m_new =
      p.sigmoid_input_gate
          ? 0.0
          : static_cast<double>(static_cast<T>(max_nan(log_forget + m_old, log_input)));
  *m = static_cast<T>(m_new);
  const double exponents[3] = {log_forget + m_old - m_new, log_input - m_new, log_floor(m_new)};
  T factors[3];
  exp_shifted(factors, exponents, 0.0, T(1), 3);
  for (int64_t i = 0; i < p.dqk; ++i) n[i] = factors[0] * n[i] + factors[1] * k[i];
  T norm = 1;
  if (p.normalize) {
    const T product = static_cast<T>(p.scale) * dot<T>(q, n, p.dqk),
            size = product < 0 ? -product : product;
    norm = T(1) / ((factors[2] > size ? factors[2] : size) + static_cast<T>(p.eps));
  }
  return {factors[0], factors[1], norm};
}

/// C and h of columns [begin, end) of an item.
template <class T>
void step_columns(const MlstmStepParams& p, int64_t item, int64_t begin, int64_t end,
                  const StepGates<T>& gates) {
  const T* q = static_cast<const T*>(p.q) + item * p.dqk;
  const T* k = static_cast<const T*>(p.k) + item * p.dqk;
  const T* v = static_cast<const T*>(p.v) + item * p.dv + begin;
  T* h = static_cast<T*>(p.h) + item * p.dv + begin;
  const int64_t width = end - begin;
  alignas(64) T sum[kColumns] = {};
  alignas(64) T value[kColumns];
  for (int64_t j = 0; j < width; ++j) value[j] = gates.input * v[j];
  for (int64_t i = 0; i < p.dqk; ++i) {
    T* __restrict row = static_cast<T*>(p.c) + (item * p.dqk + i) * p.dv + begin;
    const T ki = k[i], qi = q[i];
    for (int64_t j = 0; j < width; ++j) {
      const T c = gates.forget * row[j] + ki * value[j];
      row[j] = c;
      sum[j] += qi * c;
    }
  }
  const T factor = static_cast<T>(p.scale) * gates.norm;
  for (int64_t j = 0; j < width; ++j) h[j] = factor * sum[j];
}

template <class T>
void step(const MlstmStepParams& p) {
  const Buffer<StepGates<T>> gates(p.items);
  for (int64_t item = 0; item < p.items; ++item) gates[item] = step_gates<T>(p, item);
  const int64_t blocks = (p.dv + kColumns - 1) / kColumns;
  const int64_t grain = max_of(1, 65536 / max_of(1, p.dqk * min_of(p.dv, kColumns)));
  at::parallel_for(0, p.items * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t item = task / blocks, first = task % blocks * kColumns;
      step_columns<T>(p, item, first, min_of(p.dv, first + kColumns), gates[item]);
    }
  });
}

}  // namespace

void mlstm_step(const MlstmStepParams& p) {
  if (p.float64) {
    step<double>(p);
  } else {
    step<float>(p);
  }
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
