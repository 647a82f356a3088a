#include "csrc/ops/mlstm_arguments.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "csrc/ops/common.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "mlstm_chunkwise", kBackwardOp = "mlstm_chunkwise_backward";

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

/// c, n and m as a step writes them, `like` q in dtype and device.
void check_step_states(std::string_view op, const at::Tensor& c, const at::Tensor& n,
                       const at::Tensor& m, const MlstmSizes& sizes, const at::Tensor& like) {
  check_state(op, "c", c, {sizes.batch, sizes.num_heads, sizes.dqk, sizes.dv}, "(B,NH,DQK,DV)",
              like);
  check_state(op, "n", n, {sizes.batch, sizes.num_heads, sizes.dqk}, "(B,NH,DQK)", like);
  check_state(op, "m", m, {sizes.batch, sizes.num_heads}, "(B,NH)", like);
}

void check_ring(std::string_view op, const MlstmRing& ring, const MlstmSizes& sizes,
                const at::Tensor& like) {
  const int64_t batch = sizes.batch, heads = sizes.num_heads;
  check_rank(op, "keys", ring.keys, 4);
  const int64_t tokens = ring.keys.size(2);
  TORCH_CHECK(tokens >= 1, op, ": keys: expected (B,NH,R,DQK) with R >= 1, got ",
              ring.keys.sizes());
  check_shape(op, "keys", ring.keys, {batch, heads, tokens, sizes.dqk}, "(B,NH,R,DQK)");
  check_shape(op, "values", ring.values, {batch, heads, tokens, sizes.dv}, "(B,NH,R,DV)");
  check_shape(op, "count", ring.count, {batch, heads}, "(B,NH)");
  check_state(op, "gates", ring.gates, {batch, heads, tokens, 2}, "(B,NH,R,2)", like);
  check_dtype(op, "keys", ring.keys, like.scalar_type());
  check_dtype(op, "values", ring.values, like.scalar_type());
  check_dtype(op, "count", ring.count, at::kInt);
  for (const auto& [name, tensor] : {std::pair("keys", ring.keys), std::pair("values", ring.values),
                                     std::pair("count", ring.count)})
    check_device(op, name, tensor, like.device());
}

