// Two phases: the states around all chunks (products in one batch, then a short recurrence over chunks), and everything
// inside the chunks in one batch. The normaliser is one more column of v, of ones, and n one more column of C:
//   X = [v, 1]   S = [C, n]   P = (Q K^T) o (scale D)   [num, product] = P X + (w Q) S   S <- gamma S + (u K)^T X
// and with G = [dh / N, z] the gradient is that of a plain linear recurrence:
//   dP = G X^T   dq = (dP o D) K + (w G) S^T   dk = (dP o D)^T Q + (u X) dS^T   dX = P^T G + (u K) dS
//   dS <- gamma dS + (w Q)^T G
// w, u, gamma, D, N, z: csrc/ops/cpu/mlstm_gates.h and mlstm_chunk_backward.h.
#include "csrc/ops/mlstm_generic.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "csrc/ops/cpu/mlstm_params.h"
#include "csrc/ops/full_precision.h"
#include "csrc/ops/mlstm_generic_chunks.h"
#include "csrc/ops/mlstm_generic_gates.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// Running sums along the last dimension, in log2 steps: at::cumsum on CUDA is not deterministic.
Tensor running_sum(Tensor x) {
  const int64_t length = x.size(-1);
  for (int64_t step = 1; step < length; step *= 2)
    x = x + at::constant_pad_nd(x.narrow(-1, 0, length - step), {step, 0});
  return x;
}

/// (a,b,...) -> (a*b,...)
Tensor merged(const Tensor& x) { return x.flatten(0, 1); }

/// Whether each (t, s > t) pair of a chunk is masked.
Tensor later_tokens(int64_t length, at::Device device) {
  return at::ones({length, length}, at::TensorOptions(device).dtype(at::kBool)).triu(1);
}

/// One call: its chunks, operands and gates. Operands are (NC,NH,L,.) in the type of computation, gates (NC,NH,L).
class Problem {
 public:
  Problem(const MlstmArguments& a, const MlstmSizes& checked)
      : sizes(checked),
        chunks(make_mlstm_chunks(a, sizes)),
        type(accumulate_type(a.q.scalar_type())),
        options(a.q.options().dtype(type)),
        sigmoid(is_sigmoid_input_gate("mlstm_chunkwise", a.input_gate)),
        scale(mlstm_scale(a.scale, sizes.dqk)),
        q(chunks.gather(a.q, type)),
        k(chunks.gather(a.k, type)) {
    const Tensor values = chunks.gather(a.v, type);
    x = at::cat(
        {values, at::ones({1}, options).expand({chunks.count, sizes.num_heads, chunks.length, 1})},
        -1);
    masked_ = later_tokens(chunks.length, a.q.device());
    load_gates(a);
    run_stabilisers(a);
    compute_factors();
  }

  int64_t first_count() const { return chunks.step_counts.empty() ? 0 : chunks.step_counts[0]; }

  /// f(begin, count) for runs of chunks whose temporaries stay below a size.
  template <class F>
  void for_slabs(const F& f) const {
    constexpr int64_t kElements = int64_t{1} << 26;
    const int64_t length = chunks.length, width = sizes.dqk * (sizes.dv + 1);
    const int64_t each = sizes.num_heads * (6 * length * length + 2 * width);
    const int64_t most = std::max<int64_t>(1, kElements / each);
    for (int64_t i = 0; i < chunks.count; i += most) f(i, std::min(most, chunks.count - i));
  }

  /// scale * D of a slab: (chunks * NH, L, L), zero (selected, not multiplied) where s > t.
  Tensor decay(int64_t begin, int64_t count) const {
    const Tensor exponent =
        column(shift_.narrow(0, begin, count)) + alpha_.narrow(0, begin, count).unsqueeze(-2);
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    return merged(exponent.to(type).masked_fill_(masked_, kNever).exp_().mul_(scale));
  }

  /// States [C, n], (first_count + NC, NH, DQK, DV + 1): the initial ones, then what leaves each chunk.
  Tensor states(const Tensor& initial) const {
    const int64_t first = first_count(), heads = sizes.num_heads;
    const Tensor all = at::empty({first + chunks.count, heads, sizes.dqk, sizes.dv + 1}, options);
    all.narrow(0, 0, first).copy_(initial.narrow(0, 0, first));
    for_slabs([&](int64_t i, int64_t n) {
      const Tensor weighted = merged(k.narrow(0, i, n) * column(u.narrow(0, i, n)));
      Tensor out = merged(all.narrow(0, first + i, n));
      at::bmm_out(out, weighted.transpose(1, 2), merged(x.narrow(0, i, n)));
    });
    int64_t chunk = 0, before = 0;
    for (const int64_t count : chunks.step_counts) {
      const Tensor entering = without_fresh(all.narrow(0, before, count), chunk, count);
      before = first + chunk;
      all.narrow(0, before, count)
          .addcmul_(column(column(gamma.narrow(0, chunk, count))), entering);
      chunk += count;
    }
    return all;
  }

