#include "tests/ops/mlstm_fake_kernels.h"

#include <ATen/ops/from_blob.h>

#include <cstring>
#include <stdexcept>

#include "csrc/ops/mlstm_generic.h"
#include "cuda/mlstm/mlstm.h"

namespace xlstm::cuda {
namespace {

using at::Tensor;
using ops::MlstmArguments;
using ops::OptionalTensor;

constexpr size_t kWorkspace = 1234;

at::ScalarType type_of(Dtype dtype) {
  return dtype == Dtype::kFloat32    ? at::kFloat
         : dtype == Dtype::kBFloat16 ? at::kBFloat16
                                     : at::kHalf;
}

Tensor tensor_of(const MlstmProblem& p, const View& view, int64_t width, Dtype dtype) {
  return at::from_blob(view.data, {p.batch, p.time, p.num_heads, width},
                       {view.batch, view.time, view.head, view.inner}, type_of(dtype));
}
Tensor gate_of(const MlstmProblem& p, const View& view, Dtype dtype) {
  return tensor_of(p, view, 1, dtype).squeeze(-1);
}

/// (N,NH,...) float32
OptionalTensor state_of(const MlstmProblem& p, const float* data, std::vector<int64_t> inner) {
  if (data == nullptr) return {};
  std::vector<int64_t> sizes{p.num_sequences, p.num_heads};
  sizes.insert(sizes.end(), inner.begin(), inner.end());
  return at::from_blob(const_cast<float*>(data), sizes, at::kFloat);
}

MlstmArguments arguments_of(const MlstmProblem& p, const MlstmInputs& in) {
  MlstmArguments a{tensor_of(p, in.q, p.dqk, p.dtype),
                   tensor_of(p, in.k, p.dqk, p.dtype),
                   tensor_of(p, in.v, p.dv, p.dtype),
                   gate_of(p, in.igate, p.igate_dtype),
                   gate_of(p, in.fgate, p.fgate_dtype),
                   state_of(p, in.c0, {p.dqk, p.dv}),
                   state_of(p, in.n0, {p.dqk}),
                   state_of(p, in.m0, {}),
                   {},
                   {},
                   p.sigmoid_input_gate ? "sigmoid" : "exp",
                   p.normalize,
                   p.scale,
                   p.eps,
                   p.chunk_size};
  if (in.reset != nullptr)
    a.reset = at::from_blob(const_cast<bool*>(in.reset), {p.batch, p.time},
                            {in.reset_batch, in.reset_time}, at::kBool);
  if (in.cu_seqlens != nullptr)
    a.cu_seqlens =
        at::from_blob(const_cast<int32_t*>(in.cu_seqlens), {p.num_sequences + 1}, at::kInt);
  return a;
}

Tensor product_of(const MlstmProblem& p, const float* data) {
  return at::from_blob(const_cast<float*>(data), {p.batch, p.time, p.num_heads}, at::kFloat);
}

void begin(void* workspace) {
  if (test::fail_launch) throw std::runtime_error("planted failure");
  std::memset(workspace, 0xff, kWorkspace);
}

void store(const OptionalTensor& to, const Tensor& from) {
  if (to) to->copy_(from);
}

/// The tensors of one token.
class StepTensors {
 public:
  StepTensors(const MlstmProblem& problem, const MlstmStep& call)
      : p(problem),
        q(token(call.q, p.dqk, p.dtype)),
        k(token(call.k, p.dqk, p.dtype)),
        v(token(call.v, p.dv, p.dtype)),
        igate(token(call.igate, 1, p.igate_dtype).squeeze(-1)),
        fgate(token(call.fgate, 1, p.fgate_dtype).squeeze(-1)),
        out(token(call.h, p.dv, p.dtype)),
        c(*state_of(p, call.c, {p.dqk, p.dv})),
        n(*state_of(p, call.n, {p.dqk})),
        m(*state_of(p, call.m, {})) {}
  ops::MlstmStepArguments arguments() {
    return {
        q,           k,       v,    igate, fgate, c, n, m, p.sigmoid_input_gate ? "sigmoid" : "exp",
        p.normalize, p.scale, p.eps};
  }
  void h(const Tensor& value) { out.copy_(value); }

