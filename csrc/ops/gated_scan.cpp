// The operator xlstm::gated_scan: one scan, forwards for h and backwards for its gradients. A CPU kernel; elsewhere log2(T)
// elementwise passes.
#include "csrc/ops/gated_scan.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/cpu/recurrence_params.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "gated_scan";

void check_same_device(const Tensor& x, const Tensor& a, const OptionalTensor& state0,
                       const OptionalTensor& reset) {
  check_devices(kOp, x.device(), {{"a", a}, {"state0", state0}, {"reset", reset}});
}

/// Of the backward operator.
void check_same_device(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& a,
                       const Tensor& h, const OptionalTensor& state0, const OptionalTensor& reset) {
  check_devices(kOp, a.device(),
                {{"h", h}, {"dh", dh}, {"dstate", dstate}, {"state0", state0}, {"reset", reset}});
}

void check(const Tensor& x, const Tensor& a, const OptionalTensor& state0,
           const OptionalTensor& reset) {
  check_same_device(x, a, state0, reset);
  check_rank(kOp, "x", x, 3);
  check_floating(kOp, {{"x", x}, {"a", a}, {"state0", state0}});
  check_shape(kOp, "a", a, x.sym_sizes(), "(B,T,D)");
  if (state0) check_shape(kOp, "state0", *state0, {x.size(0), x.size(2)}, "(B,D)");
  check_reset(kOp, reset, x.size(0), x.size(1));
}

void check_backward(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& a,
                    const Tensor& h, const OptionalTensor& state0, const OptionalTensor& reset) {
  check_same_device(dh, dstate, a, h, state0, reset);
  check(h, a, state0, reset);
  if (dh) check_shape(kOp, "dh", *dh, h.sym_sizes(), "(B,T,D)");
  if (dstate) check_shape(kOp, "dstate", *dstate, {h.size(0), h.size(2)}, "(B,D)");
}

/// See scan_in_passes; float32 or float64.
Tensor scan(const Tensor& x_in, const Tensor& a_in, const OptionalTensor& reset_in, bool reverse) {
  if (!x_in.is_cpu()) return scan_in_passes(x_in, a_in, or_undefined(reset_in), reverse);
  const Tensor x = x_in.contiguous(), a = a_in.contiguous(), h = at::empty(x.sizes(), x.options());
  const Tensor reset = reset_in ? reset_in->contiguous() : Tensor();
  cpu::GatedScanParams p;
  p.dtype = dtype_code(x, "gated_scan: x");
  p.batch = x.size(0), p.time = x.size(1), p.dim = x.size(2), p.reverse = reverse;
  p.x = x.const_data_ptr(), p.a = a.const_data_ptr(), p.h = h.mutable_data_ptr();
  p.reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
  cpu::gated_scan(p);
  return h;
}

/// What enters the first token; zero where absent.
Tensor entering(const OptionalTensor& state0, const Tensor& x, at::ScalarType type) {
  return state0 ? state0->to(type) : at::zeros({x.size(0), x.size(2)}, x.options().dtype(type));
}

/// gate * state (B,D), what passes the first token's gate; a product with zero would let NaN through.
Tensor past_first_gate(const Tensor& gate, const Tensor& state, const OptionalTensor& reset) {
  const Tensor passed = gate * state;
  return reset ? passed.masked_fill(reset->select(1, 0).unsqueeze(-1), 0) : passed;
}

Outputs forward_any(const Tensor& x_in, const Tensor& a_in, const OptionalTensor& state0,
                    const OptionalTensor& reset) {
  check(x_in, a_in, state0, reset);
  const at::ScalarType type = accumulate_type(x_in.scalar_type());
  const Tensor first = entering(state0, x_in, type);
  const int64_t time = x_in.size(1);
  if (time == 0)
    return {at::empty(x_in.sizes(), x_in.options()), first.clone(at::MemoryFormat::Contiguous)};
  Tensor x = x_in.to(type);
  const Tensor a = a_in.to(type);
  if (state0) {
    const Tensor token = x.select(1, 0) + past_first_gate(a.select(1, 0), first, reset);
    x = at::cat({token.unsqueeze(1), x.narrow(1, 1, time - 1)}, 1);
  }
  const Tensor h = scan(x, a, reset, false);
  return {h.to(x_in.scalar_type()), h.select(1, time - 1).clone()};
}

