#include "csrc/ops/mlstm_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "csrc/ops/kernel_tensors.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// (B,NH,D) or, of a gate, (B,NH)
cuda::View token_view_of(const Tensor& x) {
  return {kernel_data(x), x.stride(0), 0, x.stride(1), x.dim() == 3 ? x.stride(2) : 1};
}

/// The kernels read gates in float32, bfloat16 and float16.
Tensor kernel_gate(const Tensor& gate) {
  return gate.scalar_type() == at::kDouble ? gate.to(at::kFloat) : gate;
}

cuda::MlstmProblem problem_of(const MlstmSizes& sizes, at::ScalarType dtype) {
  cuda::MlstmProblem p;
  p.batch = sizes.batch;
  p.time = sizes.time;
  p.num_heads = sizes.num_heads;
  p.dqk = sizes.dqk;
  p.dv = sizes.dv;
  p.num_sequences = sizes.num_sequences;
  p.dtype = kernel_dtype(dtype);
  return p;
}

/// Fields that the arguments of all three calls have.
template <class Arguments>
void set_options(cuda::MlstmProblem& p, const Arguments& a, const Tensor& igate,
                 const Tensor& fgate) {
  p.igate_dtype = kernel_dtype(igate.scalar_type());
  p.fgate_dtype = kernel_dtype(fgate.scalar_type());
  p.sigmoid_input_gate = is_sigmoid_input_gate("mlstm", a.input_gate);
  p.normalize = a.normalize;
  p.scale = static_cast<float>(mlstm_scale(a.scale, p.dqk));
  p.eps = static_cast<float>(a.eps);
}

/// Problem and inputs of a chunkwise call. Keeps alive what had to be copied.
struct Call {
  Call(const MlstmArguments& arguments, const MlstmSizes& sizes)
      : a(arguments), problem(problem_of(sizes, arguments.q.scalar_type())) {
    a.igate = kernel_gate(a.igate);
    a.fgate = kernel_gate(a.fgate);
    a.c0 = contiguous(a.c0);
    a.n0 = contiguous(a.n0);
    a.m0 = contiguous(a.m0);
    a.cu_seqlens = kernel_offsets(a.cu_seqlens, sizes.time);
    set_options(problem, a, a.igate, a.fgate);
    problem.chunk_size = a.chunk_size;
    in.q = view_of(a.q);
    in.k = view_of(a.k);
    in.v = view_of(a.v);
    in.igate = view_of(a.igate);
    in.fgate = view_of(a.fgate);
    in.c0 = floats(a.c0);
    in.n0 = floats(a.n0);
    in.m0 = floats(a.m0);
    set_documents(in, a.reset, a.cu_seqlens);
  }

  /// Scratch memory: given back to torch's allocator at the end of the call, in the order of the stream.
  Tensor workspace(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, a.q.options().dtype(at::kByte));
  }

  MlstmArguments a;
  cuda::MlstmProblem problem;
  cuda::MlstmInputs in;
};

/// A tensor that the kernels write: what is not contiguous they get as a copy, which is written back.
struct Written {
  explicit Written(const Tensor& tensor) : to(tensor), plain(tensor.contiguous()) {}
  void write_back() const {
    if (!plain.is_same(to)) to.copy_(plain);
  }
  const Tensor to, plain;
};

struct States {
  void set(cuda::MlstmStep& step) const {
    step.c = floats(c.plain);
    step.n = floats(n.plain);
    step.m = floats(m.plain);
  }
  void write_back() const {
    for (const Written* x : {&c, &n, &m}) x->write_back();
  }
  const Written c, n, m;
};

/// One token and its states.
struct StepCall {
  StepCall(const MlstmStepArguments& a, const MlstmSizes& sizes)
      : igate(kernel_gate(a.igate)),
        fgate(kernel_gate(a.fgate)),
        states{Written(a.c), Written(a.n), Written(a.m)},
        h(at::empty(a.v.sizes(), a.v.options())),
        problem(problem_of(sizes, a.q.scalar_type())) {
    set_options(problem, a, igate, fgate);
    step.q = token_view_of(a.q);
    step.k = token_view_of(a.k);
    step.v = token_view_of(a.v);
    step.igate = token_view_of(igate);
    step.fgate = token_view_of(fgate);
    step.h = token_view_of(h);
    states.set(step);
  }

  const Tensor igate, fgate;
  const States states;
  const Tensor h;
  cuda::MlstmProblem problem;
  cuda::MlstmStep step;
};

struct Ring {
  explicit Ring(const MlstmRing& tensors)
      : keys(tensors.keys), values(tensors.values), gates(tensors.gates), count(tensors.count) {
    ring.tokens = static_cast<int32_t>(tensors.keys.size(2));
    ring.keys = kernel_data(keys.plain);
    ring.values = kernel_data(values.plain);
    ring.gates = floats(gates.plain);
    ring.count = static_cast<int32_t*>(kernel_data(count.plain));
  }
  void write_back() const {
    for (const Written* x : {&keys, &values, &gates, &count}) x->write_back();
  }

