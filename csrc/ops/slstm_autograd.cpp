// The sLSTM operators' Autograd, Autocast and Meta kernels, and the C++ function. slstm with gradients runs
// slstm_forward, which also returns the gate activations and state checkpoints that slstm_backward needs. wx itself is
// kept where the gates are computed again, and only there.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/slstm.h"
#include "csrc/ops/slstm_arguments.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

SlstmOutputs slstm_op(const SlstmArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::slstm", "")
                             .typed<decltype(slstm_kernel<slstm_op>)>();
  return op.call(a.wx, a.r, a.b, a.y0, a.c0, a.n0, a.m0, a.reset, a.cu_seqlens, a.cell, a.recompute,
                 a.recurrent_clip, a.recurrent_cut);
}

SlstmResults slstm_forward_op(const SlstmArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::slstm_forward", "")
                             .typed<decltype(slstm_forward_kernel<slstm_forward_op>)>();
  return op.call(a.wx, a.r, a.b, a.y0, a.c0, a.n0, a.m0, a.reset, a.cu_seqlens, a.cell, a.recompute,
                 a.recurrent_clip, a.recurrent_cut, a.preactivations);
}

SlstmGradients slstm_backward_op(const SlstmBackwardArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::slstm_backward", "")
                             .typed<decltype(slstm_backward_kernel<slstm_backward_op>)>();
  return op.call(a.dy, a.dy_last, a.dc, a.dn, a.y, a.gates, a.checkpoints, a.wx, a.r, a.b, a.y0,
                 a.c0, a.n0, a.m0, a.reset, a.cu_seqlens, a.cell, a.recurrent_clip, a.recurrent_cut,
                 a.gate_dim);
}

// ---- Autograd -----------------------------------------------------------------------------------------------------

class SlstmFunction : public torch::autograd::Function<SlstmFunction> {
 public:
  /// The tensors of `a` that may have gradients, all of it, and the results, of which what has none stays outside the graph
  /// (compiled autograd takes no node that marks outputs as not differentiable).
  static variable_list forward(AutogradContext* ctx, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, const SlstmArguments& a,
                               SlstmResults& results) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = slstm_forward_op(a);
    const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
    ctx->set_materialize_grads(false);
    const at::Tensor none;
    ctx->save_for_backward({y, gates, checkpoints, a.recompute ? a.wx : none, a.r,
                            a.recompute ? a.b : none, or_undefined(a.y0), or_undefined(a.c0),
                            or_undefined(a.n0),
                            a.recompute || a.preactivations ? or_undefined(a.m0) : none,
                            or_undefined(a.reset), or_undefined(a.cu_seqlens)});
    ctx->saved_data["cell"] = std::string(a.cell);
    ctx->saved_data["recurrent_clip"] = a.recurrent_clip;
    ctx->saved_data["recurrent_cut"] = a.recurrent_cut;
    ctx->saved_data["b_dtype"] = static_cast<int64_t>(a.b.scalar_type());
    ctx->saved_data["gate_dim"] = slstm_gate_dim(a.wx);
    if (slstm_cell(a.cell) == cpu::SlstmCell::kLstm) return {y, y_last, c};
    return {y, y_last, c, n};  // y does not depend on m
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // The graph of a second derivative would miss the path through the saved gates.
    TORCH_CHECK_NOT_IMPLEMENTED(
        !at::GradMode::is_enabled(),
        "slstm: second derivatives (create_graph=True) are not implemented");
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&saved](size_t i) { return or_absent(saved[i]); };
    SlstmBackwardArguments a{or_absent(grads[0]),
                             or_absent(grads[1]),
                             or_absent(grads[2]),
                             grads.size() > 3 ? or_absent(grads[3]) : std::nullopt,
                             saved[0],
                             saved[1],
                             saved[2],
                             optional(3),
                             saved[4],
                             optional(5),
                             optional(6),
                             optional(7),
                             optional(8),
                             optional(9),
                             optional(10),
                             optional(11),
                             ctx->saved_data["cell"].toStringRef(),
                             ctx->saved_data["recurrent_clip"].toDouble(),
                             ctx->saved_data["recurrent_cut"].toBool(),
                             ctx->saved_data["gate_dim"].toInt()};
    if (slstm_cell(a.cell) == cpu::SlstmCell::kLstm) a.n0 = a.m0 = std::nullopt;
    auto [dwx, dr, db, dy0, dc0, dn0] = slstm_backward_op(a);
    const auto b_dtype = static_cast<at::ScalarType>(ctx->saved_data["b_dtype"].toInt());
    const at::Tensor none;
    return {dwx,
            dr.to(a.r.scalar_type()),
            db.to(b_dtype),
            a.y0 ? dy0 : none,
            a.c0 ? dc0 : none,
            a.n0 ? dn0 : none,
            none,
            none};
  }
};

