// The sLSTM operators' Autograd, Autocast and Meta kernels, and the C++ function. slstm with gradients runs
// slstm_forward, which also returns the gate activations and state checkpoints that slstm_backward needs; wx itself is
// not kept.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/slstm.h"
#include "csrc/ops/slstm_arguments.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using SlstmOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

SlstmOutputs slstm_op(const SlstmArguments& a) {
  using Signature =
      SlstmOutputs(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("xlstm::slstm", "").typed<Signature>();
  return op.call(a.wx, a.r, a.b, a.y0, a.c0, a.n0, a.m0, a.reset, a.cu_seqlens, a.cell);
}

SlstmResults slstm_forward_op(const SlstmArguments& a) {
  using Signature =
      SlstmResults(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("xlstm::slstm_forward", "").typed<Signature>();
  return op.call(a.wx, a.r, a.b, a.y0, a.c0, a.n0, a.m0, a.reset, a.cu_seqlens, a.cell);
}

struct BackwardArguments {
  OptionalTensor dy, dy_last, dc, dn;
  at::Tensor gates, checkpoints, r;
  OptionalTensor y0, c0, n0, reset, cu_seqlens;
  std::string cell;
  at::ScalarType dtype;
  int64_t gate_dim;
};

SlstmGradients slstm_backward_op(const BackwardArguments& a) {
  using Signature = SlstmGradients(
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      std::string_view, at::ScalarType, int64_t);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::slstm_backward", "")
                             .typed<Signature>();
  return op.call(a.dy, a.dy_last, a.dc, a.dn, a.gates, a.checkpoints, a.r, a.y0, a.c0, a.n0,
                 a.reset, a.cu_seqlens, a.cell, a.dtype, a.gate_dim);
}

at::Tensor or_undefined(const OptionalTensor& t) { return t ? *t : at::Tensor(); }
OptionalTensor or_none(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

struct SlstmFunction : torch::autograd::Function<SlstmFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& wx, const at::Tensor& r,
                               const at::Tensor& b, const OptionalTensor& y0,
                               const OptionalTensor& c0, const OptionalTensor& n0,
                               const OptionalTensor& m0, const OptionalTensor& reset,
                               const OptionalTensor& cu_seqlens, const std::string& cell) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, y_last, c, n, m, gates, checkpoints] =
        slstm_forward_op({wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({gates, checkpoints, r, or_undefined(y0), or_undefined(c0),
                            or_undefined(n0), or_undefined(reset), or_undefined(cu_seqlens)});
    ctx->saved_data["cell"] = cell;
    ctx->saved_data["dtype"] = static_cast<int64_t>(wx.scalar_type());
    ctx->saved_data["b_dtype"] = static_cast<int64_t>(b.scalar_type());
    ctx->saved_data["gate_dim"] = slstm_gate_dim(wx);
    variable_list constant{m, gates, checkpoints};  // y does not depend on m
    if (slstm_cell(cell) == cpu::SlstmCell::kLstm) constant.push_back(n);
    ctx->mark_non_differentiable(constant);
    return {y, y_last, c, n, m, gates, checkpoints};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // The graph of a second derivative would miss the path through the saved gates.
    TORCH_CHECK_NOT_IMPLEMENTED(
        !at::GradMode::is_enabled(),
        "slstm: second derivatives (create_graph=True) are not implemented");
    const variable_list saved = ctx->get_saved_variables();
    BackwardArguments a{or_none(grads[0]),
                        or_none(grads[1]),
                        or_none(grads[2]),
                        or_none(grads[3]),
                        saved[0],
                        saved[1],
                        saved[2],
                        or_none(saved[3]),
                        or_none(saved[4]),
                        or_none(saved[5]),
                        or_none(saved[6]),
                        or_none(saved[7]),
                        ctx->saved_data["cell"].toStringRef(),
                        static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()),
                        ctx->saved_data["gate_dim"].toInt()};
    if (slstm_cell(a.cell) == cpu::SlstmCell::kLstm) a.dn = a.n0 = std::nullopt;
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
            none,
            none,
            none};
  }
};

bool wants_gradient(const SlstmArguments& a) {
  if (!at::GradMode::is_enabled()) return false;
  if (a.wx.requires_grad() || a.r.requires_grad() || a.b.requires_grad()) return true;
  for (const OptionalTensor* state : {&a.y0, &a.c0, &a.n0})
    if (state->has_value() && (*state)->requires_grad()) return true;
  return false;
}