int64_t check_cu_seqlens(const at::Tensor& cu_seqlens, const at::Tensor& q) {
  check_rank(kOp, "cu_seqlens", cu_seqlens, 1);
  check_dtype(kOp, "cu_seqlens", cu_seqlens, at::kInt);
  check_device(kOp, "cu_seqlens", cu_seqlens, q.device());
  TORCH_CHECK(cu_seqlens.size(0) >= 1, kOp,
              ": cu_seqlens: expected at least one entry (0), got none");
  TORCH_CHECK(q.size(0) == 1, kOp,
              ": cu_seqlens: expected B = 1 (one packed row), got B = ", q.size(0));
  TORCH_CHECK(cu_seqlens.size(0) > 1 || q.size(1) == 0, kOp,
              ": cu_seqlens: expected last entry T = ", q.size(1), ", got 0 sequences");
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

MlstmSizes check_mlstm_backward_arguments(const MlstmBackwardArguments& a) {
  const MlstmSizes sizes = check_mlstm_arguments(a.in);
  const at::Tensor& q = a.in.q;
  const at::ScalarType state = accumulate_type(q.scalar_type());
  const auto check = [&](std::string_view name, const OptionalTensor& tensor, at::IntArrayRef shape,
                         std::string_view meaning) {
    if (!tensor) return;
    check_shape(kBackwardOp, name, *tensor, shape, meaning);
    check_device(kBackwardOp, name, *tensor, q.device());
  };
  check("h", a.h, a.in.v.sizes(), "(B,T,NH,DV)");
  check_dtype(kBackwardOp, "h", a.h, q.scalar_type());
  check("product", a.product, {sizes.batch, sizes.time, sizes.num_heads}, "(B,T,NH)");
  check_dtype(kBackwardOp, "product", a.product, state);
  check("dh", a.dh, a.in.v.sizes(), "(B,T,NH,DV)");
  if (a.dh) check_floating(kBackwardOp, "dh", *a.dh);
  check("dc", a.dc, {sizes.num_sequences, sizes.num_heads, sizes.dqk, sizes.dv},
        "(B or N,NH,DQK,DV)");
  check("dn", a.dn, {sizes.num_sequences, sizes.num_heads, sizes.dqk}, "(B or N,NH,DQK)");
  if (a.dc) check_dtype(kBackwardOp, "dc", *a.dc, state);
  if (a.dn) check_dtype(kBackwardOp, "dn", *a.dn, state);
  return sizes;
}

MlstmSizes check_mlstm_step_arguments(const MlstmStepArguments& a, std::string_view op) {
  check_rank(op, "q", a.q, 3);
  check_rank(op, "v", a.v, 3);
  const MlstmSizes sizes{a.q.size(0), 1, a.q.size(1), a.q.size(2), a.v.size(2), a.q.size(0)};
  TORCH_CHECK(sizes.dqk >= 1, op, ": q: expected (B,NH,DQK) with DQK >= 1, got ", a.q.sizes());
  check_shape(op, "k", a.k, a.q.sizes(), "(B,NH,DQK)");
  check_shape(op, "v", a.v, {sizes.batch, sizes.num_heads, sizes.dv}, "(B,NH,DV)");
  for (const auto& [name, gate] : {std::pair("igate", a.igate), std::pair("fgate", a.fgate)})
    check_shape(op, name, gate, {sizes.batch, sizes.num_heads}, "(B,NH)");
  check_inputs(op, a.q, a.k, a.v, a.igate, a.fgate);
  is_sigmoid_input_gate(op, a.input_gate);
  check_step_states(op, a.c, a.n, a.m, sizes, a.q);
  return sizes;
}

MlstmSizes check_mlstm_lazy_arguments(const MlstmLazyArguments& a) {
  const MlstmSizes sizes = check_mlstm_step_arguments(a, a.kName);
  check_ring(a.kName, a.ring, sizes, a.q);
  return sizes;
}

MlstmSizes check_mlstm_fold_arguments(const MlstmFoldArguments& a) {
  check_rank(a.kName, "c", a.c, 4);
  const MlstmSizes sizes{a.c.size(0), 1, a.c.size(1), a.c.size(2), a.c.size(3), a.c.size(0)};
  check_floating(a.kName, "keys", a.ring.keys);
  check_step_states(a.kName, a.c, a.n, a.m, sizes, a.ring.keys);
  check_ring(a.kName, a.ring, sizes, a.ring.keys);
  is_sigmoid_input_gate(a.kName, a.input_gate);
  return sizes;
}

std::vector<int64_t> mlstm_sequence_starts(const at::Tensor& cu_seqlens, int64_t time) {
  const at::Tensor plain = cu_seqlens.contiguous();
  const int32_t* data = plain.const_data_ptr<int32_t>();
  const std::vector<int64_t> starts(data, data + plain.numel());
  for (size_t i = 0; i < starts.size(); ++i)
    TORCH_CHECK(starts[i] >= (i == 0 ? 0 : starts[i - 1]), kOp,
                ": cu_seqlens: expected a rising sequence from 0, got ", starts[i], " at ", i);
  TORCH_CHECK(starts.front() == 0 && starts.back() == time, kOp,
              ": cu_seqlens: expected first entry 0 and last entry T = ", time, ", got ",
              starts.front(), " and ", starts.back());
  return starts;
}

MlstmResults empty_mlstm_results(const MlstmArguments& a, const MlstmSizes& sizes, bool product) {
  const at::TensorOptions state = a.q.options().dtype(accumulate_type(a.q.scalar_type()));
  const int64_t count = sizes.num_sequences, heads = sizes.num_heads;
  return {at::empty({sizes.batch, sizes.time, heads, sizes.dv}, a.q.options()),
          at::empty({count, heads, sizes.dqk, sizes.dv}, state),
          at::empty({count, heads, sizes.dqk}, state), at::empty({count, heads}, state),
          product ? at::empty({sizes.batch, sizes.time, heads}, state) : at::Tensor()};
}

MlstmGradients empty_mlstm_gradients(const MlstmArguments& a, const MlstmSizes& sizes) {
  const auto like = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const at::TensorOptions state = a.q.options().dtype(accumulate_type(a.q.scalar_type()));
  const int64_t count = sizes.num_sequences, heads = sizes.num_heads;
  return {like(a.q),
          like(a.k),
          like(a.v),
          like(a.igate),
          like(a.fgate),
          a.c0 ? at::empty({count, heads, sizes.dqk, sizes.dv}, state) : at::empty({0}, state),
          a.n0 ? at::empty({count, heads, sizes.dqk}, state) : at::empty({0}, state)};
}

std::pair<OptionalTensor, OptionalTensor> mlstm_state_gradients(const MlstmBackwardArguments& a,
                                                                const MlstmSizes& sizes) {
  if (!a.dc && !a.dn) return {};
  const at::TensorOptions state = a.in.q.options().dtype(accumulate_type(a.in.q.scalar_type()));
  const int64_t count = sizes.num_sequences, heads = sizes.num_heads;
  return {a.dc ? a.dc->contiguous() : at::zeros({count, heads, sizes.dqk, sizes.dv}, state),
          a.dn ? a.dn->contiguous() : at::zeros({count, heads, sizes.dqk}, state)};
}

}  // namespace xlstm::ops
