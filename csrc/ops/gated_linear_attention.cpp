// The operator xlstm::gated_linear_attention: kernels of the CPU and of CUDA with their own backward; where there is none, and
// where a chunk length is given, chunks in ATen calls that the backward pass computes again.
#include "csrc/ops/gated_linear_attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/cpu/gated_linear_attention_params.h"
#include "csrc/ops/cuda_device.h"
#include "csrc/ops/gated_linear_attention_chunks.h"
#include "csrc/ops/rows.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/gated_linear_attention_kernels.h"
#endif

namespace xlstm::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kOp = "gated_linear_attention";
constexpr int64_t kChunk = 16;

/// Everything but the options that are plain numbers.
struct Arguments {
  const Tensor &q, &k, &v, &g;
  const OptionalTensor &u, &state0, &reset;
};

void check_same_device(const Arguments& in) {
  check_devices(kOp, in.q.device(),
                {{"k", in.k},
                 {"v", in.v},
                 {"g", in.g},
                 {"u", in.u},
                 {"state0", in.state0},
                 {"reset", in.reset}});
}

/// Of the backward operator: also the gradients that it is given.
void check_same_device(const OptionalTensor& dh, const OptionalTensor& dstate,
                       const Arguments& in) {
  check_same_device(in);
  check_devices(kOp, in.q.device(), {{"dh", dh}, {"dstate", dstate}});
}

void check(const Arguments& in, int64_t chunk_size) {
  check_same_device(in);
  check_rank(kOp, "q", in.q, 4);
  check_rank(kOp, "v", in.v, 4);
  check_floating(
      kOp,
      {{"q", in.q}, {"k", in.k}, {"v", in.v}, {"g", in.g}, {"u", in.u}, {"state0", in.state0}});
  const int64_t batch = in.q.size(0), time = in.q.size(1), heads = in.q.size(2), dk = in.q.size(3),
                dv = in.v.size(3);
  check_shape(kOp, "k", in.k, in.q.sym_sizes(), "(B,T,NH,DK)");
  check_shape(kOp, "g", in.g, in.q.sym_sizes(), "(B,T,NH,DK)");
  check_shape(kOp, "v", in.v, {batch, time, heads, dv}, "(B,T,NH,DV)");
  if (in.u) check_shape(kOp, "u", *in.u, {heads, dk}, "(NH,DK)");
  if (in.state0) check_shape(kOp, "state0", *in.state0, {batch, heads, dk, dv}, "(B,NH,DK,DV)");
  TORCH_CHECK(chunk_size >= 0, kOp, ": chunk_size: expected 0 or more, got ", chunk_size);
  check_reset(kOp, in.reset, batch, time);
}

void check_backward(const OptionalTensor& dh, const OptionalTensor& dstate, const Arguments& in,
                    int64_t chunk_size) {
  check(in, chunk_size);
  check_same_device(dh, dstate, in);
  if (dh) check_shape(kOp, "dh", *dh, in.v.sym_sizes(), "(B,T,NH,DV)");
  if (dstate)
    check_shape(kOp, "dstate", *dstate, {in.q.size(0), in.q.size(2), in.q.size(3), in.v.size(3)},
                "(B,NH,DK,DV)");
}

/// Finite without keys, too: h is then an empty sum.
double scale_of(const Tensor& q, const std::optional<double>& scale) {
  return scale.value_or(1 / std::sqrt(std::max(1.0, static_cast<double>(q.size(3)))));
}

/// What the kernels read, alive while they run.
struct Inputs {
  at::ScalarType type;
  Tensor q, k, v, g, u, state0, reset;
  explicit Inputs(const Arguments& in)
      : type(accumulate_type(in.q.scalar_type())),
        q(dense(in.q)),
        k(dense(in.k)),
        v(dense(in.v)),
        g(dense(in.g)),
        u(in.u ? dense(*in.u) : Tensor()),
        state0(in.state0 ? dense(*in.state0) : Tensor()),
        reset(in.reset ? in.reset->contiguous() : Tensor()) {}
  Tensor dense(const Tensor& t) const { return t.to(type).contiguous(); }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, q.options()); }
  Tensor empty_state() const { return empty({q.size(0), q.size(2), q.size(3), v.size(3)}); }
  cpu::GatedLinearAttentionParams params(double scale) const {
    cpu::GatedLinearAttentionParams p;
    p.dtype = dtype_code(q, "gated_linear_attention: q");
    p.batch = q.size(0), p.time = q.size(1), p.num_heads = q.size(2);
    p.dk = q.size(3), p.dv = v.size(3), p.scale = scale;
    p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
    p.g = g.const_data_ptr(), p.u = data_or_null(u), p.state0 = data_or_null(state0);
    p.reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
    return p;
  }
  /// Of a sequence that is not empty; what a chunk is longer than it would be padding.
  GatedChunks chunks(double scale, int64_t chunk_size) const {
    const int64_t length = std::min(chunk_size > 0 ? chunk_size : kChunk, q.size(1));
    return {q, k, v, g, u, state0, reset, scale, length};
  }
};