  /// What enters the chunks of a slab: (chunks * NH, DQK, DV + 1).
  Tensor entering(const Tensor& states, int64_t begin, int64_t count) const {
    const Tensor rows = states.index_select(0, chunks.previous.narrow(0, begin, count));
    return merged(without_fresh(rows, begin, count));
  }

  /// Rows of chunks [begin, begin + count), zero where the chunk is fresh.
  Tensor without_fresh(const Tensor& rows, int64_t begin, int64_t count) const {
    if (!chunks.fresh.defined()) return rows;
    return rows.masked_fill(chunks.fresh.narrow(0, begin, count).view({count, 1, 1, 1}), 0);
  }

  /// The last state of every sequence, in order of the sequences.
  Tensor final_states(const Tensor& states, const Tensor& initial) const {
    const Tensor last = initial.clone();
    int64_t row = first_count();
    for (size_t step = 0; step < chunks.step_counts.size(); ++step) {
      const auto [going_on, count] = chunks.step_range(step);
      const int64_t ending = count - going_on;
      if (ending > 0)
        last.narrow(0, going_on, ending).copy_(states.narrow(0, row + going_on, ending));
      row += count;
    }
    return chunks.from_order(last);
  }

  const MlstmSizes& sizes;
  MlstmChunks chunks;
  at::ScalarType type;
  at::TensorOptions options;  // of the type of computation
  bool sigmoid;
  double scale;
  Tensor q, k, x;       // x: [v, 1]
  Tensor igate, fgate;  // pre-activations, float64
  Tensor w, u, floor;   // with the scale in w; floor: exp(-m)
  Tensor gamma;         // (NC,NH)
  Tensor last_m;        // (N,NH) after the last token, in order of the sequences

 private:
  void load_gates(const MlstmArguments& a) {
    igate = chunks.gather(a.igate, at::kDouble);
    fgate = chunks.gather(a.fgate, at::kDouble);
    Tensor forget = log_gate(fgate, true, cpu::kMinLogForget);
    Tensor input = log_gate(igate, sigmoid, cpu::kMinLogInput);
    if (chunks.padding.defined()) {
      forget = forget.masked_fill(chunks.padding, 0);
      input = input.masked_fill(chunks.padding, 2 * cpu::kMinLogInput);  // never the largest
    }
    shift_ = running_sum(forget);
    alpha_ = input - shift_;
    highest_ = std::get<0>(at::cummax(alpha_, -1));
  }

  /// The stabiliser that enters and leaves each chunk, rounded as the state stores it.
  void run_stabilisers(const MlstmArguments& a) {
    const at::TensorOptions wide = options.dtype(at::kDouble);
    m_start_ = at::zeros({chunks.count, sizes.num_heads}, wide);
    m_end_ = at::zeros({chunks.count, sizes.num_heads}, wide);
    Tensor m = at::zeros({sizes.num_sequences, sizes.num_heads}, wide);
    if (!sigmoid) {
      if (a.m0) m = chunks.to_order(*a.m0).to(at::kDouble).clamp_min(cpu::kMinLogInput);
      const Tensor total = shift_.select(-1, chunks.length - 1),
                   peak = highest_.select(-1, chunks.length - 1);
      int64_t chunk = 0;
      for (const int64_t count : chunks.step_counts) {
        const Tensor start = m_start_.narrow(0, chunk, count), carried = m.narrow(0, 0, count);
        start.copy_(carried);
        if (chunks.fresh.defined())
          start.masked_fill_(column(chunks.fresh.narrow(0, chunk, count)), 0);
        const Tensor end =
            total.narrow(0, chunk, count) + at::maximum(peak.narrow(0, chunk, count), start);
        carried.copy_(end.to(type));
        m_end_.narrow(0, chunk, count).copy_(carried);
        chunk += count;
      }
    }
    last_m = chunks.from_order(m).to(type);
  }

  void compute_factors() {
    const Tensor start = column(m_start_), end = column(m_end_);
    const Tensor total = shift_.narrow(-1, chunks.length - 1, 1);
    const Tensor m =
        sigmoid ? at::zeros({1}, shift_.options()) : shift_ + at::maximum(highest_, start);
    u = (alpha_ + (total - end)).exp().to(type);
    gamma = (total + start - end).exp().squeeze(-1).to(type);
    floor = normaliser_floor(m).to(type).expand(shift_.sizes());
    shift_ = shift_ - m;
    w = ((shift_ + start).exp() * scale).to(type);
  }

  Tensor alpha_;            // li_s - b_s
  Tensor shift_;            // b_t, then b_t - m_t
  Tensor highest_;          // running maximum of alpha
  Tensor m_start_, m_end_;  // (NC,NH)
  Tensor masked_;
};