SlstmResults slstm_forward_autograd(const SlstmArguments& a) {
  SlstmResults results;
  const variable_list out = SlstmFunction::apply(a.wx, a.r, a.b, a.y0, a.c0, a.n0, a, results);
  auto& [y, y_last, c, n, m, gates, checkpoints] = results;
  y = out[0], y_last = out[1], c = out[2];
  if (out.size() > 3) n = out[3];
  return results;
}

SlstmOutputs slstm_autograd(const SlstmArguments& given) {
  SlstmArguments a = given;
  a.preactivations = !a.wx.device().is_cpu();
  if (recording(a.wx, a.r, a.b, a.y0, a.c0, a.n0)) {
    auto [y, y_last, c, n, m, gates, checkpoints] = slstm_forward_op(a);
    return {y, y_last, c, n, m};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return slstm_op(a);
}

/// The gradients themselves cannot be differentiated: asking for it is an error, not a silent zero.
class SlstmBackwardFunction : public torch::autograd::Function<SlstmBackwardFunction> {
 public:
  static variable_list forward(AutogradContext*, const SlstmBackwardArguments& a,
                               const at::TensorList&) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dwx, dr, db, dy0, dc0, dn0] = slstm_backward_op(a);
    return {dwx, dr, db, dy0, dc0, dn0};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "slstm: second derivatives are not implemented");
  }
};

SlstmGradients slstm_backward_autograd(const SlstmBackwardArguments& a) {
  variable_list differentiable{a.y, a.gates, a.checkpoints, a.r};
  for (const OptionalTensor& t : {a.dy, a.dy_last, a.dc, a.dn, a.wx, a.b, a.y0, a.c0, a.n0})
    if (t) differentiable.push_back(*t);
  const variable_list out = SlstmBackwardFunction::apply(a, at::TensorList(differentiable));
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

// ---- Autocast: wx and r in the autocast dtype; b and the states in float32. The kernels compute in float32. --------

template <c10::DeviceType kDevice>
SlstmOutputs slstm_autocast(const SlstmArguments& given) {
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  SlstmArguments a = given;
  for (at::Tensor* t : {&a.wx, &a.r}) *t = at::autocast::cached_cast(type, *t, kDevice);
  a.b = at::autocast::cached_cast(at::kFloat, a.b, kDevice);
  for (OptionalTensor* t : {&a.y0, &a.c0, &a.n0, &a.m0})
    if (*t) *t = at::autocast::cached_cast(at::kFloat, **t, kDevice);
  return slstm_op(a);
}

// ---- Meta ---------------------------------------------------------------------------------------------------------

SlstmOutputs slstm_meta(const SlstmArguments& a) {
  check_slstm_arguments(a);
  auto [y, y_last, c, n, m, gates, checkpoints] = empty_slstm_results(a, false);
  return {y, y_last, c, n, m};
}

SlstmResults slstm_forward_meta(const SlstmArguments& a) {
  check_slstm_arguments(a);
  return empty_slstm_results(a, true);
}

SlstmGradients slstm_backward_meta(const SlstmBackwardArguments& a) {
  check_slstm_backward_arguments(a);
  return empty_slstm_gradients(a);
}

}  // namespace

SlstmOutputs slstm(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                   const OptionalTensor& y0, const OptionalTensor& c0, const OptionalTensor& n0,
                   const OptionalTensor& m0, const SlstmOptions& options) {
  return slstm_op({wx, r, b, y0, c0, n0, m0, options.reset, options.cu_seqlens, options.cell,
                   options.recompute, options.recurrent_clip, options.recurrent_cut});
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("slstm", slstm_kernel<slstm_autograd>);
  m.impl("slstm_forward", slstm_forward_kernel<slstm_forward_autograd>);
  m.impl("slstm_backward", slstm_backward_kernel<slstm_backward_autograd>);
}
TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) {
  m.impl("slstm", slstm_kernel<slstm_autocast<c10::DeviceType::CPU>>);
}
TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  m.impl("slstm", slstm_kernel<slstm_autocast<c10::DeviceType::CUDA>>);
}
TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("slstm", slstm_kernel<slstm_meta>);
  m.impl("slstm_forward", slstm_forward_kernel<slstm_forward_meta>);
  m.impl("slstm_backward", slstm_backward_kernel<slstm_backward_meta>);
}

}  // namespace xlstm::ops