/// Whether the CUDA kernels take a call; logs the answer.
bool use_kernels(const GatedChunks& in, int64_t chunk_size) {
  if (chunk_size > 0 || !in.q.is_cuda()) return false;
  std::string lack = cuda_kernels_lack(in.q.device());
#ifdef XLSTM_CUDA
  if (lack.empty()) lack = gated_linear_attention_kernels_lack(in);
#endif
  return takes_kernels(kOp, lack);
}

Outputs forward_tensors(const GatedChunks& in, int64_t chunk_size) {
  if (!use_kernels(in, chunk_size)) return gated_linear_attention_chunks(in);
#ifdef XLSTM_CUDA
  return gated_linear_attention_kernels(in, current_stream(in.q.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

variable_list backward_tensors(const GatedChunks& in, const Tensor& dh, const Tensor& dstate,
                               int64_t chunk_size) {
  if (!use_kernels(in, chunk_size)) return gated_linear_attention_chunks_backward(in, dh, dstate);
#ifdef XLSTM_CUDA
  return gated_linear_attention_kernels_backward(in, dh, dstate, current_stream(in.q.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

Outputs forward_any(const Arguments& in, std::optional<double> scale, int64_t chunk_size) {
  check(in, chunk_size);
  const Inputs inputs(in);
  if (in.q.numel() == 0 || in.v.numel() == 0) {
    const Tensor state = in.state0 ? inputs.state0.clone() : inputs.empty_state().zero_();
    return {at::zeros(in.v.sizes(), in.v.options()), state};
  }
  auto [h, state] = forward_tensors(inputs.chunks(scale_of(in.q, scale), chunk_size), chunk_size);
  return {h.to(in.v.scalar_type()), state};
}

Outputs forward_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                     const OptionalTensor& u, const OptionalTensor& state0,
                     const OptionalTensor& reset, std::optional<double> scale, int64_t chunk_size) {
  const c10::DeviceGuard guard(q.device());
  return forward_any({q, k, v, g, u, state0, reset}, scale, chunk_size);
}

Outputs forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                    const OptionalTensor& u, const OptionalTensor& state0,
                    const OptionalTensor& reset, std::optional<double> scale, int64_t chunk_size) {
  const Arguments arguments{q, k, v, g, u, state0, reset};
  if (chunk_size > 0) return forward_any(arguments, scale, chunk_size);
  check(arguments, chunk_size);
  const Inputs in(arguments);
  const Tensor h = in.empty(v.sizes()), state = in.empty_state();
  cpu::GatedLinearAttentionParams p = in.params(scale_of(q, scale));
  p.h = h.mutable_data_ptr(), p.state = state.mutable_data_ptr();
  cpu::gated_linear_attention(p);
  return {h.to(v.scalar_type()), state};
}

Gradients cast(const variable_list& d, const Arguments& in) {
  const auto like = [](const Tensor& gradient, const Tensor& t) {
    return gradient.defined() ? gradient.to(t.scalar_type()) : at::zeros(t.sizes(), t.options());
  };
  const Tensor none = at::empty({0}, in.q.options());
  return {like(d[0], in.q),
          like(d[1], in.k),
          like(d[2], in.v),
          like(d[3], in.g),
          in.u ? like(d[4], *in.u) : none,
          in.state0 ? like(d[5], *in.state0) : none};
}

Gradients backward_any(const OptionalTensor& dh, const OptionalTensor& dstate, const Arguments& in,
                       std::optional<double> scale, int64_t chunk_size) {
  const Inputs inputs(in);
  const Tensor gh = dh ? inputs.dense(*dh) : at::zeros(in.v.sizes(), inputs.q.options());
  const Tensor gs = dstate ? inputs.dense(*dstate) : inputs.empty_state().zero_();
  if (in.q.numel() == 0 || in.v.numel() == 0) return cast({{}, {}, {}, {}, {}, gs.clone()}, in);
  return cast(
      backward_tensors(inputs.chunks(scale_of(in.q, scale), chunk_size), gh, gs, chunk_size), in);
}

Gradients backward_cuda(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& g, const OptionalTensor& u,
                        const OptionalTensor& state0, const OptionalTensor& reset,
                        std::optional<double> scale, int64_t chunk_size) {
  const Arguments arguments{q, k, v, g, u, state0, reset};
  check_backward(dh, dstate, arguments, chunk_size);
  const c10::DeviceGuard guard(q.device());
  return backward_any(dh, dstate, arguments, scale, chunk_size);
}

Gradients backward_cpu(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& q,
                       const Tensor& k, const Tensor& v, const Tensor& g, const OptionalTensor& u,
                       const OptionalTensor& state0, const OptionalTensor& reset,
                       std::optional<double> scale, int64_t chunk_size) {
  const Arguments arguments{q, k, v, g, u, state0, reset};
  check_backward(dh, dstate, arguments, chunk_size);
  if (chunk_size > 0) return backward_any(dh, dstate, arguments, scale, chunk_size);
  const Inputs in(arguments);
  const Tensor gh = dh ? in.dense(*dh) : at::zeros(v.sizes(), in.q.options());
  const Tensor gs = dstate ? in.dense(*dstate) : in.empty_state().zero_();
  const Tensor dq = in.empty(q.sizes()), dk = at::empty_like(dq), dg = at::empty_like(dq),
               dv = in.empty(v.sizes()), dstate0 = in.empty_state(), du;
  const Tensor rows = u ? in.empty({q.size(0), q.size(2), q.size(3)}) : Tensor();
  cpu::GatedLinearAttentionParams p = in.params(scale_of(q, scale));
  p.dh = gh.const_data_ptr(), p.dstate = gs.const_data_ptr();
  p.dq = dq.mutable_data_ptr(), p.d_k = dk.mutable_data_ptr(), p.d_v = dv.mutable_data_ptr();
  p.dg = dg.mutable_data_ptr(), p.dstate0 = dstate0.mutable_data_ptr();
  p.du = u ? rows.mutable_data_ptr() : nullptr;
  cpu::gated_linear_attention_backward(p);
  return cast({dq, dk, dv, dg, u ? rows.sum(0) : Tensor(), dstate0}, arguments);
}

Outputs call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
             const OptionalTensor& u, const OptionalTensor& state0, const OptionalTensor& reset,
             std::optional<double> scale, int64_t chunk_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::gated_linear_attention", "")
                             .typed<decltype(call)>();
  return op.call(q, k, v, g, u, state0, reset, scale, chunk_size);
}

Gradients call_backward(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& g, const OptionalTensor& u,
                        const OptionalTensor& state0, const OptionalTensor& reset,
                        std::optional<double> scale, int64_t chunk_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::gated_linear_attention_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(dh, dstate, q, k, v, g, u, state0, reset, scale, chunk_size);
}

class GatedLinearAttention : public torch::autograd::Function<GatedLinearAttention> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& g, const OptionalTensor& u,
                               const OptionalTensor& state0, const OptionalTensor& reset,
                               std::optional<double> scale, int64_t chunk_size) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {q, k, v, g, or_undefined(u), or_undefined(state0), or_undefined(reset)});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["chunk_size"] = chunk_size;
    auto [h, state] = call(q, k, v, g, u, state0, reset, scale, chunk_size);
    return {h, state};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& d) {
    const variable_list s = ctx->get_saved_variables();
    const OptionalTensor u = or_absent(s[4]), state0 = or_absent(s[5]);
    const BelowAutogradUnlessRecording guard;
    auto [dq, dk, dv, dg, du, dstate0] = call_backward(
        or_absent(d[0]), or_absent(d[1]), s[0], s[1], s[2], s[3], u, state0, or_absent(s[6]),
        ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["chunk_size"].toInt());
    const Tensor none;
    return {dq, dk, dv, dg, u ? du : none, state0 ? dstate0 : none, none, none, none};
  }
};

