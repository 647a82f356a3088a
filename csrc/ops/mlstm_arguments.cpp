#include "csrc/ops/mlstm_arguments.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <initializer_list>

#include "csrc/ops/common.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "mlstm_chunkwise", kBackwardOp = "mlstm_chunkwise_backward";

void check_inputs(std::string_view op, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, const at::Tensor& igate, const at::Tensor& fgate) {
  check_floating(op, {{"q", q}, {"igate", igate}, {"fgate", fgate}});
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
}

void check_state(std::string_view op, std::string_view name, const at::Tensor& state,
                 c10::SymIntArrayRef sizes, std::string_view meaning, const at::Tensor& q) {
  check_shape(op, name, state, sizes, meaning);
  check_dtype(op, name, state, accumulate_type(q.scalar_type()));
}

/// What is missing would count as zero: another state than the one that was meant.
void check_whole_state(const MlstmArguments& a) {
  const bool given = a.c0.has_value(), sigmoid = a.input_gate == "sigmoid";
  TORCH_CHECK(
      (a.n0.has_value() == given || !a.normalize) && (a.m0.has_value() == given || sigmoid), kOp,
      ": c0, n0 and m0: expected all or none (n0 may be absent with normalize=False, m0 with "
      "input_gate=\"sigmoid\"), got",
      given ? " c0" : "", a.n0 ? " n0" : "", a.m0 ? " m0" : "");
}

/// c, n and m as a step writes them; dtypes `like` q.
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
}

void check_ring_devices(std::string_view op, const MlstmRing& ring, at::Device device) {
  check_devices(
      op, device,
      {{"keys", ring.keys}, {"values", ring.values}, {"gates", ring.gates}, {"count", ring.count}});
}

int64_t count_sequences(const at::Tensor& cu_seqlens, const MlstmSizes& sizes) {
  check_cu_seqlens(kOp, cu_seqlens, sizes.batch);
  TORCH_CHECK(cu_seqlens.size(0) > 1 || sizes.time == 0, kOp,
              ": cu_seqlens: expected last entry T = ", sizes.time, ", got 0 sequences");
  return cu_seqlens.size(0) - 1;
}

void check_numbers(std::string_view op, double eps, const std::optional<double>& scale) {
  TORCH_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps: expected a number >= 0, got ", eps);
  TORCH_CHECK(!scale || std::isfinite(*scale), op, ": scale: expected a finite number, got ",
              *scale);
}