/// [C, n] of the given tensors, zero where absent, in the order of the chunks' first step.
Tensor joined_states(const Problem& p, const OptionalTensor& c, const OptionalTensor& n) {
  const int64_t count = p.sizes.num_sequences, heads = p.sizes.num_heads;
  const Tensor all = at::zeros({count, heads, p.sizes.dqk, p.sizes.dv + 1}, p.options);
  if (c) all.narrow(-1, 0, p.sizes.dv).copy_(p.chunks.to_order(*c));
  if (n) all.select(-1, p.sizes.dv).copy_(p.chunks.to_order(*n));
  return all;
}

/// G = dh / N and z, side by side: (NC,NH,L,DV + 1)
Tensor output_gradients(const Problem& p, const MlstmBackwardArguments& a) {
  const int64_t width = p.sizes.dv;
  const Tensor g = at::zeros(p.x.sizes(), p.options);
  if (!a.dh) return g;
  const Tensor values = g.narrow(-1, 0, width);
  values.copy_(p.chunks.gather(*a.dh, p.type));
  if (a.in.normalize) {
    const Tensor product = p.chunks.gather(a.product, p.type);
    const Tensor h = p.chunks.gather(a.h, p.type);
    values.div_(column(normaliser(product, p.floor, a.in.eps)));
    const Tensor z = (values * h).sum(-1);
    const Tensor inactive = product.abs() <= p.floor;  // false where NaN
    g.select(-1, width).copy_(at::where(product < 0, z, -z).masked_fill_(inactive, 0));
  }
  if (p.chunks.padding.defined()) g.masked_fill_(p.chunks.padding.unsqueeze(-1), 0);
  return g;
}

/// Gradients of the states of Problem::states. final: of the last ones, in order of the first step.
Tensor state_gradients(const Problem& p, const Tensor& g, const Tensor& final) {
  const MlstmChunks& chunks = p.chunks;
  const int64_t first = p.first_count(), steps = static_cast<int64_t>(chunks.step_counts.size());
  const Tensor all =
      at::zeros({first + chunks.count, p.sizes.num_heads, p.sizes.dqk, p.sizes.dv + 1}, p.options);
  p.for_slabs([&](int64_t i, int64_t n) {  // what a chunk's outputs ask of the state that enters it
    const Tensor weighted = merged(p.q.narrow(0, i, n) * column(p.w.narrow(0, i, n)));
    const Tensor own = at::bmm(weighted.transpose(1, 2), merged(g.narrow(0, i, n)));
    all.index_copy_(0, chunks.previous.narrow(0, i, n),
                    own.view({n, -1, own.size(1), own.size(2)}));
  });
  int64_t end = chunks.count;
  for (int64_t step = steps - 1; step >= 0; --step) {
    const auto [going_on, count] = chunks.step_range(step);
    const int64_t chunk = end - count, ending = count - going_on;
    const Tensor leaving = all.narrow(0, first + chunk, count);
    if (ending > 0) leaving.narrow(0, going_on, ending).copy_(final.narrow(0, going_on, ending));
    const int64_t before = step == 0 ? 0 : first + chunk - chunks.step_counts[step - 1];
    Tensor entering = all.narrow(0, before, count);
    entering.addcmul_(column(column(p.gamma.narrow(0, chunk, count))), leaving);
    if (chunks.fresh.defined())
      entering.masked_fill_(chunks.fresh.narrow(0, chunk, count).view({count, 1, 1, 1}), 0);
    end = chunk;
  }
  return all;
}

/// dq, dk, dv in chunks, and float64 what the gates' gradients are sums of.
struct ChunkGradients {
  explicit ChunkGradients(const Problem& p)
      : dq(at::empty_like(p.q)),
        dk(at::empty_like(p.k)),
        dv(at::empty(p.x.narrow(-1, 0, p.sizes.dv).sizes(), p.options)),
        leaving(at::empty({p.chunks.count, p.sizes.num_heads}, p.options.dtype(at::kDouble))) {}

  void run(const Problem& p, const Tensor& g, const Tensor& states, const Tensor& dstates,
           int64_t i, int64_t n) {
    const auto slab = [i, n](const Tensor& t) { return merged(t.narrow(0, i, n)); };
    const int64_t first = p.first_count();
    const Tensor q = slab(p.q), k = slab(p.k), x = slab(p.x), gs = slab(g);
    const Tensor end = merged(states.narrow(0, first + i, n)),
                 dend = merged(dstates.narrow(0, first + i, n));
    const Tensor decay = p.decay(i, n), start = p.entering(states, i, n);
    const Tensor weighted_g = gs * column(slab(p.w)), u = column(slab(p.u));
    const Tensor probs = at::bmm(q, k.transpose(1, 2)).mul_(decay);
    const Tensor dscores = at::bmm(gs, x.transpose(1, 2)).mul_(decay);
    slab(dq).copy_(at::bmm(dscores, k).baddbmm_(weighted_g, start.transpose(1, 2)));
    slab(dk).copy_(at::bmm(dscores.transpose(1, 2), q).baddbmm_(x * u, dend.transpose(1, 2)));
    slab(dv).copy_(at::bmm(probs.transpose(1, 2), gs.narrow(-1, 0, p.sizes.dv))
                       .baddbmm_(k * u, dend.narrow(-1, 0, p.sizes.dv)));
    slab(leaving).copy_((end * dend).sum({-2, -1}, false, at::kDouble));
  }

