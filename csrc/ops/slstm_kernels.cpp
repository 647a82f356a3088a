#include "csrc/ops/slstm_kernels.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "csrc/ops/full_precision.h"
#include "csrc/ops/kernel_tensors.h"
#include "csrc/ops/products.h"
#include "csrc/ops/slstm_products.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

OptionalTensor contiguous_floats(const OptionalTensor& x) {
  return x ? OptionalTensor(x->to(at::kFloat).contiguous()) : std::nullopt;
}

/// (B,T,4,NH,DH)
cuda::GateView gate_view_of(const Tensor& x) {
  return {kernel_data(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

cuda::SlstmCell kernel_cell(std::string_view name) {
  switch (slstm_cell(name)) {
    case cpu::SlstmCell::kSlstmExpf:
      return cuda::SlstmCell::kSlstmExpf;
    case cpu::SlstmCell::kLstm:
      return cuda::SlstmCell::kLstm;
    default:
      return cuda::SlstmCell::kSlstm;
  }
}

cuda::SlstmProblem problem_of(const SlstmSizes& sizes, at::ScalarType dtype) {
  cuda::SlstmProblem p;
  p.batch = sizes.batch;
  p.time = sizes.time;
  p.num_heads = sizes.num_heads;
  p.dh = sizes.dh;
  p.num_sequences = sizes.num_sequences;
  p.dtype = kernel_dtype(dtype);
  return p;
}

/// Problem and inputs of a call in either direction. Keeps alive what had to be copied.
template <class Arguments>
struct Call {
  /// sequence_offsets: cu_seqlens from kernel_offsets.
  Call(const Arguments& arguments, const OptionalTensor& sequence_offsets, const SlstmSizes& sizes,
       at::ScalarType dtype)
      : a(arguments), offsets(sequence_offsets), problem(problem_of(sizes, dtype)) {
    a.r = a.r.contiguous();
    for (OptionalTensor* x : {&a.y0, &a.c0, &a.n0, &a.m0}) *x = contiguous(*x);
    problem.cell = kernel_cell(a.cell);
    problem.r_dtype = kernel_dtype(a.r.scalar_type());
    in.r = kernel_data(a.r);
    in.y0 = floats(a.y0);
    in.c0 = floats(a.c0);
    in.n0 = floats(a.n0);
    set_documents(in, a.reset, offsets);
  }

  bool lstm() const { return problem.cell == cuda::SlstmCell::kLstm; }

  /// Scratch memory: given back to torch's allocator at the end of the call, in the order of the stream.
  Tensor workspace(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, a.r.options().dtype(at::kByte));
  }

  /// Steps until the longest sequence ends. Throws where cu_seqlens does not rise from 0 to T.
  int64_t steps() const {
    if (!a.cu_seqlens) return problem.time;
    return slstm_sequences(problem.batch, problem.time, a.cu_seqlens)[0].length;
  }

  Arguments a;
  OptionalTensor offsets;
  cuda::SlstmProblem problem;
  cuda::SlstmInputs in;
};

/// Products and launches in turn.
void forward_by_steps(const Call<SlstmArguments>& call, const cuda::SlstmForward& forward,
                      at::ScalarType dtype, cuda::Stream stream) {
  const cuda::SlstmProblem& p = call.problem;
  const Tensor columns = slstm_recurrent_rows(call.a.r, dtype).transpose(1, 2);
  const Tensor y = at::empty({p.num_sequences, p.num_heads, p.dh}, columns.options());
  if (call.a.y0) y.copy_(*call.a.y0);
  Tensor product;  // (NH,N,4*DH)
  cuda::SlstmStep step;
  step.y = kernel_data(y);
  const int64_t steps = call.steps();
  for (step.t = 0; step.t < steps; ++step.t) {
    if (step.t > 0 || call.a.y0) {
      product = full_product(y.transpose(0, 1), columns).contiguous();
      step.product = {kernel_data(product), product.stride(1), 0, p.dh, product.stride(0), 1};
    }
    cuda::slstm_pointwise_forward(p, forward, step, stream);
  }
}

/// What y0 gets: the product after step 0, bounded; nothing where the first token has a reset; where a sequence has no
/// tokens, what comes into the last y.
void gradient_of_first_y(const SlstmBackwardArguments& a, const Tensor& product,
                         const Tensor& dy0) {
  if (a.recurrent_cut) {
    dy0.zero_();
  } else {
    dy0.copy_(product);
    if (a.recurrent_clip > 0) dy0.clamp_(-a.recurrent_clip, a.recurrent_clip);
  }
  const auto by_sequence = [](const Tensor& marks) { return marks.view({-1, 1, 1}); };
  if (!a.cu_seqlens) {
    if (a.reset) dy0.masked_fill_(by_sequence(a.reset->select(1, 0).contiguous()), 0);
    return;
  }
  const int64_t count = dy0.size(0);
  const Tensor begins = a.cu_seqlens->narrow(0, 0, count), ends = a.cu_seqlens->narrow(0, 1, count);
  if (a.reset) {
    const Tensor first = begins.clamp_max(a.reset->size(1) - 1);
    dy0.masked_fill_(by_sequence(a.reset->select(0, 0).index_select(0, first)), 0);
  }
  const Tensor through = a.dy_last ? *a.dy_last : at::zeros_like(dy0);
  dy0.copy_(at::where(by_sequence(begins == ends), through, dy0));
}

void backward_by_steps(const Call<SlstmBackwardArguments>& call,
                       const cuda::SlstmBackward& backward, at::ScalarType dtype, const Tensor& dy0,
                       cuda::Stream stream) {
  const cuda::SlstmProblem& p = call.problem;
  const Tensor rows = slstm_recurrent_rows(call.a.r, dtype);  // (NH,4*DH,DH)
  const Tensor dwx = at::empty({p.num_sequences, 4, p.num_heads, p.dh}, rows.options());
  Tensor recurrent;  // (N,NH,DH)
  cuda::SlstmStep step;
  step.dwx = kernel_data(dwx);
  for (step.t = call.steps() - 1; step.t >= 0; --step.t) {
    step.dy_recurrent = recurrent.defined() ? floats(recurrent) : nullptr;
    cuda::slstm_pointwise_backward(p, backward, step, stream);
    if (call.a.recurrent_cut) continue;
    const Tensor by_head =
        dwx.permute({2, 0, 1, 3}).reshape({p.num_heads, p.num_sequences, 4 * p.dh});
    recurrent = full_product(by_head, rows).transpose(0, 1).contiguous();
  }
  gradient_of_first_y(call.a, recurrent, dy0);
}

/// What the backward pass reads: states of the last token, and the pre-activations, kept or computed anew.
SlstmBackwardArguments complete(const SlstmBackwardArguments& given, const Tensor& previous_y) {
  SlstmBackwardArguments a = given;
  if (a.dy) a.dy = a.dy->to(a.y.scalar_type());
  for (OptionalTensor* x : {&a.dy_last, &a.dc, &a.dn}) *x = contiguous_floats(*x);
  a.checkpoints = a.checkpoints.contiguous();
  if (a.recompute()) a.gates = slstm_preactivations(a, previous_y);
  return a;
}

}  // namespace

SlstmSizes slstm_sizes(const SlstmArguments& a) {
  return {a.wx.size(0), a.wx.size(1), a.wx.size(3), a.wx.size(4),
          a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : a.wx.size(0)};
}

SlstmSizes slstm_sizes(const SlstmBackwardArguments& a) {
  return {a.y.size(0), a.y.size(1), a.y.size(2), a.y.size(3),
          a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : a.y.size(0)};
}

std::string slstm_kernels_lack(const SlstmSizes& sizes, at::ScalarType dtype) {
  if (dtype == at::kDouble) return "no kernels for float64";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMostTokens = kMost - cuda::kSlstmCheckpointTokens;  // they are rounded up
  if (sizes.num_sequences > kMost || sizes.time > kMostTokens || sizes.num_heads > kMost ||
      sizes.dh > kMost)
    return "no kernels for sizes beyond 32 bits";
  return "";
}

bool slstm_persistent(const SlstmSizes& sizes, at::ScalarType dtype,
                      const cuda::DeviceLimits& limits, bool gradients) {
  return cuda::slstm_supported(problem_of(sizes, dtype), limits, gradients);
}

SlstmResults slstm_kernels_forward(const SlstmArguments& a, const SlstmSizes& sizes,
                                   const SlstmDevice& device, bool saved) {
  const FullPrecision precision;
  const at::ScalarType dtype = a.wx.scalar_type();
  Call<SlstmArguments> call(a, kernel_offsets(a.cu_seqlens, sizes.time), sizes, dtype);
  call.a.b = a.b.contiguous();
  call.a.preactivations = true;
  call.problem.b_dtype = kernel_dtype(a.b.scalar_type());
  const SlstmResults results = empty_slstm_results(call.a, saved);
  const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
  cuda::SlstmForward forward;
  forward.in = call.in;
  forward.wx = gate_view_of(a.wx);
  forward.b = kernel_data(call.a.b);
  forward.m0 = floats(call.a.m0);
  forward.y = view_of(y);
  forward.y_last = floats(y_last);
  forward.c = floats(c);
  forward.n = floats(n);
  forward.m = floats(m);
  if (call.lstm()) n.zero_(), m.zero_();
  if (saved) forward.checkpoints = floats(checkpoints);
  if (saved && !a.recompute) forward.gates = gate_view_of(gates);
  run_kernels("slstm", [&] {
    if (!cuda::slstm_supported(call.problem, device.limits, saved)) {
      forward_by_steps(call, forward, dtype, device.stream);
      return;
    }
    const Tensor workspace =
        call.workspace(cuda::slstm_forward_workspace(call.problem, device.limits));
    cuda::slstm_forward(call.problem, device.limits, forward, workspace.mutable_data_ptr(),
                        device.stream);
  });
  return results;
}

SlstmGradients slstm_kernels_backward(const SlstmBackwardArguments& a, const SlstmSizes& sizes,
                                      const SlstmDevice& device) {
  const FullPrecision precision;
  const at::ScalarType dtype = a.y.scalar_type();
  const OptionalTensor offsets = kernel_offsets(a.cu_seqlens, sizes.time);
  const Tensor previous_y = slstm_previous_y(a.y, a.y0, a.reset, offsets);
  const Call<SlstmBackwardArguments> call(complete(a, previous_y), offsets, sizes, dtype);
  SlstmGradients gradients = empty_slstm_gradients(a);
  auto& [dwx, dr, db, dy0, dc0, dn0] = gradients;
  cuda::SlstmBackward backward;
  backward.in = call.in;
  backward.gates = gate_view_of(call.a.gates);
  backward.checkpoints = floats(call.a.checkpoints);
  if (call.a.dy) backward.dy = view_of(*call.a.dy);
  backward.dy_last = floats(call.a.dy_last);
  backward.dc = floats(call.a.dc);
  backward.dn = call.lstm() ? nullptr : floats(call.a.dn);
  backward.dwx = gate_view_of(dwx);
  backward.dy0 = floats(dy0);
  backward.dc0 = floats(dc0);
  backward.dn0 = call.lstm() ? nullptr : floats(dn0);
  if (call.lstm()) dn0.zero_();
  backward.recurrent_clip = static_cast<float>(a.recurrent_clip);
  backward.recurrent_cut = a.recurrent_cut;
  run_kernels("slstm_backward", [&] {
    if (!cuda::slstm_supported(call.problem, device.limits)) {
      backward_by_steps(call, backward, dtype, dy0, device.stream);
      return;
    }
    const Tensor workspace =
        call.workspace(cuda::slstm_backward_workspace(call.problem, device.limits));
    cuda::slstm_backward(call.problem, device.limits, backward, workspace.mutable_data_ptr(),
                         device.stream);
  });
  std::tie(dr, db) = slstm_parameter_gradients(dwx, previous_y);
  return gradients;
}

}  // namespace xlstm::ops
