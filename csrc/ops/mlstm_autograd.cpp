// mLSTM operators: Autograd, Autocast, Meta, and the C++ functions of mlstm.h. mlstm_chunkwise with gradients runs
// mlstm_chunkwise_forward, which also returns the product that the normaliser is made of.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/mlstm.h"
#include "csrc/ops/mlstm_arguments.h"
#include "csrc/ops/mlstm_autograd.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Handle>
auto call(const Handle& op, const MlstmArguments& a) {
  return op.call(a.q, a.k, a.v, a.igate, a.fgate, a.c0, a.n0, a.m0, a.reset, a.cu_seqlens,
                 a.input_gate, a.normalize, a.scale, a.eps, a.chunk_size);
}

MlstmOutputs chunkwise_op(const MlstmArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_chunkwise", "")
                             .typed<decltype(mlstm_kernel<chunkwise_op>)>();
  return call(op, a);
}

at::Tensor step_op(const MlstmStepArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_step", "")
                             .typed<decltype(mlstm_step_kernel<step_op>)>();
  return op.call(a.q, a.k, a.v, a.igate, a.fgate, a.c, a.n, a.m, a.input_gate, a.normalize, a.scale,
                 a.eps);
}

at::Tensor lazy_op(const MlstmLazyArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_step_lazy", "")
                             .typed<decltype(mlstm_lazy_kernel<lazy_op>)>();
  return op.call(a.q, a.k, a.v, a.igate, a.fgate, a.c, a.n, a.m, a.ring.keys, a.ring.values,
                 a.ring.gates, a.ring.count, a.input_gate, a.normalize, a.scale, a.eps);
}

void fold_op(const MlstmFoldArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_fold", "")
                             .typed<decltype(mlstm_fold_kernel<fold_op>)>();
  op.call(a.c, a.n, a.m, a.ring.keys, a.ring.values, a.ring.gates, a.ring.count, a.input_gate);
}

// ---- Autograd -----------------------------------------------------------------------------------------------------

class MlstmChunkwise : public torch::autograd::Function<MlstmChunkwise> {
 public:
  /// The tensors of `a` that may have gradients, all of it, and the results, of which what has none stays outside the graph
  /// (compiled autograd takes no node that marks outputs as not differentiable).
  static variable_list forward(AutogradContext* ctx, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const MlstmArguments& a, MlstmResults& results) {
    at::AutoDispatchBelowADInplaceOrView guard;
    results = mlstm_forward_op(a);
    const auto& [h, c, n, m, product] = results;
    save_mlstm(ctx, a, h, product);
    ctx->set_materialize_grads(false);
    return {h, c, n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kInputs = 10;
    variable_list result(kInputs);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    const SavedMlstm saved =
        saved_mlstm(ctx);  // may compute it again (checkpointing), which autograd is to see
    const BelowAutogradUnlessRecording guard;
    result = saved.gradients(grads);
    result.resize(kInputs);
    return result;
  }
};

MlstmResults forward_autograd(const MlstmArguments& a) {
  MlstmResults results;
  const variable_list out =
      MlstmChunkwise::apply(a.q, a.k, a.v, a.igate, a.fgate, a.c0, a.n0, a.m0, a, results);
  auto& [h, c, n, m, product] = results;
  h = out[0], c = out[1], n = out[2];
  return results;
}

MlstmOutputs chunkwise_autograd(const MlstmArguments& a) {
  if (recording(a.q, a.k, a.v, a.igate, a.fgate, a.c0, a.n0, a.m0)) {
    const auto [h, c, n, m, product] = mlstm_forward_op(a);
    return {h, c, n, m};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return chunkwise_op(a);
}

/// One token: h joins the graph, so that a backward pass through it is an error and not a silent zero.
template <class Arguments, auto kOp>
class MlstmStep : public torch::autograd::Function<MlstmStep<Arguments, kOp>> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const Arguments& a) {
    const at::AutoDispatchBelowAutograd guard;
    return kOp(a);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, Arguments::kName,
                " has no derivative: train with mlstm_chunkwise (T may be 1)");
  }
};

