// One token of the mLSTM in ATen calls, and the same with a state that lags behind a ring of tokens.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "csrc/ops/cpu/mlstm_params.h"
#include "csrc/ops/full_precision.h"
#include "csrc/ops/mlstm_generic.h"
#include "csrc/ops/mlstm_generic_gates.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// What is in a ring as one chunk: weights w_j and w in units of e^m. Tokens that are not there are selected away: what
/// lies there may be anything.
struct RingChunk {
  RingChunk(const MlstmRing& ring, const Tensor& old_m, bool sigmoid) {
    const Tensor& count = ring.count;
    const int64_t length = ring.keys.size(2);
    const at::ScalarType type = ring.gates.scalar_type();
    const Tensor absent = at::arange(length, count.options()) >= column(count);
    const auto present = [&](const Tensor& x) { return x.to(type).masked_fill(column(absent), 0); };
    keys = present(ring.keys);
    values = present(ring.values);
    const auto logs = [&](int64_t which, double lowest, double none) {
      return ring.gates.select(-1, which)
          .to(at::kDouble)
          .clamp_min(lowest)
          .masked_fill(absent, none);
    };
    const Tensor forget = logs(0, cpu::kMinLogForget, 0),
                 input = logs(1, cpu::kMinLogInput, -kInfinity);
    const Tensor later = at::ones({length, length}, forget.options()).tril(-1);
    const Tensor added = input + at::matmul(forget, later);
    Tensor carried = forget.sum(-1);
    if (!sigmoid) carried = carried + old_m.to(at::kDouble).clamp_min(cpu::kMinLogInput);
    m = sigmoid ? at::zeros_like(old_m) : at::maximum(carried, added.amax(-1)).to(type);
    const Tensor exact = m.to(at::kDouble);
    weights = (added - column(exact)).exp().to(type);
    state_weight = (carried - exact).exp().to(type);
    floor = normaliser_floor(exact).to(type);
  }

  /// h (B,NH,DV) of q (B,NH,DQK), scaled.
  Tensor output(const Tensor& q, const Tensor& c, const Tensor& n, bool normalize,
                double eps) const {
    const Tensor scores = weights * at::matmul(keys, column(q)).squeeze(-1);
    Tensor h = column(state_weight) * at::matmul(q.unsqueeze(-2), c).squeeze(-2);
    h.add_(at::matmul(scores.unsqueeze(-2), values).squeeze(-2));
    if (normalize)
      h.div_(column(normaliser(state_weight * (q * n).sum(-1) + scores.sum(-1), floor, eps)));
    return h;
  }

  /// Writes the states after the ring where `heads` says so.
  void fold(const Tensor& heads, const MlstmFoldArguments& a) const {
    if (heads.is_cpu() && !heads.any().item<bool>()) return;
    const auto replace = [](const Tensor& where, Tensor& old, const Tensor& fresh) {
      old.copy_(at::where(where, fresh, old));
    };
    const Tensor weighted = keys * column(weights), column_weight = column(state_weight);
    replace(column(column(heads)), a.c,
            a.c * column(column_weight) + at::matmul(weighted.transpose(-1, -2), values));
    replace(column(heads), a.n, a.n * column_weight + weighted.sum(-2));
    replace(heads, a.m, m);
    a.ring.count.masked_fill_(heads, 0);
  }

  Tensor keys, values;            // (B,NH,R,.) in the dtype of the states
  Tensor weights;                 // (B,NH,R)
  Tensor state_weight, m, floor;  // (B,NH)
};

/// Puts the token where count says, and counts it.
void join(const MlstmLazyArguments& a, bool sigmoid) {
  const MlstmRing& ring = a.ring;
  const Tensor slot =
      at::arange(ring.keys.size(2), ring.count.options()) == column(ring.count);  // (B,NH,R)
  const auto put = [&slot](const Tensor& all, const Tensor& token) {
    all.copy_(at::where(slot.unsqueeze(-1), token.unsqueeze(-2), all));
  };
  put(ring.keys, a.k);
  put(ring.values, a.v);
  const Tensor log_forget = log_gate(a.fgate.to(at::kDouble), true, -kInfinity),
               log_input = log_gate(a.igate.to(at::kDouble), sigmoid, -kInfinity);
  put(ring.gates, at::stack({log_forget, log_input}, -1).to(ring.gates.scalar_type()));
  a.ring.count.add_(1);
}

}  // namespace

Tensor mlstm_generic_step(const MlstmStepArguments& a) {
  const MlstmSizes sizes = check_mlstm_step_arguments(a);
  const FullPrecision precision;
  const at::ScalarType type = accumulate_type(a.q.scalar_type());
  const bool sigmoid = is_sigmoid_input_gate("mlstm_step", a.input_gate);
  const Tensor log_forget = log_gate(a.fgate.to(at::kDouble), true, cpu::kMinLogForget),
               log_input = log_gate(a.igate.to(at::kDouble), sigmoid, cpu::kMinLogInput);
  const Tensor old = a.m.to(at::kDouble).clamp_min(cpu::kMinLogInput);
  const Tensor carried = sigmoid ? log_forget : log_forget + old;
  if (sigmoid) {
    a.m.zero_();
  } else {
    a.m.copy_(at::maximum(carried, log_input));
  }
  const Tensor m = a.m.to(at::kDouble);
  const Tensor forget = (carried - m).exp().to(type), input = (log_input - m).exp().to(type);
  const Tensor q = a.q.to(type) * mlstm_scale(a.scale, sizes.dqk);
  const Tensor added = a.k.to(type) * column(input);
  a.c.mul_(column(column(forget))).addcmul_(column(added), a.v.to(type).unsqueeze(-2));
  a.n.mul_(column(forget)).add_(added);
  const Tensor h = at::matmul(q.unsqueeze(-2), a.c).squeeze(-2);
  if (a.normalize) {
    const Tensor floor = normaliser_floor(m).to(type);
    h.div_(column(normaliser((q * a.n).sum(-1), floor, a.eps)));
  }
  return h.to(a.v.scalar_type());
}

Tensor mlstm_generic_step_lazy(const MlstmLazyArguments& a) {
  const MlstmSizes sizes = check_mlstm_lazy_arguments(a);
  const FullPrecision precision;
  const bool sigmoid = is_sigmoid_input_gate(a.kName, a.input_gate);
  join(a, sigmoid);
  const RingChunk chunk(a.ring, a.m, sigmoid);
  const Tensor q = a.q.to(a.c.scalar_type()) * mlstm_scale(a.scale, sizes.dqk);
  const Tensor h = chunk.output(q, a.c, a.n, a.normalize, a.eps);
  chunk.fold(a.ring.count == a.ring.keys.size(2), {a.c, a.n, a.m, a.ring, a.input_gate});
  return h.to(a.v.scalar_type());
}

void mlstm_generic_fold(const MlstmFoldArguments& a) {
  check_mlstm_fold_arguments(a);
  const FullPrecision precision;
  const bool sigmoid = is_sigmoid_input_gate(a.kName, a.input_gate);
  RingChunk(a.ring, a.m, sigmoid).fold(a.ring.count > 0, a);
}

}  // namespace xlstm::ops