  Tensor dq, dk, dv;
  Tensor leaving;  // <S, dS> of the state that leaves
};

/// Gradients of the pre-activations, (NC,NH,L) in float64.
std::pair<Tensor, Tensor> gate_gradients(const Problem& p, const ChunkGradients& g) {
  const Tensor input = (p.k * g.dk).sum(-1, false, at::kDouble);
  const Tensor change = (p.q * g.dq).sum(-1, false, at::kDouble) - input;
  const Tensor forget = running_sum(change.flip(-1)).flip(-1) + column(g.leaving);
  // The first forget gate of a fresh chunk acts on the empty state.
  if (p.chunks.fresh.defined()) forget.select(-1, 0).masked_fill_(column(p.chunks.fresh), 0);
  return {p.sigmoid ? input * (-p.igate).sigmoid() : input, forget * (-p.fgate).sigmoid()};
}

}  // namespace

MlstmResults mlstm_generic_forward(const MlstmArguments& a) {
  const MlstmSizes sizes = check_mlstm_arguments(a);
  if (sizes.num_sequences == 0 || sizes.num_heads == 0) return empty_mlstm_results(a, sizes, true);
  const FullPrecision precision;
  const Problem p(a, sizes);
  const Tensor initial = joined_states(p, a.c0, a.n0), states = p.states(initial);
  const Tensor out = at::empty(p.x.sizes(), p.options);
  p.for_slabs([&](int64_t i, int64_t n) {
    const auto slab = [i, n](const Tensor& t) { return merged(t.narrow(0, i, n)); };
    const Tensor q = slab(p.q);
    const Tensor probs = at::bmm(q, slab(p.k).transpose(1, 2)).mul_(p.decay(i, n));
    slab(out).copy_(
        at::bmm(probs, slab(p.x)).baddbmm_(q * column(slab(p.w)), p.entering(states, i, n)));
  });
  const Tensor values = out.narrow(-1, 0, sizes.dv), product = out.select(-1, sizes.dv);
  if (a.normalize) values.div_(column(normaliser(product, p.floor, a.eps)));
  const Tensor last = p.final_states(states, initial);
  return {p.chunks.scatter(values, a.q.scalar_type()), last.narrow(-1, 0, sizes.dv).contiguous(),
          last.select(-1, sizes.dv).contiguous(), p.last_m, p.chunks.scatter(product, p.type)};
}

MlstmGradients mlstm_generic_backward(const MlstmBackwardArguments& a) {
  const MlstmSizes sizes = check_mlstm_backward_arguments(a);
  if (sizes.num_sequences == 0 || sizes.num_heads == 0) return empty_mlstm_gradients(a.in, sizes);
  const FullPrecision precision;
  const Problem p(a.in, sizes);
  const Tensor initial = joined_states(p, a.in.c0, a.in.n0), states = p.states(initial);
  const Tensor g = output_gradients(p, a);
  const Tensor final = joined_states(p, a.dc, a.dn), dstates = state_gradients(p, g, final);
  ChunkGradients gradients(p);
  p.for_slabs([&](int64_t i, int64_t n) { gradients.run(p, g, states, dstates, i, n); });
  const auto [digate, dfgate] = gate_gradients(p, gradients);
  // Sequences without tokens pass the gradient of their state through.
  final.narrow(0, 0, p.first_count()).copy_(dstates.narrow(0, 0, p.first_count()));
  const Tensor dinitial = p.chunks.from_order(final);
  const Tensor none = at::empty({0}, p.options);
  return {p.chunks.scatter(gradients.dq, a.in.q.scalar_type()),
          p.chunks.scatter(gradients.dk, a.in.k.scalar_type()),
          p.chunks.scatter(gradients.dv, a.in.v.scalar_type()),
          p.chunks.scatter(digate, a.in.igate.scalar_type()),
          p.chunks.scatter(dfgate, a.in.fgate.scalar_type()),
          a.in.c0 ? dinitial.narrow(-1, 0, sizes.dv).contiguous() : none,
          a.in.n0 ? dinitial.select(-1, sizes.dv).contiguous() : none};
}

}  // namespace xlstm::ops