template <class Arguments>
void check_states_without_gradient(const Arguments& a) {
  TORCH_CHECK(!recording(a.c, a.n, a.m), Arguments::kName,
              ": c, n, m: expected states without gradient, which are written in place");
}

template <class Arguments, auto kOp>
at::Tensor step_autograd(const Arguments& a) {
  check_states_without_gradient(a);
  if (recording(a.q, a.k, a.v, a.igate, a.fgate))
    return MlstmStep<Arguments, kOp>::apply(a.q, a.k, a.v, a.igate, a.fgate, a);
  const at::AutoDispatchBelowAutograd guard;
  return kOp(a);
}

void fold_autograd(const MlstmFoldArguments& a) {
  check_states_without_gradient(a);
  const at::AutoDispatchBelowAutograd guard;
  fold_op(a);
}

at::Tensor step_in_place(const MlstmStepArguments& a) {
  return write_in_place(a.kName, {{"c", a.c}, {"n", a.n}, {"m", a.m}}, [&] { return step_op(a); });
}

at::Tensor lazy_in_place(const MlstmLazyArguments& a) {
  return write_in_place(a.kName,
                        {{"c", a.c},
                         {"n", a.n},
                         {"m", a.m},
                         {"keys", a.ring.keys},
                         {"values", a.ring.values},
                         {"gates", a.ring.gates},
                         {"count", a.ring.count}},
                        [&] { return lazy_op(a); });
}

void fold_in_place(const MlstmFoldArguments& a) {
  write_in_place(a.kName, {{"c", a.c}, {"n", a.n}, {"m", a.m}, {"count", a.ring.count}},
                 [&] { fold_op(a); });
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

  static MlstmArguments cast(MlstmArguments a) {
    for (at::Tensor* x : {&a.q, &a.k, &a.v}) *x = low(*x);
    for (at::Tensor* x : {&a.igate, &a.fgate}) *x = full(*x);
    for (OptionalTensor* x : {&a.c0, &a.n0, &a.m0}) *x = full(*x);
    return a;
  }

  static MlstmOutputs chunkwise(const MlstmArguments& a) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return chunkwise_op(cast(a));
  }

  static MlstmResults forward(const MlstmArguments& a) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return mlstm_forward_op(cast(a));
  }

  /// f of the arguments of a step.
  template <class F>
  static at::Tensor cast_step(const MlstmStepArguments& a, const F& f) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    const at::Tensor q = low(a.q), k = low(a.k), v = low(a.v), igate = full(a.igate),
                     fgate = full(a.fgate);
    return f(MlstmStepArguments{q, k, v, igate, fgate, a.c, a.n, a.m, a.input_gate, a.normalize,
                                a.scale, a.eps});
  }
  static at::Tensor step(const MlstmStepArguments& a) { return cast_step(a, step_op); }
  static at::Tensor lazy(const MlstmLazyArguments& a) {
    return cast_step(a, [&a](const MlstmStepArguments& step) { return lazy_op({step, a.ring}); });
  }

  static void register_in(torch::Library& m) {
    m.impl("mlstm_chunkwise", mlstm_kernel<chunkwise>);
    m.impl("mlstm_chunkwise_forward", mlstm_kernel<forward>);
    m.impl("mlstm_step", mlstm_step_kernel<step>);
    m.impl("mlstm_step_lazy", mlstm_lazy_kernel<lazy>);
  }
};

// ---- Meta ---------------------------------------------------------------------------------------------------------

MlstmResults forward_meta(const MlstmArguments& a) {
  check_mlstm_devices(a);
  check_rank("mlstm_chunkwise", "q", a.q, 4);
  check_rank("mlstm_chunkwise", "v", a.v, 4);
  const c10::SymInt batch = a.q.sym_size(0), time = a.q.sym_size(1), heads = a.q.sym_size(2);
  const c10::SymInt dqk = a.q.sym_size(3), dv = a.v.sym_size(3);
  const c10::SymInt count = a.cu_seqlens ? a.cu_seqlens->sym_size(0) - 1 : batch;
  const at::TensorOptions state = a.q.options().dtype(accumulate_type(a.q.scalar_type()));
  return {at::empty_symint({batch, time, heads, dv}, a.q.options()),
          at::empty_symint({count, heads, dqk, dv}, state),
          at::empty_symint({count, heads, dqk}, state), at::empty_symint({count, heads}, state),
          at::empty_symint({batch, time, heads}, state)};
}