Outputs forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                         const OptionalTensor& u, const OptionalTensor& state0,
                         const OptionalTensor& reset, std::optional<double> scale,
                         int64_t chunk_size) {
  if (recording(q, k, v, g, u, state0)) {
    const variable_list out =
        GatedLinearAttention::apply(q, k, v, g, u, state0, reset, scale, chunk_size);
    return {out[0], out[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call(q, k, v, g, u, state0, reset, scale, chunk_size);
}

Tensor meta_state(const Tensor& q, const Tensor& v) {
  return at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(3), v.sym_size(3)},
                          q.options().dtype(accumulate_type(q.scalar_type())));
}

Outputs forward_meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                     const OptionalTensor& u, const OptionalTensor& state0,
                     const OptionalTensor& reset, std::optional<double>, int64_t) {
  check_same_device({q, k, v, g, u, state0, reset});
  return {at::empty_symint(v.sym_sizes(), v.options()), meta_state(q, v)};
}

Gradients backward_meta(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& g, const OptionalTensor& u,
                        const OptionalTensor& state0, const OptionalTensor& reset,
                        std::optional<double>, int64_t) {
  check_same_device(dh, dstate, {q, k, v, g, u, state0, reset});
  const auto like = [](const Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); };
  const Tensor none = at::empty({0}, q.options());
  return {like(q), like(k), like(v), like(g), u ? like(*u) : none, state0 ? like(*state0) : none};
}

}  // namespace

Outputs gated_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                               const OptionalTensor& u, const OptionalTensor& state0,
                               const GatedLinearAttentionOptions& options) {
  return call(q, k, v, g, u, state0, options.reset, options.scale, options.chunk_size);
}

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("gated_linear_attention", forward_cpu);
  m.impl("gated_linear_attention_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("gated_linear_attention", forward_cuda);
  m.impl("gated_linear_attention_backward", backward_cuda);
}
TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("gated_linear_attention", forward_autograd);
  m.impl("gated_linear_attention_backward", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("gated_linear_attention", forward_meta);
  m.impl("gated_linear_attention_backward", backward_meta);
}

}  // namespace xlstm::ops