SlstmResults slstm_forward_autograd(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                                    const OptionalTensor& y0, const OptionalTensor& c0,
                                    const OptionalTensor& n0, const OptionalTensor& m0,
                                    const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                                    std::string_view cell) {
  const variable_list out =
      SlstmFunction::apply(wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, std::string(cell));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

SlstmOutputs slstm_autograd(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                            const OptionalTensor& y0, const OptionalTensor& c0,
                            const OptionalTensor& n0, const OptionalTensor& m0,
                            const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                            std::string_view cell) {
  const SlstmArguments a{wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell};
  if (wants_gradient(a)) {
    auto [y, y_last, c, n, m, gates, checkpoints] = slstm_forward_op(a);
    return {y, y_last, c, n, m};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return slstm_op(a);
}

/// The gradients themselves cannot be differentiated: asking for it is an error, not a silent zero.
struct SlstmBackwardFunction : torch::autograd::Function<SlstmBackwardFunction> {
  static variable_list forward(AutogradContext*, const BackwardArguments& a,
                               const at::TensorList&) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dwx, dr, db, dy0, dc0, dn0] = slstm_backward_op(a);
    return {dwx, dr, db, dy0, dc0, dn0};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "slstm: second derivatives are not implemented");
  }
};

SlstmGradients slstm_backward_autograd(const OptionalTensor& dy, const OptionalTensor& dy_last,
                                       const OptionalTensor& dc, const OptionalTensor& dn,
                                       const at::Tensor& gates, const at::Tensor& checkpoints,
                                       const at::Tensor& r, const OptionalTensor& y0,
                                       const OptionalTensor& c0, const OptionalTensor& n0,
                                       const OptionalTensor& reset,
                                       const OptionalTensor& cu_seqlens, std::string_view cell,
                                       at::ScalarType dtype, int64_t gate_dim) {
  const BackwardArguments a{dy,      dy_last, dc, dn,    gates,      checkpoints,       r,
                            y0,      c0,      n0, reset, cu_seqlens, std::string(cell), dtype,
                            gate_dim};
  variable_list differentiable{gates, checkpoints, r};
  for (const OptionalTensor& t : {dy, dy_last, dc, dn, y0, c0, n0})
    if (t) differentiable.push_back(*t);
  const variable_list out = SlstmBackwardFunction::apply(a, at::TensorList(differentiable));
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

/// wx and r in the autocast dtype; b and the states in float32. The kernels compute in float32.
template <c10::DeviceType kDevice>
SlstmOutputs slstm_autocast(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                            const OptionalTensor& y0, const OptionalTensor& c0,
                            const OptionalTensor& n0, const OptionalTensor& m0,
                            const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                            std::string_view cell) {
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  const auto in_full = [](const at::Tensor& t) {
    return at::autocast::cached_cast(at::kFloat, t, kDevice);
  };
  const auto state = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(in_full(*t)) : std::nullopt;
  };
  return slstm_op({at::autocast::cached_cast(type, wx, kDevice),
                   at::autocast::cached_cast(type, r, kDevice), in_full(b), state(y0), state(c0),
                   state(n0), state(m0), reset, cu_seqlens, cell});
}

SlstmOutputs slstm_meta(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                        const OptionalTensor& y0, const OptionalTensor& c0,
                        const OptionalTensor& n0, const OptionalTensor& m0,
                        const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                        std::string_view cell) {
  const SlstmArguments a{wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell};
  check_slstm_arguments(a);
  auto [y, y_last, c, n, m, gates, checkpoints] = empty_slstm_results(a, false);
  return {y, y_last, c, n, m};
}

SlstmResults slstm_forward_meta(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                                const OptionalTensor& y0, const OptionalTensor& c0,
                                const OptionalTensor& n0, const OptionalTensor& m0,
                                const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                                std::string_view cell) {
  const SlstmArguments a{wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell};
  check_slstm_arguments(a);
  return empty_slstm_results(a, true);
}

SlstmGradients slstm_backward_meta(const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&,
                                   const at::Tensor& gates, const at::Tensor&, const at::Tensor& r,
                                   const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor& cu_seqlens, std::string_view,
                                   at::ScalarType dtype, int64_t gate_dim) {
  const c10::SymInt heads = gates.sym_size(1), dh = gates.sym_size(4),
                    states = cu_seqlens ? cu_seqlens->sym_size(0) - 1 : gates.sym_size(0);
  const auto empty = [&](c10::SymIntArrayRef sizes) {
    return at::empty_symint(sizes, gates.options());
  };
  return {empty_slstm_dwx(gates, dtype, gate_dim),
          empty(r.sym_sizes()),
          empty({4, heads, dh}),
          empty({states, heads, dh}),
          empty({states, heads, dh}),
          empty({states, heads, dh})};
}

}  // namespace

SlstmOutputs slstm(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                   const OptionalTensor& y0, const OptionalTensor& c0, const OptionalTensor& n0,
                   const OptionalTensor& m0, const OptionalTensor& reset,
                   const OptionalTensor& cu_seqlens, std::string_view cell) {
  return slstm_op({wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell});
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("slstm", slstm_autograd);
  m.impl("slstm_forward", slstm_forward_autograd);
  m.impl("slstm_backward", slstm_backward_autograd);
}
TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) { m.impl("slstm", slstm_autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  m.impl("slstm", slstm_autocast<c10::DeviceType::CUDA>);
}
TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("slstm", slstm_meta);
  m.impl("slstm_forward", slstm_forward_meta);
  m.impl("slstm_backward", slstm_backward_meta);
}

}  // namespace xlstm::ops
