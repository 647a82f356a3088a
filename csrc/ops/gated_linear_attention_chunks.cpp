// Within a chunk every pair of tokens has a decay of its own for each row of the state, so the scores are sums of
// elementwise products; between chunks states are passed on. With b_t the sum of g from the chunk's (or the document's)
// first token up to t, every exponent is a sum of g over a range of tokens: b_t - b_s for s <= t, b_t, b_L - b_s, b_L,
// never above zero.
#include "csrc/ops/gated_linear_attention_chunks.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>

#include "csrc/ops/full_precision.h"

#include <algorithm>
#include <limits>

namespace xlstm::ops {
namespace {

using at::Tensor;

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr double kLowest =
    -1e4;  // e^g is zero from here on, and differences of sums stay exact to 1e-10

/// Operations are recorded even where the Autograd keys are excluded, which grad mode does not bring back: an ordinary
/// backward pass runs below them.
struct Recording {
  explicit Recording(const c10::impl::LocalDispatchKeySet& before)
      : keys(before.included_,
             before.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView) {}
  at::AutoGradMode grad_mode{true};
  c10::impl::ForceDispatchKeyGuard keys;
};

/// (B,T,NH,D) -> (B,NH,N,L,D), zero behind the last token.
Tensor in_chunks(const Tensor& x, int64_t length) {
  const int64_t rest = (length - x.size(1) % length) % length;
  const Tensor padded = rest == 0 ? x : at::constant_pad_nd(x, {0, 0, 0, 0, 0, rest});
  return padded.unflatten(1, {-1, length}).permute({0, 3, 1, 2, 4});
}

/// Which pairs of tokens meet, and which tokens see the entering and reach the leaving state.
struct Documents {
  Documents(const Tensor& reset, const Tensor& like, bool bonus) {
    const int64_t length = like.size(-2);
    const Tensor place = at::arange(length, like.options().dtype(at::kLong));
    const Tensor ago = place.unsqueeze(-1) - place;
    apart = (bonus ? ago <= 0 : ago < 0).view({1, 1, 1, length, length});
    if (!reset.defined()) return;
    const Tensor chunks =
        in_chunks(reset.to(at::kLong).unsqueeze(-1).unsqueeze(-1), length).squeeze(-1);
    document = chunks.cumsum(-1);
    const Tensor last = document.narrow(-1, length - 1, 1);
    apart = apart | (document.unsqueeze(-1) != document.unsqueeze(-2));
    after_reset = (document != 0).unsqueeze(-1);
    before_reset = (document != last).unsqueeze(-1);
    broken = last != 0;
  }
  Tensor document;      // (B,1,N,L), 0: that of the entering state; undefined without resets
  Tensor apart;         // (B|1,1,N|1,L,L)
  Tensor after_reset;   // (B,1,N,L,1), undefined without resets as the next two
  Tensor before_reset;  // (B,1,N,L,1)
  Tensor broken;        // (B,1,N,1)
};

/// Sums over the tokens of each chunk up to each token, from its document's first on, so that nothing of one document
/// touches a bit of the next; in log2 steps, because at::cumsum on CUDA is not deterministic.
Tensor running_sum(Tensor x, const Tensor& document) {
  const int64_t length = x.size(-2);
  for (int64_t step = 1; step < length; step *= 2) {
    Tensor before = x.narrow(-2, 0, length - step);
    if (document.defined()) {
      const Tensor other =
          document.narrow(-1, step, length - step) != document.narrow(-1, 0, length - step);
      before = before.masked_fill(other.unsqueeze(-1), 0);
    }
    x = x + at::constant_pad_nd(before, {0, 0, step, 0});
  }
  return x;
}

Tensor power(const Tensor& exponent, const Tensor& never, at::ScalarType type) {
  return (never.defined() ? exponent.masked_fill(never, kNever) : exponent).to(type).exp();
}

std::tuple<Tensor, Tensor> one_slab(const GatedChunks& in) {
  const int64_t time = in.q.size(1), length = in.length;
  const bool bonus = in.u.defined();
  const at::ScalarType type = in.q.scalar_type();
  const Tensor q = in_chunks(in.q, length), k = in_chunks(in.k, length),
               v = in_chunks(in.v, length);
  const Tensor g = in_chunks(in.g, length).to(at::kDouble).clamp_min(kLowest);
  const Documents documents(in.reset, q, bonus);
  const Tensor write = running_sum(g, documents.document), read = bonus ? write - g : write;
  const Tensor total = write.select(-2, length - 1);

  const Tensor decay = power(read.unsqueeze(-2) - write.unsqueeze(-3),
                             documents.apart.unsqueeze(-1), type);  // (B,NH,N,L,L,DK)
  Tensor scores = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1);
  if (bonus) scores = scores + at::diag_embed((q * in.u.unsqueeze(1).unsqueeze(1) * k).sum(-1));
  const Tensor weighted_q = q * power(read, documents.after_reset, type);
  const Tensor weighted_k = k * power(total.unsqueeze(-2) - write, documents.before_reset, type);
  const Tensor added = at::matmul(weighted_k.transpose(-1, -2), v);  // (B,NH,N,DK,DV)
  const Tensor kept = power(total, documents.broken, type).unsqueeze(-1);
  Tensor state = in.state0.defined() ? in.state0 : at::zeros_like(added.select(2, 0));
  std::vector<Tensor> entering;
  for (int64_t n = 0; n < added.size(2); ++n) {
    entering.push_back(state);
    state = kept.select(2, n) * state + added.select(2, n);
  }
  const Tensor h = at::matmul(scores, v) + at::matmul(weighted_q, at::stack(entering, 2));
  return {(h * in.scale).permute({0, 2, 3, 1, 4}).flatten(1, 2).narrow(1, 0, time), state};
}

/// f(first row, the arguments of some rows of the batch).
template <class F>
void each_slab(const GatedChunks& in, const F& f) {
  constexpr int64_t kElements = int64_t{1} << 26;
  const int64_t batch = in.q.size(0);
  const int64_t each = std::max<int64_t>(1, in.q.numel() / std::max<int64_t>(1, batch) * in.length);
  const int64_t most = std::clamp<int64_t>(kElements / each, 1, std::max<int64_t>(1, batch));
  for (int64_t i = 0; i < batch; i += most) {
    const int64_t n = std::min(most, batch - i);
    const auto rows = [&](const Tensor& t) { return t.defined() ? t.narrow(0, i, n) : t; };
    GatedChunks slab = in;
    slab.q = rows(in.q), slab.k = rows(in.k), slab.v = rows(in.v), slab.g = rows(in.g);
    slab.state0 = rows(in.state0), slab.reset = rows(in.reset);
    f(i, slab);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> gated_linear_attention_chunks(const GatedChunks& in) {
  const FullFloat precision;
  std::vector<Tensor> h, states;
  each_slab(in, [&](int64_t, const GatedChunks& slab) {
    auto [y, state] = one_slab(slab);
    h.push_back(y), states.push_back(state);
  });
  return {at::cat(h).contiguous(), at::cat(states).contiguous()};
}

std::vector<Tensor> gated_linear_attention_chunks_backward(const GatedChunks& in, const Tensor& dh,
                                                           const Tensor& dstate) {
  const FullFloat precision;
  const Recording with_graph(c10::impl::tls_local_dispatch_key_set());
  std::vector<std::vector<Tensor>> parts(6);
  each_slab(in, [&](int64_t first, GatedChunks slab) {
    std::vector<Tensor> leaves;
    for (Tensor* tensor : {&slab.q, &slab.k, &slab.v, &slab.g, &slab.u, &slab.state0}) {
      if (!tensor->defined()) continue;
      *tensor = tensor->detach().requires_grad_();
      leaves.push_back(*tensor);
    }
    auto [h, state] = one_slab(slab);
    const int64_t rows = h.size(0);
    const auto found = torch::autograd::grad(
        {h, state}, leaves, {dh.narrow(0, first, rows), dstate.narrow(0, first, rows)},
        /*retain_graph=*/std::nullopt, /*create_graph=*/false, /*allow_unused=*/true);
    size_t next = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const bool absent = (i == 4 && !slab.u.defined()) || (i == 5 && !slab.state0.defined());
      if (!absent) parts[i].push_back(found[next++]);
    }
  });
  std::vector<Tensor> gradients(6);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].empty()) continue;
    gradients[i] = (i == 4 ? at::stack(parts[i]).sum(0) : at::cat(parts[i])).contiguous();
  }
  return gradients;
}

}  // namespace xlstm::ops
