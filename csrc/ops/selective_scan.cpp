// The operator xlstm::selective_scan: CPU kernels with their own backward; elsewhere both in ATen calls, block by block.
#include "csrc/ops/selective_scan.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/cpu/recurrence_params.h"
#include "csrc/ops/rows.h"
#include "csrc/ops/selective_scan_generic.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor>;  // dx, ddelta, da, db, dc, dskip, dstate0

using Arguments = SelectiveScanArguments;

constexpr std::string_view kOp = "selective_scan";

void check_same_device(const Arguments& in) {
  check_devices(kOp, in.x.device(),
                {{"delta", in.delta},
                 {"a", in.a},
                 {"b", in.b},
                 {"c", in.c},
                 {"skip", in.skip},
                 {"state0", in.state0},
                 {"reset", in.reset}});
}

/// Of the backward operator: also the gradients that it is given.
void check_same_device(const OptionalTensor& dy, const OptionalTensor& dstate,
                       const Arguments& in) {
  check_same_device(in);
  check_devices(kOp, in.x.device(), {{"dy", dy}, {"dstate", dstate}});
}

void check(const Arguments& in) {
  check_same_device(in);
  check_rank(kOp, "x", in.x, 3);
  check_floating(kOp, {{"x", in.x},
                       {"delta", in.delta},
                       {"a", in.a},
                       {"b", in.b},
                       {"c", in.c},
                       {"skip", in.skip},
                       {"state0", in.state0}});
  check_rank(kOp, "a", in.a, 2);
  const int64_t batch = in.x.size(0), time = in.x.size(1), dim = in.x.size(2),
                states = in.a.size(1);
  check_shape(kOp, "delta", in.delta, in.x.sym_sizes(), "(B,T,D)");
  check_shape(kOp, "a", in.a, {dim, states}, "(D,N)");
  check_shape(kOp, "b", in.b, {batch, time, states}, "(B,T,N)");
  check_shape(kOp, "c", in.c, {batch, time, states}, "(B,T,N)");
  check_shape(kOp, "skip", in.skip, {dim}, "(D)");
  if (in.state0) check_shape(kOp, "state0", *in.state0, {batch, dim, states}, "(B,D,N)");
  check_reset(kOp, in.reset, batch, time);
}

void check_backward(const OptionalTensor& dy, const OptionalTensor& dstate, const Arguments& in) {
  check(in);
  check_same_device(dy, dstate, in);
  if (dy) check_shape(kOp, "dy", *dy, in.x.sym_sizes(), "(B,T,D)");
  if (dstate)
    check_shape(kOp, "dstate", *dstate, {in.x.size(0), in.x.size(2), in.a.size(1)}, "(B,D,N)");
}

/// What the kernels read, alive while they run: a and the state with the channels innermost.
struct Inputs {
  at::ScalarType type;
  at::Tensor x, delta, a, b, c, skip, state0, reset;
  explicit Inputs(const Arguments& in)
      : type(accumulate_type(in.x.scalar_type())),
        x(dense(in.x)),
        delta(dense(in.delta)),
        a(dense(in.a.t())),
        b(dense(in.b)),
        c(dense(in.c)),
        skip(dense(in.skip)),
        state0(in.state0 ? dense(in.state0->transpose(1, 2)) : at::Tensor()),
        reset(in.reset ? in.reset->contiguous() : at::Tensor()) {}
  at::Tensor dense(const at::Tensor& t) const { return t.to(type).contiguous(); }
  at::Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, x.options()); }
  cpu::SelectiveScanParams params() const {
    cpu::SelectiveScanParams p;
    p.dtype = dtype_code(x, "selective_scan: x");
    p.batch = x.size(0), p.time = x.size(1), p.dim = x.size(2), p.states = a.size(0);
    p.x = x.const_data_ptr(), p.delta = delta.const_data_ptr(), p.a = a.const_data_ptr();
    p.b = b.const_data_ptr(), p.c = c.const_data_ptr(), p.skip = skip.const_data_ptr();
    p.state0 = data_or_null(state0);
    p.reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
    return p;
  }
};