Gradients backward_any(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& a_in,
                       const Tensor& h, const OptionalTensor& state0, const OptionalTensor& reset) {
  check_backward(dh, dstate, a_in, h, state0, reset);
  const at::ScalarType type = accumulate_type(h.scalar_type());
  const Tensor first = entering(state0, h, type);
  const int64_t time = h.size(1);
  const auto options = h.options().dtype(type);
  if (time == 0) {
    const Tensor none = at::empty(h.sizes(), h.options());
    return {none, at::empty(a_in.sizes(), a_in.options()),
            dstate ? dstate->to(type).clone(at::MemoryFormat::Contiguous)
                   : at::zeros(first.sizes(), options)};
  }
  const Tensor a = a_in.to(type);
  Tensor given =
      dh ? dh->to(type, /*non_blocking=*/false, /*copy=*/true) : at::zeros(h.sizes(), options);
  if (dstate) given.select(1, time - 1).add_(*dstate);
  const Tensor dx = scan(given, a, reset, true);
  const Tensor before = at::cat({first.unsqueeze(1), h.narrow(1, 0, time - 1).to(type)}, 1);
  Tensor da = before * dx;
  if (reset) da = da.masked_fill(reset->unsqueeze(-1), 0);
  return {dx.to(h.scalar_type()), da.to(a_in.scalar_type()),
          past_first_gate(a.select(1, 0), dx.select(1, 0), reset).contiguous()};
}

Gradients call_backward(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& a,
                        const Tensor& h, const OptionalTensor& state0,
                        const OptionalTensor& reset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::gated_scan_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(dh, dstate, a, h, state0, reset);
}

class GatedScan : public torch::autograd::Function<GatedScan> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& a,
                               const OptionalTensor& state0, const OptionalTensor& reset) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    auto [h, state] = gated_scan(x, a, state0, reset);
    ctx->save_for_backward({a, h, or_undefined(state0), or_undefined(reset)});
    return {h, state};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& d) {
    const variable_list s = ctx->get_saved_variables();
    const BelowAutogradUnlessRecording guard;
    auto [dx, da, dstate0] = call_backward(or_absent(d[0]), or_absent(d[1]), s[0], s[1],
                                           or_absent(s[2]), or_absent(s[3]));
    const Tensor none;
    return {dx, da, s[2].defined() ? dstate0 : none, none};
  }
};

Outputs forward_autograd(const Tensor& x, const Tensor& a, const OptionalTensor& state0,
                         const OptionalTensor& reset) {
  if (recording(x, a, state0)) {
    const variable_list out = GatedScan::apply(x, a, state0, reset);
    return {out[0], out[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return gated_scan(x, a, state0, reset);
}

Tensor meta_state(const Tensor& x) {
  return at::empty_symint({x.sym_size(0), x.sym_size(2)},
                          x.options().dtype(accumulate_type(x.scalar_type())));
}

Outputs forward_meta(const Tensor& x, const Tensor& a, const OptionalTensor& state0,
                     const OptionalTensor& reset) {
  check_same_device(x, a, state0, reset);
  return {at::empty_symint(x.sym_sizes(), x.options()), meta_state(x)};
}

Gradients backward_meta(const OptionalTensor& dh, const OptionalTensor& dstate, const Tensor& a,
                        const Tensor& h, const OptionalTensor& state0,
                        const OptionalTensor& reset) {
  check_same_device(dh, dstate, a, h, state0, reset);
  return {at::empty_symint(h.sym_sizes(), h.options()),
          at::empty_symint(a.sym_sizes(), a.options()), meta_state(h)};
}

}  // namespace

Outputs gated_scan(const Tensor& x, const Tensor& a, const OptionalTensor& state0,
                   const OptionalTensor& reset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::gated_scan", "")
                             .typed<decltype(gated_scan)>();
  return op.call(x, a, state0, reset);
}

Tensor scan_in_passes(Tensor x, Tensor a, Tensor reset, bool reverse) {
  const int64_t time = x.size(1);
  if (time == 0) return x;
  if (reset.defined()) reset = reset.unsqueeze(-1);
  if (reverse) {
    const auto of_next = [&](const Tensor& t) {
      return at::constant_pad_nd(t.narrow(1, 1, time - 1), {0, 0, 0, 1}).flip(1);
    };
    x = x.flip(1);
    a = of_next(a);
    if (reset.defined()) reset = of_next(reset);
  }
  // After each pass x is h over windows of twice the length, a the product of the gates over the window, reset whether
  // there is one within it.
  for (int64_t step = 1; step < time; step *= 2) {
    const auto before = [&](const Tensor& t) {
      return at::constant_pad_nd(t.narrow(1, 0, time - step), {0, 0, step, 0});
    };
    const Tensor passed = a * before(x);
    x = x + (reset.defined() ? passed.masked_fill(reset, 0) : passed);
    a = a * before(a);
    if (reset.defined()) reset = reset.logical_or(before(reset));
  }
  return reverse ? x.flip(1) : x;
}

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("gated_scan", forward_any);
  m.impl("gated_scan_backward", backward_any);
}
TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("gated_scan", forward_any);
  m.impl("gated_scan_backward", backward_any);
}
TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("gated_scan", forward_autograd);
  m.impl("gated_scan_backward", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("gated_scan", forward_meta);
  m.impl("gated_scan_backward", backward_meta);
}

}  // namespace xlstm::ops
