// The mLSTM operators on the CPU: arguments -> parameters of the kernels in csrc/ops/cpu.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/ops/common.h"
#include "csrc/ops/mlstm_plan.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

cpu::MlstmView view_of(const at::Tensor& tensor, std::string_view name) {
  const bool gate = tensor.dim() == 3;
  return {tensor.data_ptr(),           tensor.stride(0),        tensor.stride(1), tensor.stride(2),
          gate ? 1 : tensor.stride(3), dtype_code(tensor, name)};
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}
const void* data_of(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

/// Threads worth starting: one for calls so small that handing out the work would take longer than doing it.
int64_t useful_threads(const MlstmSizes& sizes) {
  constexpr int64_t kSmall = 1 << 20;  // multiplications: about 10 microseconds
  const int64_t work = sizes.batch * sizes.time * sizes.num_heads * sizes.dqk * sizes.dv;
  return work < kSmall ? 1 : at::get_num_threads();
}

/// Everything but outputs and the gradients. Keeps the arguments' contiguous states alive.
struct Call {
  explicit Call(MlstmArguments arguments)
      : a(std::move(arguments)),
        sizes(check_mlstm_arguments(a)),
        plan(plan_mlstm(a, sizes, useful_threads(sizes))) {
    a.c0 = contiguous(a.c0);
    a.n0 = contiguous(a.n0);
    a.m0 = contiguous(a.m0);
    params.num_threads = useful_threads(sizes);
    params.num_heads = sizes.num_heads;
    params.dqk = sizes.dqk;
    params.dv = sizes.dv;
    params.max_length = plan.max_length;
    params.num_sequences = sizes.num_sequences;
    params.num_chunks = static_cast<int64_t>(plan.chunks.size());
    params.num_parts = static_cast<int64_t>(plan.parts.size());
    params.chunks = plan.chunks.data();
    params.parts = plan.parts.data();
    params.max_part_chunks = plan.max_part_chunks;
    params.span_chunks = plan.span_chunks;
    params.sigmoid_input_gate = is_sigmoid_input_gate("mlstm_chunkwise", a.input_gate);
    params.normalize = a.normalize;
    params.float64 = a.q.scalar_type() == at::kDouble;
    params.scale = mlstm_scale(a.scale, sizes.dqk);
    params.eps = a.eps;
    params.q = view_of(a.q, "q");
    params.k = view_of(a.k, "k");
    params.v = view_of(a.v, "v");
    params.igate = view_of(a.igate, "igate");
    params.fgate = view_of(a.fgate, "fgate");
    params.c0 = data_of(a.c0);
    params.n0 = data_of(a.n0);
    params.m0 = data_of(a.m0);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  at::Tensor empty_state(at::IntArrayRef inner) const {
    std::vector<int64_t> shape{sizes.num_sequences, sizes.num_heads};
    shape.insert(shape.end(), inner.begin(), inner.end());
    return at::empty(shape, a.q.options().dtype(accumulate_type(a.q.scalar_type())));
  }

  MlstmArguments a;
  MlstmSizes sizes;
  MlstmPlan plan;
  cpu::MlstmChunkwiseParams params;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlstm_chunkwise_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& igate,
    const at::Tensor& fgate, const OptionalTensor& c0, const OptionalTensor& n0,
    const OptionalTensor& m0, const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
    std::string_view input_gate, bool normalize, std::optional<double> scale, double eps,
    int64_t chunk_size) {
  Call call({q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens, input_gate, normalize, scale,
             eps, chunk_size});
  const MlstmSizes& sizes = call.sizes;
  const at::Tensor h = at::empty({sizes.batch, sizes.time, sizes.num_heads, sizes.dv}, q.options());
  const at::Tensor c = call.empty_state({sizes.dqk, sizes.dv}), n = call.empty_state({sizes.dqk});
  const at::Tensor m = call.empty_state({});
  call.params.h = view_of(h, "h");
  call.params.c = c.mutable_data_ptr();
  call.params.n = n.mutable_data_ptr();
  call.params.m = m.mutable_data_ptr();
  cpu::mlstm_chunkwise_forward(call.params);
  return {h, c, n, m};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
mlstm_chunkwise_backward_cpu(const OptionalTensor& dh, const OptionalTensor& dc,
                             const OptionalTensor& dn, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const at::Tensor& igate, const at::Tensor& fgate,
                             const OptionalTensor& c0, const OptionalTensor& n0,
                             const OptionalTensor& m0, const at::Tensor& h,
                             const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                             std::string_view input_gate, bool normalize,
                             std::optional<double> scale, double eps, int64_t chunk_size) {
  Call call({q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens, input_gate, normalize, scale,
             eps, chunk_size});
  constexpr std::string_view kOp = "mlstm_chunkwise_backward";
  check_shape(kOp, "h", h, v.sizes(), "(B,T,NH,DV)");
  const at::Tensor dh_or_zero = dh ? *dh : at::zeros({1}, q.options()).expand(v.sizes());
  check_shape(kOp, "dh", dh_or_zero, v.sizes(), "(B,T,NH,DV)");
  // A gradient into one of the states needs both in the kernel.
  OptionalTensor dc_both = contiguous(dc), dn_both = contiguous(dn);
  const at::TensorOptions state_options = q.options().dtype(accumulate_type(q.scalar_type()));
  const MlstmSizes& sizes = call.sizes;
  const at::DimVector c_shape{sizes.num_sequences, sizes.num_heads, sizes.dqk, sizes.dv};
  const at::DimVector n_shape{sizes.num_sequences, sizes.num_heads, sizes.dqk};
  if (dc && !dn) dn_both = at::zeros(n_shape, state_options);
  if (dn && !dc) dc_both = at::zeros(c_shape, state_options);
  if (dc_both) {
    check_shape(kOp, "dc", *dc_both, c_shape, "(B or N,NH,DQK,DV)");
    check_dtype(kOp, "dc", *dc_both, state_options.dtype().toScalarType());
    check_shape(kOp, "dn", *dn_both, n_shape, "(B or N,NH,DQK)");
    check_dtype(kOp, "dn", *dn_both, state_options.dtype().toScalarType());
  }
  const at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  const at::Tensor dv = at::empty(v.sizes(), v.options());
  const at::Tensor digate = at::empty(igate.sizes(), igate.options());
  const at::Tensor dfgate = at::empty(fgate.sizes(), fgate.options());
  const at::Tensor dc0 = c0 ? at::empty(c_shape, state_options) : at::empty({0}, state_options);
  const at::Tensor dn0 = n0 ? at::empty(n_shape, state_options) : at::empty({0}, state_options);
  cpu::MlstmChunkwiseParams& params = call.params;
  params.h = view_of(h, "h");
  params.dh = view_of(dh_or_zero, "dh");
  params.dc = data_of(dc_both);
  params.dn = data_of(dn_both);
  params.dq = view_of(dq, "q");
  params.dk = view_of(dk, "k");
  params.dv_out = view_of(dv, "v");
  params.digate = view_of(digate, "igate");
  params.dfgate = view_of(dfgate, "fgate");
  params.dc0 = c0 ? dc0.mutable_data_ptr() : nullptr;
  params.dn0 = n0 ? dn0.mutable_data_ptr() : nullptr;
  cpu::mlstm_chunkwise_backward(params);
  return {dq, dk, dv, digate, dfgate, dc0, dn0};
}

at::Tensor mlstm_step_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                          at::Tensor& n, at::Tensor& m, std::string_view input_gate, bool normalize,
                          std::optional<double> scale, double eps) {
  const MlstmSizes sizes = check_mlstm_step_arguments(q, k, v, igate, fgate, c, n, m, input_gate);
  const at::ScalarType type = accumulate_type(q.scalar_type());
  const auto plain = [type](const at::Tensor& x) { return x.to(type).contiguous(); };
  const at::Tensor qs = plain(q), ks = plain(k), vs = plain(v), is = plain(igate),
                   fs = plain(fgate);
  const at::Tensor cs = c.contiguous(), ns = n.contiguous(), ms = m.contiguous();
  const at::Tensor h = at::empty(v.sizes(), v.options().dtype(type));
  cpu::MlstmStepParams params;
  params.items = sizes.batch * sizes.num_heads;
  params.dqk = sizes.dqk;
  params.dv = sizes.dv;
  params.sigmoid_input_gate = is_sigmoid_input_gate("mlstm_step", input_gate);
  params.normalize = normalize;
  params.float64 = type == at::kDouble;
  params.scale = mlstm_scale(scale, sizes.dqk);
  params.eps = eps;
  params.q = qs.const_data_ptr();
  params.k = ks.const_data_ptr();
  params.v = vs.const_data_ptr();
  params.igate = is.const_data_ptr();
  params.fgate = fs.const_data_ptr();
  params.c = cs.data_ptr();
  params.n = ns.data_ptr();
  params.m = ms.data_ptr();
  params.h = h.mutable_data_ptr();
  cpu::mlstm_step(params);
  if (!cs.is_same(c)) c.copy_(cs);
  if (!ns.is_same(n)) n.copy_(ns);
  if (!ms.is_same(m)) m.copy_(ms);
  return h.to(v.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("mlstm_chunkwise", mlstm_chunkwise_cpu);
  m.impl("mlstm_chunkwise_backward", mlstm_chunkwise_backward_cpu);
  m.impl("mlstm_step", mlstm_step_cpu);
}

}  // namespace xlstm::ops