/// What is written must not be what is read, or written twice. Checked before anything is written.
void check_apart(std::initializer_list<at::Tensor> written,
                 std::initializer_list<at::Tensor> read) {
  for (auto one = written.begin(); one != written.end(); ++one) {
    at::assert_no_internal_overlap(*one);
    for (auto other = written.begin(); other != one; ++other) at::assert_no_overlap(*one, *other);
    for (const at::Tensor& input : read) at::assert_no_overlap(*one, input);
  }
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

void check_mlstm_devices(const MlstmArguments& a) {
  check_devices(kOp, a.q.device(),
                {{"k", a.k},
                 {"v", a.v},
                 {"igate", a.igate},
                 {"fgate", a.fgate},
                 {"c0", a.c0},
                 {"n0", a.n0},
                 {"m0", a.m0},
                 {"reset", a.reset},
                 {"cu_seqlens", a.cu_seqlens}});
}

void check_mlstm_devices(const MlstmBackwardArguments& a) {
  check_mlstm_devices(a.in);
  check_devices(kBackwardOp, a.in.q.device(),
                {{"dh", a.dh}, {"dc", a.dc}, {"dn", a.dn}, {"h", a.h}, {"product", a.product}});
}

void check_mlstm_devices(const MlstmStepArguments& a, std::string_view op) {
  check_devices(op, a.q.device(),
                {{"k", a.k},
                 {"v", a.v},
                 {"igate", a.igate},
                 {"fgate", a.fgate},
                 {"c", a.c},
                 {"n", a.n},
                 {"m", a.m}});
}

void check_mlstm_devices(const MlstmLazyArguments& a) {
  check_mlstm_devices(a, a.kName);
  check_ring_devices(a.kName, a.ring, a.q.device());
}

void check_mlstm_devices(const MlstmFoldArguments& a) {
  check_devices(a.kName, a.c.device(), {{"n", a.n}, {"m", a.m}});
  check_ring_devices(a.kName, a.ring, a.c.device());
}

MlstmSizes check_mlstm_arguments(const MlstmArguments& a) {
  check_mlstm_devices(a);
  check_rank(kOp, "q", a.q, 4);
  check_rank(kOp, "v", a.v, 4);
  MlstmSizes sizes{a.q.size(0), a.q.size(1), a.q.size(2), a.q.size(3), a.v.size(3), a.q.size(0)};
  TORCH_CHECK(sizes.dqk >= 1, kOp, ": q: expected (B,T,NH,DQK) with DQK >= 1, got ", a.q.sizes());
  check_shape(kOp, "k", a.k, a.q.sym_sizes(), "(B,T,NH,DQK)");
  check_shape(kOp, "v", a.v, {sizes.batch, sizes.time, sizes.num_heads, sizes.dv}, "(B,T,NH,DV)");
  for (const auto& [name, gate] : {std::pair("igate", a.igate), std::pair("fgate", a.fgate)})
    check_shape(kOp, name, gate, {sizes.batch, sizes.time, sizes.num_heads}, "(B,T,NH)");
  check_inputs(kOp, a.q, a.k, a.v, a.igate, a.fgate);
  is_sigmoid_input_gate(kOp, a.input_gate);
  check_numbers(kOp, a.eps, a.scale);
  TORCH_CHECK(a.chunk_size >= 0, kOp, ": chunk_size: expected 0 (automatic) or more, got ",
              a.chunk_size);
  check_reset(kOp, a.reset, sizes.batch, sizes.time);
  if (a.cu_seqlens) sizes.num_sequences = count_sequences(*a.cu_seqlens, sizes);
  const int64_t count = sizes.num_sequences;
  if (a.c0)
    check_state(kOp, "c0", *a.c0, {count, sizes.num_heads, sizes.dqk, sizes.dv},
                "(B or N,NH,DQK,DV)", a.q);
  if (a.n0)
    check_state(kOp, "n0", *a.n0, {count, sizes.num_heads, sizes.dqk}, "(B or N,NH,DQK)", a.q);
  if (a.m0) check_state(kOp, "m0", *a.m0, {count, sizes.num_heads}, "(B or N,NH)", a.q);
  check_whole_state(a);
  return sizes;
}

MlstmSizes check_mlstm_backward_arguments(const MlstmBackwardArguments& a) {
  check_mlstm_devices(a);
  const MlstmSizes sizes = check_mlstm_arguments(a.in);
  const at::Tensor& q = a.in.q;
  const int64_t count = sizes.num_sequences, heads = sizes.num_heads;
  check_shape(kBackwardOp, "h", a.h, a.in.v.sym_sizes(), "(B,T,NH,DV)");
  check_dtype(kBackwardOp, "h", a.h, q.scalar_type());
  check_state(kBackwardOp, "product", a.product, {sizes.batch, sizes.time, heads}, "(B,T,NH)", q);
  if (a.dh) {
    check_shape(kBackwardOp, "dh", *a.dh, a.in.v.sym_sizes(), "(B,T,NH,DV)");
    check_floating(kBackwardOp, "dh", *a.dh);
  }
  if (a.dc)
    check_state(kBackwardOp, "dc", *a.dc, {count, heads, sizes.dqk, sizes.dv}, "(B or N,NH,DQK,DV)",
                q);
  if (a.dn) check_state(kBackwardOp, "dn", *a.dn, {count, heads, sizes.dqk}, "(B or N,NH,DQK)", q);
  return sizes;
}

MlstmSizes check_mlstm_step_arguments(const MlstmStepArguments& a, std::string_view op) {
  check_mlstm_devices(a, op);
  check_rank(op, "q", a.q, 3);
  check_rank(op, "v", a.v, 3);
  const MlstmSizes sizes{a.q.size(0), 1, a.q.size(1), a.q.size(2), a.v.size(2), a.q.size(0)};
  TORCH_CHECK(sizes.dqk >= 1, op, ": q: expected (B,NH,DQK) with DQK >= 1, got ", a.q.sizes());
  check_shape(op, "k", a.k, a.q.sym_sizes(), "(B,NH,DQK)");
  check_shape(op, "v", a.v, {sizes.batch, sizes.num_heads, sizes.dv}, "(B,NH,DV)");
  for (const auto& [name, gate] : {std::pair("igate", a.igate), std::pair("fgate", a.fgate)})
    check_shape(op, name, gate, {sizes.batch, sizes.num_heads}, "(B,NH)");
  check_inputs(op, a.q, a.k, a.v, a.igate, a.fgate);
  is_sigmoid_input_gate(op, a.input_gate);
  check_step_states(op, a.c, a.n, a.m, sizes, a.q);
  check_numbers(op, a.eps, a.scale);
  check_apart({a.c, a.n, a.m}, {a.q, a.k, a.v, a.igate, a.fgate});
  return sizes;
}

MlstmSizes check_mlstm_lazy_arguments(const MlstmLazyArguments& a) {
  const MlstmSizes sizes = check_mlstm_step_arguments(a, a.kName);
  check_ring_devices(a.kName, a.ring, a.q.device());
  check_ring(a.kName, a.ring, sizes, a.q);
  check_apart({a.ring.keys, a.ring.values, a.ring.gates, a.ring.count},
              {a.q, a.k, a.v, a.igate, a.fgate, a.c, a.n, a.m});
  return sizes;
}

MlstmSizes check_mlstm_fold_arguments(const MlstmFoldArguments& a) {
  check_mlstm_devices(a);
  check_rank(a.kName, "c", a.c, 4);
  const MlstmSizes sizes{a.c.size(0), 1, a.c.size(1), a.c.size(2), a.c.size(3), a.c.size(0)};
  check_floating(a.kName, "keys", a.ring.keys);
  check_step_states(a.kName, a.c, a.n, a.m, sizes, a.ring.keys);
  check_ring(a.kName, a.ring, sizes, a.ring.keys);
  is_sigmoid_input_gate(a.kName, a.input_gate);
  check_apart({a.c, a.n, a.m, a.ring.count}, {a.ring.keys, a.ring.values, a.ring.gates});
  return sizes;
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
