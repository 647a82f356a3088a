#include "csrc/ops/gated_linear_attention_kernels.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "csrc/ops/kernel_tensors.h"
#include "cuda/gated/gated_recurrence.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using cuda::RecurrenceOrder;

constexpr int64_t kFour =
    4;  // numbers that the kernels read at once, at addresses that are multiples of their size

int64_t rounded_up(int64_t width) { return (width + kFour - 1) / kFour * kFour; }

/// The last `dims` dimensions filled up with zeros to multiples of four, row-major: constant_pad_nd keeps the strides of
/// channels-last, which those of a contiguous tensor with sizes of one may be as well.
Tensor padded(const Tensor& x, int64_t dims = 1) {
  std::vector<int64_t> pad;
  int64_t added = 0;
  for (int64_t i = 1; i <= dims; ++i) {
    const int64_t behind = rounded_up(x.size(-i)) - x.size(-i);
    pad.insert(pad.end(), {0, behind});
    added += behind;
  }
  if (added > 0) return at::constant_pad_nd(x, pad).contiguous();
  return aligned(x) ? x : x.clone();
}

/// A call as the kernels take it: q scaled, decays instead of their logarithms, widths multiples of four.
struct Call {
  Call(const GatedChunks& in, cuda::Stream on)
      : q(padded(in.q * in.scale)),
        k(padded(in.k)),
        v(padded(in.v)),
        decay(padded(in.g.exp())),
        state0(in.state0.defined() ? padded(in.state0, 2) : Tensor()),
        reset(in.reset),
        bonus(in.u.defined()),
        stream(on) {}
  Tensor empty_state() const {
    return at::empty({q.size(0), q.size(2), q.size(3), v.size(3)}, q.options());
  }
  template <class Params>
  void set_sizes(Params& p) const {
    p.batch = static_cast<int32_t>(q.size(0));
    p.time = static_cast<int32_t>(q.size(1));
    p.num_heads = static_cast<int32_t>(q.size(2));
    p.reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
  }

  Tensor q, k, v, decay, state0, reset;  ///< state0, reset undefined where absent
  bool bonus;
  cuda::Stream stream;
};

/// One pass over the tokens in which a matrix gains row column^T. Undefined tensors: not there, not wanted.
struct Pass {
  bool gradients =
      false;  ///< the matrix is the gradient of the state, from the last token on; else the state
  bool by_row = false;  ///< an output for each of its rows (keys); else for each column (values)
  Tensor row, column, read, start;
  Tensor end;                 ///< to be filled
  Tensor end_with, end_sums;  ///< see GatedRecurrenceParams; the latter to be filled
};

Tensor run(const Call& call, const Pass& pass) {
  const Tensor& write = pass.by_row ? pass.column : pass.row;
  const Tensor& weight = pass.by_row ? pass.row : pass.column;
  const Tensor out = at::empty_like(weight);
  cuda::GatedRecurrenceParams p;
  call.set_sizes(p);
  p.across = static_cast<int32_t>(write.size(3)), p.own = static_cast<int32_t>(weight.size(3));
  p.order = call.bonus       ? RecurrenceOrder::kReadDecayWrite
            : pass.gradients ? RecurrenceOrder::kWriteReadDecay
                             : RecurrenceOrder::kDecayWriteRead;
  p.backwards = pass.gradients;
  p.read = floats(pass.read), p.write = floats(write), p.weight = floats(weight);
  p.decay = floats(call.decay), p.decays_across = !pass.by_row;
  p.row = pass.by_row ? 1 : p.own, p.column = pass.by_row ? p.across : 1;
  if (pass.start.defined()) p.start = floats(pass.start);
  p.out = floats(out);
  if (pass.end.defined()) p.end = floats(pass.end);
  if (pass.end_with.defined())
    p.end_with = floats(pass.end_with), p.end_sums = floats(pass.end_sums);
  run_kernels("gated_linear_attention", [&] { cuda::gated_recurrence(p, call.stream); });
  return out;
}