Outputs selective_scan_cpu(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& a,
                           const at::Tensor& b, const at::Tensor& c, const at::Tensor& skip,
                           const OptionalTensor& state0, const OptionalTensor& reset) {
  const Arguments arguments{x, delta, a, b, c, skip, state0, reset};
  check(arguments);
  const Inputs in(arguments);
  cpu::SelectiveScanParams p = in.params();
  const at::Tensor y = in.empty(x.sizes()), state = in.empty({p.batch, p.states, p.dim});
  p.y = y.mutable_data_ptr(), p.state = state.mutable_data_ptr();
  cpu::selective_scan(p);
  return {y.to(x.scalar_type()), state.transpose(1, 2).contiguous()};
}

Gradients selective_scan_backward_cpu(const OptionalTensor& dy, const OptionalTensor& dstate,
                                      const at::Tensor& x, const at::Tensor& delta,
                                      const at::Tensor& a, const at::Tensor& b, const at::Tensor& c,
                                      const at::Tensor& skip, const OptionalTensor& state0,
                                      const OptionalTensor& reset) {
  constexpr int64_t kMostTasks = 16, kChannels = 64;  // per row: of memory for the sums of b and c
  const Arguments arguments{x, delta, a, b, c, skip, state0, reset};
  check_backward(dy, dstate, arguments);
  const Inputs in(arguments);
  cpu::SelectiveScanParams p = in.params();
  const auto ceil_div = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  p.block = std::max<int64_t>(kChannels * ceil_div(p.dim, kChannels * kMostTasks), 1);
  const int64_t blocks = ceil_div(p.dim, p.block);
  const at::Tensor gy = dy ? in.dense(*dy) : at::zeros(x.sizes(), in.x.options());
  const at::Tensor gstate = dstate ? in.dense(dstate->transpose(1, 2)) : at::Tensor();
  const at::Tensor dx = in.empty(x.sizes()), ddelta = in.empty(x.sizes());
  const at::Tensor da = in.empty({p.batch, p.states, p.dim}), dskip = in.empty({p.batch, p.dim});
  const at::Tensor db = in.empty({blocks, p.batch, p.time, p.states}), dc = at::empty_like(db);
  const at::Tensor dstate0 = at::empty_like(da);
  p.dy = gy.const_data_ptr(), p.dstate = data_or_null(gstate);
  p.dx = dx.mutable_data_ptr(), p.ddelta = ddelta.mutable_data_ptr();
  p.da = da.mutable_data_ptr(), p.dskip = dskip.mutable_data_ptr();
  p.db = db.mutable_data_ptr(), p.dc = dc.mutable_data_ptr();
  p.dstate0 = dstate0.mutable_data_ptr();
  cpu::selective_scan_backward(p);
  return {dx.to(x.scalar_type()),
          ddelta.to(delta.scalar_type()),
          da.sum(0).t().to(a.scalar_type()).contiguous(),
          db.sum(0).to(b.scalar_type()),
          dc.sum(0).to(c.scalar_type()),
          dskip.sum(0).to(skip.scalar_type()),
          dstate0.transpose(1, 2).contiguous()};
}

Outputs selective_scan_any(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& a,
                           const at::Tensor& b, const at::Tensor& c, const at::Tensor& skip,
                           const OptionalTensor& state0, const OptionalTensor& reset) {
  const Arguments arguments{x, delta, a, b, c, skip, state0, reset};
  check(arguments);
  return selective_scan_generic(arguments);
}

Gradients selective_scan_backward_any(const OptionalTensor& dy, const OptionalTensor& dstate,
                                      const at::Tensor& x, const at::Tensor& delta,
                                      const at::Tensor& a, const at::Tensor& b, const at::Tensor& c,
                                      const at::Tensor& skip, const OptionalTensor& state0,
                                      const OptionalTensor& reset) {
  const Arguments arguments{x, delta, a, b, c, skip, state0, reset};
  check_backward(dy, dstate, arguments);
  return selective_scan_generic_backward(dy, dstate, arguments);
}