 private:
  Tensor token(const View& view, int64_t width, Dtype dtype) const {
    return tensor_of(p, view, width, dtype).select(1, 0);
  }
  const MlstmProblem& p;
  Tensor q, k, v, igate, fgate, out, c, n, m;
};

ops::MlstmRing tensors_of(const MlstmProblem& p, const MlstmRing& ring) {
  const auto of = [&p](void* data, std::vector<int64_t> inner, at::ScalarType type) {
    std::vector<int64_t> sizes{p.batch, p.num_heads};
    sizes.insert(sizes.end(), inner.begin(), inner.end());
    return at::from_blob(data, sizes, type);
  };
  return {of(ring.keys, {ring.tokens, p.dqk}, type_of(p.dtype)),
          of(ring.values, {ring.tokens, p.dv}, type_of(p.dtype)),
          of(ring.gates, {ring.tokens, 2}, at::kFloat), of(ring.count, {}, at::kInt)};
}

}  // namespace

bool mlstm_supported(const MlstmProblem& problem, const DeviceLimits& device) {
  return device.compute_capability >= 80 && problem.dv < 65536;
}
size_t mlstm_forward_workspace(const MlstmProblem&, const DeviceLimits&) { return kWorkspace; }
size_t mlstm_backward_workspace(const MlstmProblem&, const DeviceLimits&, const MlstmBackward&) {
  return kWorkspace;
}

void mlstm_forward(const MlstmProblem& p, const DeviceLimits&, const MlstmForward& call,
                   void* workspace, Stream) {
  begin(workspace);
  const auto [h, c, n, m, product] = ops::mlstm_generic_forward(arguments_of(p, call.in));
  tensor_of(p, call.h, p.dv, p.dtype).copy_(h);
  store(state_of(p, call.c, {p.dqk, p.dv}), c);
  store(state_of(p, call.n, {p.dqk}), n);
  store(state_of(p, call.m, {}), m);
  if (call.product != nullptr) product_of(p, call.product).copy_(product);
}

void mlstm_backward(const MlstmProblem& p, const DeviceLimits&, const MlstmBackward& call,
                    void* workspace, Stream) {
  begin(workspace);
  const auto [dq, dk, dv, digate, dfgate, dc0, dn0] = ops::mlstm_generic_backward(
      {tensor_of(p, call.dh, p.dv, p.dtype), state_of(p, call.dc, {p.dqk, p.dv}),
       state_of(p, call.dn, {p.dqk}), arguments_of(p, call.in), tensor_of(p, call.h, p.dv, p.dtype),
       product_of(p, call.product)});
  tensor_of(p, call.dq, p.dqk, p.dtype).copy_(dq);
  tensor_of(p, call.dk, p.dqk, p.dtype).copy_(dk);
  tensor_of(p, call.dv, p.dv, p.dtype).copy_(dv);
  gate_of(p, call.digate, p.igate_dtype).copy_(digate);
  gate_of(p, call.dfgate, p.fgate_dtype).copy_(dfgate);
  store(state_of(p, call.dc0, {p.dqk, p.dv}), dc0);
  store(state_of(p, call.dn0, {p.dqk}), dn0);
}

void mlstm_step(const MlstmProblem& p, const MlstmStep& call, Stream) {
  if (test::fail_launch) throw std::runtime_error("planted failure");
  StepTensors x(p, call);
  x.h(ops::mlstm_generic_step(x.arguments()));
}

void mlstm_step_lazy(const MlstmProblem& p, const MlstmStep& call, const MlstmRing& ring, Stream) {
  if (test::fail_launch) throw std::runtime_error("planted failure");
  StepTensors x(p, call);
  ops::MlstmRing tensors = tensors_of(p, ring);
  x.h(ops::mlstm_generic_step_lazy({x.arguments(), tensors}));
}

void mlstm_fold(const MlstmProblem& p, const MlstmStep& call, const MlstmRing& ring, Stream) {
  if (test::fail_launch) throw std::runtime_error("planted failure");
  Tensor c = *state_of(p, call.c, {p.dqk, p.dv}), n = *state_of(p, call.n, {p.dqk}),
         m = *state_of(p, call.m, {});
  ops::MlstmRing tensors = tensors_of(p, ring);
  ops::mlstm_generic_fold({c, n, m, tensors, p.sigmoid_input_gate ? "sigmoid" : "exp"});
}

}  // namespace xlstm::cuda