MlstmOutputs chunkwise_meta(const MlstmArguments& a) {
  const auto [h, c, n, m, product] = forward_meta(a);
  return {h, c, n, m};
}

MlstmGradients backward_meta(const MlstmBackwardArguments& a) {
  check_mlstm_devices(a);
  const auto like = [](const at::Tensor& x) {
    return at::empty_symint(x.sym_sizes(), x.options());
  };
  const MlstmArguments& in = a.in;
  const at::TensorOptions state = in.q.options().dtype(accumulate_type(in.q.scalar_type()));
  return {like(in.q),
          like(in.k),
          like(in.v),
          like(in.igate),
          like(in.fgate),
          in.c0 ? like(*in.c0) : at::empty({0}, state),
          in.n0 ? like(*in.n0) : at::empty({0}, state)};
}

template <class Arguments>
at::Tensor step_meta(const Arguments& a) {
  check_mlstm_devices(a);
  return at::empty_symint(a.v.sym_sizes(), a.v.options());
}

void fold_meta(const MlstmFoldArguments& a) { check_mlstm_devices(a); }

}  // namespace

MlstmResults mlstm_forward_op(const MlstmArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_chunkwise_forward", "")
                             .typed<decltype(mlstm_kernel<mlstm_forward_op>)>();
  return call(op, a);
}

MlstmGradients mlstm_backward_op(const MlstmBackwardArguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::mlstm_chunkwise_backward", "")
                             .typed<decltype(mlstm_backward_kernel<mlstm_backward_op>)>();
  const MlstmArguments& in = a.in;
  return op.call(a.dh, a.dc, a.dn, in.q, in.k, in.v, in.igate, in.fgate, in.c0, in.n0, in.m0, a.h,
                 a.product, in.reset, in.cu_seqlens, in.input_gate, in.normalize, in.scale, in.eps,
                 in.chunk_size);
}

void save_mlstm(AutogradContext* ctx, const MlstmArguments& a, const at::Tensor& h,
                const at::Tensor& product, const variable_list& others) {
  variable_list tensors = {a.q,
                           a.k,
                           a.v,
                           a.igate,
                           a.fgate,
                           or_undefined(a.c0),
                           or_undefined(a.n0),
                           or_undefined(a.m0),
                           or_undefined(a.reset),
                           or_undefined(a.cu_seqlens),
                           h,
                           product};
  tensors.insert(tensors.end(), others.begin(), others.end());
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["input_gate"] = std::string(a.input_gate);
  ctx->saved_data["normalize"] = a.normalize;
  ctx->saved_data["scale"] = a.scale;
  ctx->saved_data["eps"] = a.eps;
  ctx->saved_data["chunk_size"] = a.chunk_size;
}

SavedMlstm saved_mlstm(AutogradContext* ctx) {
  const variable_list t = ctx->get_saved_variables();
  const auto optional = [&t](size_t i) { return or_absent(t[i]); };
  auto& options = ctx->saved_data;
  return {{t[0], t[1], t[2], t[3], t[4], optional(5), optional(6), optional(7), optional(8),
           optional(9), options["input_gate"].toStringRef(), options["normalize"].toBool(),
           options["scale"].toOptional<double>(), options["eps"].toDouble(),
           options["chunk_size"].toInt()},
          t[10],
          t[11],
          variable_list(t.begin() + 12, t.end())};
}

