// mLSTM operators: Autograd, Autocast, Meta, and the C++ functions of mlstm.h.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/mlstm.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs call_chunkwise(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& igate, const at::Tensor& fgate, const OptionalTensor& c0,
                       const OptionalTensor& n0, const OptionalTensor& m0,
                       const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                       std::string_view input_gate, bool normalize, std::optional<double> scale,
                       double eps, int64_t chunk_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_chunkwise", "")
                             .typed<decltype(call_chunkwise)>();
  return op.call(q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens, input_gate, normalize, scale,
                 eps, chunk_size);
}

Gradients call_backward(const OptionalTensor& dh, const OptionalTensor& dc,
                        const OptionalTensor& dn, const at::Tensor& q, const at::Tensor& k,
                        const at::Tensor& v, const at::Tensor& igate, const at::Tensor& fgate,
                        const OptionalTensor& c0, const OptionalTensor& n0,
                        const OptionalTensor& m0, const at::Tensor& h, const OptionalTensor& reset,
                        const OptionalTensor& cu_seqlens, std::string_view input_gate,
                        bool normalize, std::optional<double> scale, double eps,
                        int64_t chunk_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_chunkwise_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(dh, dc, dn, q, k, v, igate, fgate, c0, n0, m0, h, reset, cu_seqlens, input_gate,
                 normalize, scale, eps, chunk_size);
}

at::Tensor call_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c, at::Tensor& n,
                     at::Tensor& m, std::string_view input_gate, bool normalize,
                     std::optional<double> scale, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_step", "")
                             .typed<decltype(call_step)>();
  return op.call(q, k, v, igate, fgate, c, n, m, input_gate, normalize, scale, eps);
}

// ---- Autograd -----------------------------------------------------------------------------------------------------

class MlstmChunkwise : public torch::autograd::Function<MlstmChunkwise> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& igate,
                               const at::Tensor& fgate, const OptionalTensor& c0,
                               const OptionalTensor& n0, const OptionalTensor& m0,
                               const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                               const std::string& input_gate, bool normalize,
                               std::optional<double> scale, double eps, int64_t chunk_size) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [h, c, n, m] = call_chunkwise(q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens,
                                             input_gate, normalize, scale, eps, chunk_size);
    ctx->save_for_backward({q, k, v, igate, fgate, or_undefined(c0), or_undefined(n0),
                            or_undefined(m0), h, or_undefined(reset), or_undefined(cu_seqlens)});
    ctx->saved_data["input_gate"] = input_gate;
    ctx->saved_data["normalize"] = normalize;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["chunk_size"] = chunk_size;
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({m});
    return {h, c, n, m};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kInputs = 15;
    variable_list result(kInputs);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&saved](size_t i) { return or_absent(saved[i]); };
    const BelowAutogradUnlessRecording guard;
    auto [dq, dk, dv, digate, dfgate, dc0, dn0] = call_backward(
        or_absent(grads[0]), or_absent(grads[1]), or_absent(grads[2]), saved[0], saved[1], saved[2],
        saved[3], saved[4], optional(5), optional(6), optional(7), saved[8], optional(9),
        optional(10), ctx->saved_data["input_gate"].toStringRef(),
        ctx->saved_data["normalize"].toBool(), ctx->saved_data["scale"].toOptional<double>(),
        ctx->saved_data["eps"].toDouble(), ctx->saved_data["chunk_size"].toInt());
    result[0] = dq;
    result[1] = dk;
    result[2] = dv;
    result[3] = digate;
    result[4] = dfgate;
    if (saved[5].defined()) result[5] = dc0;
    if (saved[6].defined()) result[6] = dn0;
    // The stabiliser is held constant.
    if (saved[7].defined() && saved[7].requires_grad()) result[7] = at::zeros_like(saved[7]);
    return result;
  }
};

Outputs mlstm_chunkwise_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& igate, const at::Tensor& fgate,
                                 const OptionalTensor& c0, const OptionalTensor& n0,
                                 const OptionalTensor& m0, const OptionalTensor& reset,
                                 const OptionalTensor& cu_seqlens, std::string_view input_gate,
                                 bool normalize, std::optional<double> scale, double eps,
                                 int64_t chunk_size) {
  if (!recording(q, k, v, igate, fgate, c0, n0, m0)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_chunkwise(q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens, input_gate,
                          normalize, scale, eps, chunk_size);
  }
  const variable_list out =
      MlstmChunkwise::apply(q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens,
                            std::string(input_gate), normalize, scale, eps, chunk_size);
  return {out[0], out[1], out[2], out[3]};
}

/// One token: h joins the graph, so that a backward pass through it is an error and not a silent zero.
class MlstmStep : public torch::autograd::Function<MlstmStep> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& igate, const at::Tensor& fgate,
                            at::Tensor c, at::Tensor n, at::Tensor m, const std::string& input_gate,
                            bool normalize, std::optional<double> scale, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_step(q, k, v, igate, fgate, c, n, m, input_gate, normalize, scale, eps);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "mlstm_step has no derivative: train with mlstm_chunkwise (T may be 1)");
  }
};

at::Tensor mlstm_step_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                               at::Tensor& n, at::Tensor& m, std::string_view input_gate,
                               bool normalize, std::optional<double> scale, double eps) {
  TORCH_CHECK(!recording(c, n, m),
              "mlstm_step: c, n, m: expected states without gradient, which are written in place");
  at::Tensor h;
  if (recording(q, k, v, igate, fgate)) {
    h = MlstmStep::apply(q, k, v, igate, fgate, c, n, m, std::string(input_gate), normalize, scale,
                         eps);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    h = call_step(q, k, v, igate, fgate, c, n, m, input_gate, normalize, scale, eps);
  }
  // A graph that saved a state sees that it was written.
  for (const at::Tensor& state : {c, n, m})
    if (!state.is_inference()) torch::autograd::impl::bump_version(state);
  return h;
}

