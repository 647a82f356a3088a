// The operator xlstm::wkv: CPU kernels with their own backward; elsewhere both in ATen calls, block by block.
#include "csrc/ops/wkv.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <functional>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/cpu/recurrence_params.h"
#include "csrc/ops/rows.h"
#include "csrc/ops/wkv_generic.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kOp = "wkv";

void check_same_device(const WkvArguments& in) {
  check_devices(kOp, in.k.device(),
                {{"v", in.v},
                 {"w", in.w},
                 {"u", in.u},
                 {"a0", in.a0},
                 {"b0", in.b0},
                 {"p0", in.p0},
                 {"reset", in.reset}});
}

/// Of the backward operator: also the gradients that it is given.
void check_same_device(const OptionalTensor& dy, const OptionalTensor& da, const OptionalTensor& db,
                       const WkvArguments& in) {
  check_same_device(in);
  check_devices(kOp, in.k.device(), {{"dy", dy}, {"da", da}, {"db", db}});
}

void check(const WkvArguments& in) {
  check_same_device(in);
  check_rank(kOp, "k", in.k, 3);
  check_floating(kOp, {{"k", in.k},
                       {"v", in.v},
                       {"w", in.w},
                       {"u", in.u},
                       {"a0", in.a0},
                       {"b0", in.b0},
                       {"p0", in.p0}});
  const int64_t batch = in.k.size(0), time = in.k.size(1), dim = in.k.size(2);
  check_shape(kOp, "v", in.v, in.k.sym_sizes(), "(B,T,D)");
  check_shape(kOp, "w", in.w, {dim}, "(D)");
  check_shape(kOp, "u", in.u, {dim}, "(D)");
  TORCH_CHECK(in.a0.has_value() == in.b0.has_value() && in.a0.has_value() == in.p0.has_value(), kOp,
              ": a0, b0 and p0 come together");
  for (const auto* state : {&in.a0, &in.b0, &in.p0})
    if (*state) check_shape(kOp, "a0, b0, p0", **state, {batch, dim}, "(B,D)");
  check_reset(kOp, in.reset, batch, time);
}

void check_backward(const OptionalTensor& dy, const OptionalTensor& da, const OptionalTensor& db,
                    const WkvArguments& in) {
  check(in);
  check_same_device(dy, da, db, in);
  if (dy) check_shape(kOp, "dy", *dy, in.k.sym_sizes(), "(B,T,D)");
  for (const auto& [name, state] : {std::pair("da", da), std::pair("db", db)})
    if (state) check_shape(kOp, name, *state, {in.k.size(0), in.k.size(2)}, "(B,D)");
}

/// What the kernels read, alive while they run.
struct Inputs {
  at::ScalarType type;
  at::Tensor k, v, w, u, a0, b0, p0, reset;
  Inputs(const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& w_, const at::Tensor& u_,
         const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& p,
         const OptionalTensor& r)
      : type(accumulate_type(k_.scalar_type())),
        k(dense(k_)),
        v(dense(v_)),
        w(dense(w_)),
        u(dense(u_)),
        a0(a ? dense(*a) : at::Tensor()),
        b0(b ? dense(*b) : at::Tensor()),
        p0(p ? dense(*p) : at::Tensor()),
        reset(r ? r->contiguous() : at::Tensor()) {}
  at::Tensor dense(const at::Tensor& t) const { return t.to(type).contiguous(); }
  cpu::WkvParams params() const {
    cpu::WkvParams p;
    p.dtype = dtype_code(k, "wkv: k");
    p.batch = k.size(0), p.time = k.size(1), p.dim = k.size(2);
    p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
    p.w = w.const_data_ptr(), p.u = u.const_data_ptr();
    p.a0 = data_or_null(a0), p.b0 = data_or_null(b0), p.p0 = data_or_null(p0);
    p.reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
    return p;
  }
  at::Tensor state() const { return at::empty({k.size(0), k.size(2)}, k.options()); }
};

Outputs wkv_cpu(const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
                const OptionalTensor& a0, const OptionalTensor& b0, const OptionalTensor& p0,
                const OptionalTensor& reset) {
  check({k, v, w, u, a0, b0, p0, reset});
  const Inputs in(k, v, w, u, a0, b0, p0, reset);
  const at::Tensor y = at::empty(k.sizes(), in.k.options());
  const at::Tensor a = in.state(), b = in.state(), p = in.state();
  cpu::WkvParams params = in.params();
  params.y = y.mutable_data_ptr();
  params.a = a.mutable_data_ptr(), params.b = b.mutable_data_ptr(), params.p = p.mutable_data_ptr();
  cpu::wkv(params);
  return {y.to(k.scalar_type()), a, b, p};
}

Gradients wkv_backward_cpu(const OptionalTensor& dy, const OptionalTensor& da,
                           const OptionalTensor& db, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& w, const at::Tensor& u, const OptionalTensor& a0,
                           const OptionalTensor& b0, const OptionalTensor& p0,
                           const OptionalTensor& reset) {
  check_backward(dy, da, db, {k, v, w, u, a0, b0, p0, reset});
  const Inputs in(k, v, w, u, a0, b0, p0, reset);
  const auto given = [&](const OptionalTensor& t, const at::Tensor& like) {
    return t ? in.dense(*t) : at::zeros(like.sizes(), in.k.options());
  };
  const at::Tensor dk = at::empty(k.sizes(), in.k.options()), dv = at::empty_like(dk);
  const at::Tensor da0 = in.state(), db0 = in.state(), dw = in.state(), du = in.state();
  const at::Tensor gy = given(dy, dk), ga = given(da, da0), gb = given(db, db0);
  cpu::WkvParams p = in.params();
  p.dy = gy.const_data_ptr(), p.da = ga.const_data_ptr(), p.db = gb.const_data_ptr();
  p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.da0 = da0.mutable_data_ptr(), p.db0 = db0.mutable_data_ptr();
  p.dw = dw.mutable_data_ptr(), p.du = du.mutable_data_ptr();
  cpu::wkv_backward(p);
  return {dk.to(k.scalar_type()),
          dv.to(v.scalar_type()),
          dw.sum(0).to(w.scalar_type()),
          du.sum(0).to(u.scalar_type()),
          da0,
          db0};
}