variable_list SavedMlstm::gradients(const variable_list& grads) const {
  auto [dq, dk, dv, digate, dfgate, dc0, dn0] = mlstm_backward_op(
      {or_absent(grads[0]), or_absent(grads[1]), or_absent(grads[2]), in, h, product});
  const at::Tensor none;
  // The stabiliser is held constant.
  const at::Tensor dm0 = in.m0 && in.m0->requires_grad() ? at::zeros_like(*in.m0) : none;
  return {dq, dk, dv, digate, dfgate, in.c0 ? dc0 : none, in.n0 ? dn0 : none, dm0};
}

MlstmOutputs mlstm_chunkwise(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& igate, const at::Tensor& fgate,
                             const OptionalTensor& c0, const OptionalTensor& n0,
                             const OptionalTensor& m0, const MlstmOptions& options) {
  return chunkwise_op({q, k, v, igate, fgate, c0, n0, m0, options.reset, options.cu_seqlens,
                       options.input_gate, options.normalize, options.scale, options.eps,
                       options.chunk_size});
}

at::Tensor mlstm_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                      at::Tensor& n, at::Tensor& m, const MlstmOptions& options) {
  return step_op({q, k, v, igate, fgate, c, n, m, options.input_gate, options.normalize,
                  options.scale, options.eps});
}

MlstmRing empty_mlstm_ring(const at::Tensor& k, const at::Tensor& v, int64_t tokens) {
  check_rank("empty_mlstm_ring", "k", k, 3);
  check_rank("empty_mlstm_ring", "v", v, 3);
  const int64_t batch = k.size(0), heads = k.size(1);
  const at::TensorOptions gates = k.options().dtype(accumulate_type(k.scalar_type()));
  return {at::zeros({batch, heads, tokens, k.size(2)}, k.options()),
          at::zeros({batch, heads, tokens, v.size(2)}, v.options()),
          at::zeros({batch, heads, tokens, 2}, gates),
          at::zeros({batch, heads}, k.options().dtype(at::kInt))};
}

at::Tensor mlstm_step_lazy(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                           at::Tensor& n, at::Tensor& m, MlstmRing& ring,
                           const MlstmOptions& options) {
  return lazy_op({{q, k, v, igate, fgate, c, n, m, options.input_gate, options.normalize,
                   options.scale, options.eps},
                  ring});
}

void mlstm_fold(at::Tensor& c, at::Tensor& n, at::Tensor& m, MlstmRing& ring,
                const MlstmOptions& options) {
  fold_op({c, n, m, ring, options.input_gate});
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("mlstm_chunkwise", mlstm_kernel<chunkwise_autograd>);
  m.impl("mlstm_chunkwise_forward", mlstm_kernel<forward_autograd>);
  m.impl("mlstm_chunkwise_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mlstm_step", mlstm_step_kernel<step_autograd<MlstmStepArguments, step_op>>);
  m.impl("mlstm_step_lazy", mlstm_lazy_kernel<step_autograd<MlstmLazyArguments, lazy_op>>);
  m.impl("mlstm_fold", mlstm_fold_kernel<fold_autograd>);
}

TORCH_LIBRARY_IMPL(xlstm, ADInplaceOrView, m) {
  m.impl("mlstm_step", mlstm_step_kernel<step_in_place>);
  m.impl("mlstm_step_lazy", mlstm_lazy_kernel<lazy_in_place>);
  m.impl("mlstm_fold", mlstm_fold_kernel<fold_in_place>);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) {
  Autocast<c10::DispatchKey::AutocastCPU>::register_in(m);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  Autocast<c10::DispatchKey::AutocastCUDA>::register_in(m);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("mlstm_chunkwise", mlstm_kernel<chunkwise_meta>);
  m.impl("mlstm_chunkwise_forward", mlstm_kernel<forward_meta>);
  m.impl("mlstm_chunkwise_backward", mlstm_backward_kernel<backward_meta>);
  m.impl("mlstm_step", mlstm_step_kernel<step_meta<MlstmStepArguments>>);
  m.impl("mlstm_step_lazy", mlstm_lazy_kernel<step_meta<MlstmLazyArguments>>);
  m.impl("mlstm_fold", mlstm_fold_kernel<fold_meta>);
}

}  // namespace xlstm::ops
