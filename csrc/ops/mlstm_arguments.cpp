#include "csrc/ops/mlstm_arguments.h"

#include <cmath>

#include "csrc/ops/common.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "mlstm_chunkwise", kStepOp = "mlstm_step";

void check_inputs(std::string_view op, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, const at::Tensor& igate, const at::Tensor& fgate) {
  const struct {
    std::string_view name;
    const at::Tensor& tensor;
  } all[] = {{"q", q}, {"k", k}, {"v", v}, {"igate", igate}, {"fgate", fgate}};
  for (const auto& [name, tensor] : all) {
    check_floating(op, name, tensor);
    check_device(op, name, tensor, q.device());
  }
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
}

void check_state(std::string_view op, std::string_view name, const at::Tensor& state,
                 at::IntArrayRef sizes, std::string_view meaning, const at::Tensor& q) {
  check_shape(op, name, state, sizes, meaning);
  check_dtype(op, name, state, accumulate_type(q.scalar_type()));
  check_device(op, name, state, q.device());
}

int64_t check_cu_seqlens(const at::Tensor& cu_seqlens, const at::Tensor& q) {
  check_rank(kOp, "cu_seqlens", cu_seqlens, 1);
  check_dtype(kOp, "cu_seqlens", cu_seqlens, at::kInt);
  check_device(kOp, "cu_seqlens", cu_seqlens, q.device());
  TORCH_CHECK(cu_seqlens.size(0) >= 1, kOp,
              ": cu_seqlens: expected at least one entry (0), got none");
  TORCH_CHECK(q.size(0) == 1, kOp,
              ": cu_seqlens: expected B = 1 (one packed row), got B = ", q.size(0));
  return cu_seqlens.size(0) - 1;
}

}  // namespace

bool is_sigmoid_input_gate(std::string_view op, std::string_view input_gate) {
  TORCH_CHECK(input_gate == "exp" || input_gate == "sigmoid", op,
              ": input_gate: expected \"exp\" or \"sigmoid\", got \"", input_gate, "\"");
  return input_gate == "sigmoid";
}

double mlstm_scale(const std::optional<double>& scale, int64_t dqk) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(dqk)));
}

MlstmSizes check_mlstm_arguments(const MlstmArguments& a) {
  check_rank(kOp, "q", a.q, 4);
  check_rank(kOp, "v", a.v, 4);
  MlstmSizes sizes{a.q.size(0), a.q.size(1), a.q.size(2), a.q.size(3), a.v.size(3), a.q.size(0)};
  TORCH_CHECK(sizes.dqk >= 1, kOp, ": q: expected (B,T,NH,DQK) with DQK >= 1, got ", a.q.sizes());
  check_shape(kOp, "k", a.k, a.q.sizes(), "(B,T,NH,DQK)");
  check_shape(kOp, "v", a.v, {sizes.batch, sizes.time, sizes.num_heads, sizes.dv}, "(B,T,NH,DV)");
  for (const auto& [name, gate] : {std::pair("igate", a.igate), std::pair("fgate", a.fgate)})
    check_shape(kOp, name, gate, {sizes.batch, sizes.time, sizes.num_heads}, "(B,T,NH)");
  check_inputs(kOp, a.q, a.k, a.v, a.igate, a.fgate);
  is_sigmoid_input_gate(kOp, a.input_gate);
  TORCH_CHECK(a.chunk_size >= 0, kOp, ": chunk_size: expected 0 (automatic) or more, got ",
              a.chunk_size);
  if (a.reset) {
    check_shape(kOp, "reset", *a.reset, {sizes.batch, sizes.time}, "(B,T)");
    check_dtype(kOp, "reset", *a.reset, at::kBool);
    check_device(kOp, "reset", *a.reset, a.q.device());
  }
  if (a.cu_seqlens) sizes.num_sequences = check_cu_seqlens(*a.cu_seqlens, a.q);
  const int64_t count = sizes.num_sequences;
  if (a.c0)
    check_state(kOp, "c0", *a.c0, {count, sizes.num_heads, sizes.dqk, sizes.dv},
                "(B or N,NH,DQK,DV)", a.q);
  if (a.n0)
    check_state(kOp, "n0", *a.n0, {count, sizes.num_heads, sizes.dqk}, "(B or N,NH,DQK)", a.q);
  if (a.m0) check_state(kOp, "m0", *a.m0, {count, sizes.num_heads}, "(B or N,NH)", a.q);
  return sizes;
}

MlstmSizes check_mlstm_step_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& igate, const at::Tensor& fgate,
                                      const at::Tensor& c, const at::Tensor& n, const at::Tensor& m,
                                      std::string_view input_gate) {
  check_rank(kStepOp, "q", q, 3);
  check_rank(kStepOp, "v", v, 3);
  const MlstmSizes sizes{q.size(0), 1, q.size(1), q.size(2), v.size(2), q.size(0)};
  TORCH_CHECK(sizes.dqk >= 1, kStepOp, ": q: expected (B,NH,DQK) with DQK >= 1, got ", q.sizes());
  check_shape(kStepOp, "k", k, q.sizes(), "(B,NH,DQK)");
  check_shape(kStepOp, "v", v, {sizes.batch, sizes.num_heads, sizes.dv}, "(B,NH,DV)");
  for (const auto& [name, gate] : {std::pair("igate", igate), std::pair("fgate", fgate)})
    check_shape(kStepOp, name, gate, {sizes.batch, sizes.num_heads}, "(B,NH)");
  check_inputs(kStepOp, q, k, v, igate, fgate);
  is_sigmoid_input_gate(kStepOp, input_gate);
  check_state(kStepOp, "c", c, {sizes.batch, sizes.num_heads, sizes.dqk, sizes.dv}, "(B,NH,DQK,DV)",
              q);
  check_state(kStepOp, "n", n, {sizes.batch, sizes.num_heads, sizes.dqk}, "(B,NH,DQK)", q);
  check_state(kStepOp, "m", m, {sizes.batch, sizes.num_heads}, "(B,NH)", q);
  return sizes;
}

}  // namespace xlstm::ops