Tensor decay_gradients(const Call& call, const Tensor& dq, const Tensor& dk, const Tensor& last) {
  const Tensor dg = at::empty_like(dq);
  cuda::GatedDecayGradientsParams p;
  call.set_sizes(p);
  p.width = static_cast<int32_t>(dq.size(3));
  p.bonus = call.bonus;
  p.q = floats(call.q), p.k = floats(call.k), p.dq = floats(dq), p.dk = floats(dk);
  p.decay = floats(call.decay), p.last = floats(last), p.dg = floats(dg);
  run_kernels("gated_linear_attention_backward",
              [&] { cuda::gated_decay_gradients(p, call.stream); });
  return dg;
}

Tensor sum_of_rows(const Tensor& x) { return x.sum(-1, /*keepdim=*/true); }

}  // namespace

std::string gated_linear_attention_kernels_lack(const GatedChunks& in) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (in.q.scalar_type() == at::kDouble) return "no kernels for float64";
  if (!cuda::gated_recurrence_supported(rounded_up(in.q.size(3)), rounded_up(in.v.size(3))))
    return "no kernels for heads this wide";
  // A block has at least 4 outputs of a head.
  const int64_t width = std::max(in.q.size(3), in.v.size(3));
  if (in.q.size(1) > kMost / 2 || in.q.size(0) * in.q.size(2) > kMost / (width / 4 + 1))
    return "no kernels for tensors this large";
  return "";
}

std::tuple<Tensor, Tensor> gated_linear_attention_kernels(const GatedChunks& in,
                                                          cuda::Stream stream) {
  const Call call(in, stream);
  Pass pass;
  pass.row = call.k, pass.column = call.v, pass.read = call.q;
  pass.start = call.state0, pass.end = call.empty_state();
  Tensor h = run(call, pass).narrow(-1, 0, in.v.size(3));
  if (call.bonus) h = h + sum_of_rows(in.q * in.scale * in.u * in.k) * in.v;
  const Tensor state = pass.end.narrow(-1, 0, in.v.size(3)).narrow(-2, 0, in.q.size(3));
  return {h.contiguous(), state.contiguous()};
}

std::vector<Tensor> gated_linear_attention_kernels_backward(const GatedChunks& in, const Tensor& dh,
                                                            const Tensor& dstate,
                                                            cuda::Stream stream) {
  const Call call(in, stream);
  const int64_t keys = in.q.size(3), values = in.v.size(3);
  const Tensor upstream = padded(dh), last = padded(dstate, 2);
  Pass states;
  states.by_row = true;
  states.row = call.k, states.column = call.v, states.read = upstream, states.start = call.state0;
  states.end_with = last,
  states.end_sums = at::empty({last.size(0), last.size(1), last.size(2)}, last.options());
  const Tensor dq_padded = run(call, states);

  Pass gradients;
  gradients.gradients = true;
  gradients.row = call.q, gradients.column = upstream, gradients.start = last;
  gradients.by_row = true, gradients.read = call.v;
  const Tensor dk_padded = run(call, gradients);
  gradients.by_row = false, gradients.read = call.k;
  gradients.end = call.empty_state();
  Tensor dv = run(call, gradients).narrow(-1, 0, values);

  const Tensor dg = decay_gradients(call, dq_padded, dk_padded, states.end_sums);
  Tensor dq = dq_padded.narrow(-1, 0, keys), dk = dk_padded.narrow(-1, 0, keys), du;
  if (call.bonus) {  // h_t += (q_t . u k_t) v_t
    const Tensor q = in.q * in.scale, weight = sum_of_rows(dh * in.v);
    dq = dq + in.u * in.k * weight;
    dk = dk + in.u * q * weight;
    dv = dv + sum_of_rows(q * in.u * in.k) * dh;
    du = (q * in.k * weight).sum(at::IntArrayRef{0, 1});
  }
  const Tensor dstate0 = gradients.end.narrow(-1, 0, values).narrow(-2, 0, keys);
  return {(dq * in.scale).contiguous(),
          dk.contiguous(),
          dv.contiguous(),
          dg.narrow(-1, 0, keys).contiguous(),
          du,
          in.state0.defined() ? dstate0.contiguous() : Tensor()};
}

}  // namespace xlstm::ops