  const Written keys, values, gates, count;
  cuda::MlstmRing ring;
};

}  // namespace

std::string mlstm_kernels_lack(const MlstmSizes& sizes, at::ScalarType dtype,
                               const cuda::DeviceLimits& limits, int64_t ring_tokens) {
  if (dtype == at::kDouble) return "no kernels for float64";
  if (sizes.dv == 0) return "no kernels for values of size 0";
  if (!cuda::mlstm_supported(problem_of(sizes, dtype), limits))
    return "no kernels for compute capability " + std::to_string(limits.compute_capability / 10) +
           "." + std::to_string(limits.compute_capability % 10) + " and these sizes";
  if (ring_tokens > cuda::MlstmRing::kMaxTokens)
    return "no kernels for rings of more than " + std::to_string(cuda::MlstmRing::kMaxTokens) +
           " tokens";
  return "";
}

MlstmResults mlstm_kernels_forward(const MlstmArguments& a, const MlstmSizes& sizes,
                                   const MlstmDevice& device, bool with_product) {
  const Call call(a, sizes);
  const auto [h, c, n, m, product] = empty_mlstm_results(a, sizes, with_product);
  cuda::MlstmForward forward;
  forward.in = call.in;
  forward.h = view_of(h);
  forward.c = floats(c);
  forward.n = floats(n);
  forward.m = floats(m);
  if (with_product) forward.product = floats(product);
  run_kernels("mlstm_chunkwise", [&] {
    const Tensor workspace =
        call.workspace(cuda::mlstm_forward_workspace(call.problem, device.limits));
    cuda::mlstm_forward(call.problem, device.limits, forward, workspace.mutable_data_ptr(),
                        device.stream);
  });
  return {h, c, n, m, product};
}

MlstmGradients mlstm_kernels_backward(const MlstmBackwardArguments& a, const MlstmSizes& sizes,
                                      const MlstmDevice& device) {
  const Call call(a.in, sizes);
  const auto [dq, dk, dv, digate, dfgate, dc0, dn0] = empty_mlstm_gradients(call.a, sizes);
  const auto [dc, dn] = mlstm_state_gradients(a, sizes);
  const Tensor product = a.product.contiguous();
  const Tensor dh = a.dh ? a.dh->to(a.in.q.scalar_type())
                         : at::zeros({1}, a.in.q.options()).expand(a.in.v.sizes());
  cuda::MlstmBackward backward;
  backward.in = call.in;
  backward.h = view_of(a.h);
  backward.product = floats(product);
  backward.dh = view_of(dh);
  backward.dc = floats(dc);
  backward.dn = floats(dn);
  backward.dq = view_of(dq);
  backward.dk = view_of(dk);
  backward.dv = view_of(dv);
  backward.digate = view_of(digate);
  backward.dfgate = view_of(dfgate);
  if (a.in.c0) backward.dc0 = floats(dc0);
  if (a.in.n0) backward.dn0 = floats(dn0);
  run_kernels("mlstm_chunkwise_backward", [&] {
    const Tensor workspace =
        call.workspace(cuda::mlstm_backward_workspace(call.problem, device.limits, backward));
    cuda::mlstm_backward(call.problem, device.limits, backward, workspace.mutable_data_ptr(),
                         device.stream);
  });
  return {dq,  dk, dv, digate.to(a.in.igate.scalar_type()), dfgate.to(a.in.fgate.scalar_type()),
          dc0, dn0};
}

Tensor mlstm_kernels_step(const MlstmStepArguments& a, const MlstmSizes& sizes,
                          const MlstmDevice& device) {
  const StepCall call(a, sizes);
  run_kernels("mlstm_step", [&] { cuda::mlstm_step(call.problem, call.step, device.stream); });
  call.states.write_back();
  return call.h;
}

Tensor mlstm_kernels_step_lazy(const MlstmLazyArguments& a, const MlstmSizes& sizes,
                               const MlstmDevice& device) {
  const StepCall call(a, sizes);
  const Ring ring(a.ring);
  run_kernels("mlstm_step_lazy",
              [&] { cuda::mlstm_step_lazy(call.problem, call.step, ring.ring, device.stream); });
  call.states.write_back();
  ring.write_back();
  return call.h;
}

void mlstm_kernels_fold(const MlstmFoldArguments& a, const MlstmSizes& sizes,
                        const MlstmDevice& device) {
  cuda::MlstmProblem problem = problem_of(sizes, a.ring.keys.scalar_type());
  problem.sigmoid_input_gate = is_sigmoid_input_gate(a.kName, a.input_gate);
  const States states{Written(a.c), Written(a.n), Written(a.m)};
  const Ring ring(a.ring);
  cuda::MlstmStep step;
  states.set(step);
  run_kernels("mlstm_fold", [&] { cuda::mlstm_fold(problem, step, ring.ring, device.stream); });
  states.write_back();
  ring.count.write_back();
}

}  // namespace xlstm::ops
