// The mLSTM operators on the CPU: arguments -> parameters of the kernels in csrc/ops/cpu.
#include <ATen/Parallel.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/ops/common.h"
#include "csrc/ops/mlstm_generic.h"
#include "csrc/ops/mlstm_plan.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

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

  MlstmArguments a;
  MlstmSizes sizes;
  MlstmPlan plan;
  cpu::MlstmChunkwiseParams params;
};

/// product is left undefined unless `with_product`.
MlstmResults run_forward(const MlstmArguments& a, bool with_product) {
  Call call(a);
  const auto [h, c, n, m, product] = empty_mlstm_results(a, call.sizes, with_product);
  call.params.h = view_of(h, "h");
  call.params.c = c.mutable_data_ptr();
  call.params.n = n.mutable_data_ptr();
  call.params.m = m.mutable_data_ptr();
  if (with_product) call.params.product = view_of(product, "product");
  if (with_product && !a.normalize) product.zero_();
  cpu::mlstm_chunkwise_forward(call.params);
  return {h, c, n, m, product};
}

MlstmOutputs mlstm_chunkwise_cpu(const MlstmArguments& a) {
  const auto [h, c, n, m, product] = run_forward(a, false);
  return {h, c, n, m};
}

MlstmResults mlstm_chunkwise_forward_cpu(const MlstmArguments& a) { return run_forward(a, true); }

/// Does not read product: the scores are computed again for dv, and their row sums come with them.
MlstmGradients mlstm_chunkwise_backward_cpu(const MlstmBackwardArguments& a) {
  const MlstmSizes sizes = check_mlstm_backward_arguments(a);
  Call call(a.in);
  const at::Tensor dh = a.dh ? *a.dh : at::zeros({1}, a.in.q.options()).expand(a.in.v.sizes());
  const auto [dc, dn] = mlstm_state_gradients(a, sizes);
  const auto [dq, dk, dv, digate, dfgate, dc0, dn0] = empty_mlstm_gradients(a.in, sizes);
  cpu::MlstmChunkwiseParams& params = call.params;
  params.h = view_of(a.h, "h");
  params.dh = view_of(dh, "dh");
  params.dc = data_of(dc);
  params.dn = data_of(dn);
  params.dq = view_of(dq, "q");
  params.dk = view_of(dk, "k");
  params.dv_out = view_of(dv, "v");
  params.digate = view_of(digate, "igate");
  params.dfgate = view_of(dfgate, "fgate");
  params.dc0 = a.in.c0 ? dc0.mutable_data_ptr() : nullptr;
  params.dn0 = a.in.n0 ? dn0.mutable_data_ptr() : nullptr;
  cpu::mlstm_chunkwise_backward(params);
  return {dq, dk, dv, digate, dfgate, dc0, dn0};
}

/// One token's arguments in the dtype of the states, and the states, contiguous; what was copied for that is written back.
class StepTensors {
 public:
  StepTensors(const MlstmStepArguments& a, const MlstmSizes& sizes, std::string_view op,
              cpu::MlstmStepParams& params)
      : a_(a), c_(a.c.contiguous()), n_(a.n.contiguous()), m_(a.m.contiguous()) {
    const at::ScalarType type = accumulate_type(a.q.scalar_type());
    const auto plain = [&](const at::Tensor& x) {
      return inputs_.emplace_back(x.to(type).contiguous()).const_data_ptr();
    };
    h_ = at::empty(a.v.sizes(), a.v.options().dtype(type));
    params.items = sizes.batch * sizes.num_heads;
    params.dqk = sizes.dqk;
    params.dv = sizes.dv;
    params.sigmoid_input_gate = is_sigmoid_input_gate(op, a.input_gate);
    params.normalize = a.normalize;
    params.float64 = type == at::kDouble;
    params.scale = mlstm_scale(a.scale, sizes.dqk);
    params.eps = a.eps;
    params.q = plain(a.q);
    params.k = plain(a.k);
    params.v = plain(a.v);
    params.igate = plain(a.igate);
    params.fgate = plain(a.fgate);
    params.c = c_.data_ptr();
    params.n = n_.data_ptr();
    params.m = m_.data_ptr();
    params.h = h_.mutable_data_ptr();
  }
  /// h in v's dtype.
  at::Tensor finish() const {
    if (!c_.is_same(a_.c)) a_.c.copy_(c_);
    if (!n_.is_same(a_.n)) a_.n.copy_(n_);
    if (!m_.is_same(a_.m)) a_.m.copy_(m_);
    return h_.to(a_.v.scalar_type());
  }

 private:
  const MlstmStepArguments& a_;
  std::vector<at::Tensor> inputs_;
  at::Tensor c_, n_, m_, h_;
};

at::Tensor mlstm_step_cpu(const MlstmStepArguments& a) {
  cpu::MlstmStepParams params;
  const StepTensors tensors(a, check_mlstm_step_arguments(a), a.kName, params);
  cpu::mlstm_step(params);
  return tensors.finish();
}

void check_count(std::string_view op, const MlstmRing& ring) {
  if (ring.count.numel() == 0) return;
  const auto [least, most] = ring.count.aminmax();
  const int64_t last = ring.keys.size(2) - 1;
  TORCH_CHECK(least.item<int32_t>() >= 0 && most.item<int32_t>() <= last, op,
              ": count: expected 0 to R - 1 = ", last, ", got ", least.item<int32_t>(), " to ",
              most.item<int32_t>());
}

at::Tensor mlstm_step_lazy_cpu(const MlstmLazyArguments& a) {
  const MlstmSizes sizes = check_mlstm_lazy_arguments(a);
  check_count(a.kName, a.ring);
  const MlstmRing& ring = a.ring;
  for (const at::Tensor* each : {&ring.keys, &ring.values, &ring.gates, &ring.count})
    if (!each->is_contiguous()) return mlstm_generic_step_lazy(a);
  cpu::MlstmLazyParams params;
  const StepTensors tensors(a, sizes, a.kName, params);
  params.tokens = ring.keys.size(2);
  params.ring_dtype = dtype_code(ring.keys, "mlstm_step_lazy: keys");
  params.keys = ring.keys.data_ptr();
  params.values = ring.values.data_ptr();
  params.gates = ring.gates.data_ptr();
  params.count = ring.count.data_ptr<int32_t>();
  cpu::mlstm_step_lazy(params);
  return tensors.finish();
}

void mlstm_fold_cpu(const MlstmFoldArguments& a) {
  check_mlstm_fold_arguments(a);
  check_count(a.kName, a.ring);
  mlstm_generic_fold(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("mlstm_chunkwise", mlstm_kernel<mlstm_chunkwise_cpu>);
  m.impl("mlstm_chunkwise_forward", mlstm_kernel<mlstm_chunkwise_forward_cpu>);
  m.impl("mlstm_chunkwise_backward", mlstm_backward_kernel<mlstm_chunkwise_backward_cpu>);
  m.impl("mlstm_step", mlstm_step_kernel<mlstm_step_cpu>);
  m.impl("mlstm_step_lazy", mlstm_lazy_kernel<mlstm_step_lazy_cpu>);
  m.impl("mlstm_fold", mlstm_fold_kernel<mlstm_fold_cpu>);
}

}  // namespace xlstm::ops