Outputs wkv_any(const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
                const OptionalTensor& a0, const OptionalTensor& b0, const OptionalTensor& p0,
                const OptionalTensor& reset) {
  const WkvArguments in{k, v, w, u, a0, b0, p0, reset};
  check(in);
  return wkv_generic(in);
}

Gradients wkv_backward_any(const OptionalTensor& dy, const OptionalTensor& da,
                           const OptionalTensor& db, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& w, const at::Tensor& u, const OptionalTensor& a0,
                           const OptionalTensor& b0, const OptionalTensor& p0,
                           const OptionalTensor& reset) {
  const WkvArguments in{k, v, w, u, a0, b0, p0, reset};
  check_backward(dy, da, db, in);
  return wkv_generic_backward(dy, da, db, in);
}

Gradients wkv_backward_op(const OptionalTensor& dy, const OptionalTensor& da,
                          const OptionalTensor& db, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& w, const at::Tensor& u, const OptionalTensor& a0,
                          const OptionalTensor& b0, const OptionalTensor& p0,
                          const OptionalTensor& reset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::wkv_backward", "")
                             .typed<decltype(wkv_backward_op)>();
  return op.call(dy, da, db, k, v, w, u, a0, b0, p0, reset);
}

class Wkv : public torch::autograd::Function<Wkv> {
 public:
  /// final_p has no gradient and stays outside the graph: compiled autograd takes no node that marks outputs as not
  /// differentiable.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& w, const at::Tensor& u, const OptionalTensor& a0,
                               const OptionalTensor& b0, const OptionalTensor& p0,
                               const OptionalTensor& reset,
                               std::reference_wrapper<at::Tensor> final_p) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {k, v, w, u, or_undefined(a0), or_undefined(b0), or_undefined(p0), or_undefined(reset)});
    auto [y, a, b, p] = wkv(k, v, w, u, a0, b0, p0, reset);
    final_p.get() = p;
    return {y, a, b};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& d) {
    const variable_list s = ctx->get_saved_variables();
    const BelowAutogradUnlessRecording guard;
    auto [dk, dv, dw, du, da0, db0] =
        wkv_backward_op(or_absent(d[0]), or_absent(d[1]), or_absent(d[2]), s[0], s[1], s[2], s[3],
                        or_absent(s[4]), or_absent(s[5]), or_absent(s[6]), or_absent(s[7]));
    const at::Tensor none;
    return {dk,   dv,   dw,  du, s[4].defined() ? da0 : none, s[5].defined() ? db0 : none,
            none, none, none};
  }
};

Outputs wkv_autograd(const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                     const at::Tensor& u, const OptionalTensor& a0, const OptionalTensor& b0,
                     const OptionalTensor& p0, const OptionalTensor& reset) {
  if (recording(k, v, w, u, a0, b0)) {
    at::Tensor p;
    const variable_list out = Wkv::apply(k, v, w, u, a0, b0, p0, reset, std::ref(p));
    return {out[0], out[1], out[2], p};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return wkv(k, v, w, u, a0, b0, p0, reset);
}

at::Tensor meta_state(const at::Tensor& k) {
  return at::empty_symint({k.sym_size(0), k.sym_size(2)},
                          k.options().dtype(accumulate_type(k.scalar_type())));
}

Outputs wkv_meta(const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
                 const OptionalTensor& a0, const OptionalTensor& b0, const OptionalTensor& p0,
                 const OptionalTensor& reset) {
  check_same_device({k, v, w, u, a0, b0, p0, reset});
  return {at::empty_symint(k.sym_sizes(), k.options()), meta_state(k), meta_state(k),
          meta_state(k)};
}

Gradients wkv_backward_meta(const OptionalTensor& dy, const OptionalTensor& da,
                            const OptionalTensor& db, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& w, const at::Tensor& u, const OptionalTensor& a0,
                            const OptionalTensor& b0, const OptionalTensor& p0,
                            const OptionalTensor& reset) {
  check_same_device(dy, da, db, {k, v, w, u, a0, b0, p0, reset});
  const auto like = [](const at::Tensor& t) {
    return at::empty_symint(t.sym_sizes(), t.options());
  };
  return {like(k), like(v), like(w), like(u), meta_state(k), meta_state(k)};
}

}  // namespace

Outputs wkv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
            const OptionalTensor& a0, const OptionalTensor& b0, const OptionalTensor& p0,
            const OptionalTensor& reset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("xlstm::wkv", "").typed<decltype(wkv)>();
  return op.call(k, v, w, u, a0, b0, p0, reset);
}

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("wkv", wkv_cpu);
  m.impl("wkv_backward", wkv_backward_cpu);
}
TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("wkv", wkv_any);
  m.impl("wkv_backward", wkv_backward_any);
}
TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("wkv", wkv_autograd);
  m.impl("wkv_backward", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("wkv", wkv_meta);
  m.impl("wkv_backward", wkv_backward_meta);
}

}  // namespace xlstm::ops