Gradients selective_scan_backward_op(const OptionalTensor& dy, const OptionalTensor& dstate,
                                     const at::Tensor& x, const at::Tensor& delta,
                                     const at::Tensor& a, const at::Tensor& b, const at::Tensor& c,
                                     const at::Tensor& skip, const OptionalTensor& state0,
                                     const OptionalTensor& reset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::selective_scan_backward", "")
                             .typed<decltype(selective_scan_backward_op)>();
  return op.call(dy, dstate, x, delta, a, b, c, skip, state0, reset);
}

class SelectiveScan : public torch::autograd::Function<SelectiveScan> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& delta,
                               const at::Tensor& a, const at::Tensor& b, const at::Tensor& c,
                               const at::Tensor& skip, const OptionalTensor& state0,
                               const OptionalTensor& reset) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, delta, a, b, c, skip, or_undefined(state0), or_undefined(reset)});
    auto [y, state] = selective_scan(x, delta, a, b, c, skip, state0, reset);
    return {y, state};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& d) {
    const variable_list s = ctx->get_saved_variables();
    const BelowAutogradUnlessRecording guard;
    auto [dx, ddelta, da, db, dc, dskip, dstate0] =
        selective_scan_backward_op(or_absent(d[0]), or_absent(d[1]), s[0], s[1], s[2], s[3], s[4],
                                   s[5], or_absent(s[6]), or_absent(s[7]));
    const at::Tensor none;
    return {dx, ddelta, da, db, dc, dskip, s[6].defined() ? dstate0 : none, none};
  }
};

Outputs selective_scan_autograd(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& a,
                                const at::Tensor& b, const at::Tensor& c, const at::Tensor& skip,
                                const OptionalTensor& state0, const OptionalTensor& reset) {
  if (recording(x, delta, a, b, c, skip, state0)) {
    const variable_list out = SelectiveScan::apply(x, delta, a, b, c, skip, state0, reset);
    return {out[0], out[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return selective_scan(x, delta, a, b, c, skip, state0, reset);
}

at::Tensor meta_state(const at::Tensor& x, const at::Tensor& a) {
  return at::empty_symint({x.sym_size(0), x.sym_size(2), a.sym_size(1)},
                          x.options().dtype(accumulate_type(x.scalar_type())));
}

Outputs selective_scan_meta(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& a,
                            const at::Tensor& b, const at::Tensor& c, const at::Tensor& skip,
                            const OptionalTensor& state0, const OptionalTensor& reset) {
  check_same_device({x, delta, a, b, c, skip, state0, reset});
  return {at::empty_symint(x.sym_sizes(), x.options()), meta_state(x, a)};
}

Gradients selective_scan_backward_meta(const OptionalTensor& dy, const OptionalTensor& dstate,
                                       const at::Tensor& x, const at::Tensor& delta,
                                       const at::Tensor& a, const at::Tensor& b,
                                       const at::Tensor& c, const at::Tensor& skip,
                                       const OptionalTensor& state0, const OptionalTensor& reset) {
  check_same_device(dy, dstate, {x, delta, a, b, c, skip, state0, reset});
  const auto like = [](const at::Tensor& t) {
    return at::empty_symint(t.sym_sizes(), t.options());
  };
  return {like(x), like(delta), like(a), like(b), like(c), like(skip), meta_state(x, a)};
}

}  // namespace

Outputs selective_scan(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& a,
                       const at::Tensor& b, const at::Tensor& c, const at::Tensor& skip,
                       const OptionalTensor& state0, const OptionalTensor& reset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::selective_scan", "")
                             .typed<decltype(selective_scan)>();
  return op.call(x, delta, a, b, c, skip, state0, reset);
}

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("selective_scan", selective_scan_cpu);
  m.impl("selective_scan_backward", selective_scan_backward_cpu);
}
TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("selective_scan", selective_scan_any);
  m.impl("selective_scan_backward", selective_scan_backward_any);
}
TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("selective_scan", selective_scan_autograd);
  m.impl("selective_scan_backward", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("selective_scan", selective_scan_meta);
  m.impl("selective_scan_backward", selective_scan_backward_meta);
}

}  // namespace xlstm::ops