// ---- Autocast: q, k, v in the autocast type; gates and states keep full precision ---------------------------------

template <c10::DispatchKey key>
struct Autocast {
  static constexpr c10::DeviceType kDevice =
      key == c10::DispatchKey::AutocastCUDA ? at::kCUDA : at::kCPU;

  static at::Tensor low(const at::Tensor& x) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), x, kDevice);
  }
  static at::Tensor full(const at::Tensor& x) {
    return at::autocast::cached_cast(at::kFloat, x, kDevice);
  }
  static OptionalTensor full(const OptionalTensor& x) {
    return x ? OptionalTensor(full(*x)) : std::nullopt;
  }

  static Outputs chunkwise(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& igate, const at::Tensor& fgate,
                           const OptionalTensor& c0, const OptionalTensor& n0,
                           const OptionalTensor& m0, const OptionalTensor& reset,
                           const OptionalTensor& cu_seqlens, std::string_view input_gate,
                           bool normalize, std::optional<double> scale, double eps,
                           int64_t chunk_size) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return call_chunkwise(low(q), low(k), low(v), full(igate), full(fgate), full(c0), full(n0),
                          full(m0), reset, cu_seqlens, input_gate, normalize, scale, eps,
                          chunk_size);
  }

  static at::Tensor step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                         at::Tensor& n, at::Tensor& m, std::string_view input_gate, bool normalize,
                         std::optional<double> scale, double eps) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return call_step(low(q), low(k), low(v), full(igate), full(fgate), c, n, m, input_gate,
                     normalize, scale, eps);
  }
};

// ---- Meta ---------------------------------------------------------------------------------------------------------

Outputs mlstm_chunkwise_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor& v,
                             const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor& cu_seqlens, std::string_view, bool,
                             std::optional<double>, double, int64_t) {
  check_rank("mlstm_chunkwise", "q", q, 4);
  check_rank("mlstm_chunkwise", "v", v, 4);
  const c10::SymInt count = cu_seqlens ? cu_seqlens->sym_size(0) - 1 : q.sym_size(0);
  const c10::SymInt heads = q.sym_size(2), dqk = q.sym_size(3), dv = v.sym_size(3);
  const at::TensorOptions state = q.options().dtype(accumulate_type(q.scalar_type()));
  return {at::empty_symint({q.sym_size(0), q.sym_size(1), heads, dv}, q.options()),
          at::empty_symint({count, heads, dqk, dv}, state),
          at::empty_symint({count, heads, dqk}, state), at::empty_symint({count, heads}, state)};
}

Gradients mlstm_chunkwise_backward_meta(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& igate, const at::Tensor& fgate,
    const OptionalTensor& c0, const OptionalTensor& n0, const OptionalTensor&, const at::Tensor&,
    const OptionalTensor&, const OptionalTensor&, std::string_view, bool, std::optional<double>,
    double, int64_t) {
  const auto like = [](const at::Tensor& x) {
    return at::empty_symint(x.sym_sizes(), x.options());
  };
  const at::TensorOptions state = q.options().dtype(accumulate_type(q.scalar_type()));
  return {like(q),
          like(k),
          like(v),
          like(igate),
          like(fgate),
          c0 ? like(*c0) : at::empty({0}, state),
          n0 ? like(*n0) : at::empty({0}, state)};
}

at::Tensor mlstm_step_meta(const at::Tensor&, const at::Tensor&, const at::Tensor& v,
                           const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&,
                           at::Tensor&, std::string_view, bool, std::optional<double>, double) {
  return at::empty_symint(v.sym_sizes(), v.options());
}

}  // namespace

Outputs mlstm_chunkwise(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& igate, const at::Tensor& fgate, const OptionalTensor& c0,
                        const OptionalTensor& n0, const OptionalTensor& m0,
                        const MlstmOptions& options) {
  return call_chunkwise(q, k, v, igate, fgate, c0, n0, m0, options.reset, options.cu_seqlens,
                        options.input_gate, options.normalize, options.scale, options.eps,
                        options.chunk_size);
}

at::Tensor mlstm_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                      at::Tensor& n, at::Tensor& m, const MlstmOptions& options) {
  return call_step(q, k, v, igate, fgate, c, n, m, options.input_gate, options.normalize,
                   options.scale, options.eps);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("mlstm_chunkwise", mlstm_chunkwise_autograd);
  m.impl("mlstm_chunkwise_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mlstm_step", mlstm_step_autograd);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) {
  m.impl("mlstm_chunkwise", Autocast<c10::DispatchKey::AutocastCPU>::chunkwise);
  m.impl("mlstm_step", Autocast<c10::DispatchKey::AutocastCPU>::step);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  m.impl("mlstm_chunkwise", Autocast<c10::DispatchKey::AutocastCUDA>::chunkwise);
  m.impl("mlstm_step", Autocast<c10::DispatchKey::AutocastCUDA>::step);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("mlstm_chunkwise", mlstm_chunkwise_meta);
  m.impl("mlstm_chunkwise_backward", mlstm_chunkwise_backward_meta);
  m.impl("mlstm_step", mlstm_step_meta);
}

}  // namespace xlstm::ops
