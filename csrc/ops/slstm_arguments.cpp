#include "csrc/ops/slstm_arguments.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "csrc/ops/common.h"
#include "csrc/ops/rows.h"
#include "csrc/ops/sequences.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "slstm", kBackwardOp = "slstm_backward";

/// In the type of wx or y, or in that of the states.
void check_parameter(std::string_view op, std::string_view name, const at::Tensor& t,
                     at::ScalarType type) {
  if (t.scalar_type() != type) check_dtype(op, name, t, accumulate_type(type));
}

void check_states(const SlstmArguments& a, const c10::SymInt& count) {
  const bool lstm = slstm_cell(a.cell) == cpu::SlstmCell::kLstm;
  TORCH_CHECK(a.y0.has_value() == a.c0.has_value(),
              "slstm: y0 and c0: expected both or neither, got only ",
              a.y0.has_value() ? "y0" : "c0");
  if (!lstm) {
    TORCH_CHECK(a.n0.has_value() == a.y0.has_value() && a.m0.has_value() == a.y0.has_value(),
                "slstm: y0, c0, n0 and m0: expected all or none with cell \"", a.cell, "\", got",
                a.y0 ? " y0 c0" : "", a.n0 ? " n0" : "", a.m0 ? " m0" : "");
  }
  const at::ScalarType type = accumulate_type(a.wx.scalar_type());
  const std::array<std::pair<const char*, const OptionalTensor*>, 4> states{
      {{"y0", &a.y0}, {"c0", &a.c0}, {"n0", &a.n0}, {"m0", &a.m0}}};
  for (const auto& [name, state] : states) {
    if (!state->has_value()) continue;
    check_shape(kOp, name, **state, {count, a.wx.sym_size(3), a.wx.sym_size(4)},
                a.cu_seqlens ? "(sequences,NH,DH)" : "(B,NH,DH)");
    check_dtype(kOp, name, **state, type);
  }
}

c10::SymInt state_count(const OptionalTensor& cu_seqlens, const at::Tensor& of_batch) {
  return cu_seqlens ? cu_seqlens->sym_size(0) - 1 : of_batch.sym_size(0);
}

void check_clip(double clip) {
  TORCH_CHECK(clip >= 0, "slstm: recurrent_clip: expected 0 (none) or a positive number, got ",
              clip);
}

using Sizes = std::vector<c10::SymInt>;

/// (B,T,4,NH,DH) with the gate axis at `gate_dim` of the memory.
at::Tensor empty_gates(Sizes sizes, const at::TensorOptions& options, int64_t gate_dim) {
  sizes.insert(sizes.begin() + gate_dim, c10::SymInt(4));
  std::vector<int64_t> order{0, 1, 2, 3};
  for (int64_t& axis : order) axis += axis >= gate_dim;
  order.insert(order.begin() + 2, gate_dim);
  return at::empty_symint(sizes, options).permute(order);
}

/// Of y's sizes.
Sizes checkpoint_sizes(const Sizes& y, const c10::SymInt& states, bool packed, cpu::SlstmCell cell,
                       bool recompute, bool preactivations) {
  const c10::SymInt segments = (y[1] + (cpu::kSlstmSegment - 1)) / cpu::kSlstmSegment;
  if (!preactivations)
    return {y[0], y[2], segments, cpu::slstm_checkpoint_states(cell, recompute), y[3]};
  const c10::SymInt whole = y[1] / cpu::kSlstmSegment;
  return {packed ? whole + states : y[0] * (whole + 1), y[2], cell == cpu::SlstmCell::kLstm ? 1 : 3,
          y[3]};
}

}  // namespace

cpu::SlstmCell slstm_cell(std::string_view name) {
  if (name == "slstm") return cpu::SlstmCell::kSlstm;
  if (name == "slstm_expf") return cpu::SlstmCell::kSlstmExpf;
  TORCH_CHECK(name == "lstm", "slstm: cell: expected \"slstm\", \"slstm_expf\" or \"lstm\", got \"",
              name, "\"");
  return cpu::SlstmCell::kLstm;
}

void check_slstm_arguments(const SlstmArguments& a) {
  slstm_cell(a.cell);
  check_clip(a.recurrent_clip);
  check_devices(kOp, a.wx.device(),
                {{"r", a.r},
                 {"b", a.b},
                 {"y0", a.y0},
                 {"c0", a.c0},
                 {"n0", a.n0},
                 {"m0", a.m0},
                 {"reset", a.reset},
                 {"cu_seqlens", a.cu_seqlens}});
  TORCH_CHECK(a.wx.dim() == 5 && a.wx.sym_size(2) == 4, kOp,
              ": wx: expected (B,T,4,NH,DH), gates in the order i, f, z, o, got ",
              a.wx.sym_sizes());
  const c10::SymInt heads = a.wx.sym_size(3), dh = a.wx.sym_size(4);
  TORCH_CHECK(heads >= 1 && dh >= 1, kOp, ": wx: expected NH >= 1 and DH >= 1, got ",
              a.wx.sym_sizes());
  check_floating(kOp, "wx", a.wx);
  check_shape(kOp, "r", a.r, {4, heads, dh, dh}, "(4,NH,DH,DH)");
  check_shape(kOp, "b", a.b, {4, heads, dh}, "(4,NH,DH)");
  check_parameter(kOp, "r", a.r, a.wx.scalar_type());
  check_parameter(kOp, "b", a.b, a.wx.scalar_type());
  if (a.cu_seqlens) check_cu_seqlens(kOp, *a.cu_seqlens, a.wx.sym_size(0));
  check_states(a, state_count(a.cu_seqlens, a.wx));
  check_reset(kOp, a.reset, a.wx.sym_size(0), a.wx.sym_size(1));
}

void check_slstm_backward_arguments(const SlstmBackwardArguments& a) {
  slstm_cell(a.cell);
  check_clip(a.recurrent_clip);
  check_devices(kBackwardOp, a.y.device(),
                {{"dy", a.dy},
                 {"dy_last", a.dy_last},
                 {"dc", a.dc},
                 {"dn", a.dn},
                 {"gates", a.gates},
                 {"checkpoints", a.checkpoints},
                 {"wx", a.wx},
                 {"r", a.r},
                 {"b", a.b},
                 {"y0", a.y0},
                 {"c0", a.c0},
                 {"n0", a.n0},
                 {"m0", a.m0},
                 {"reset", a.reset},
                 {"cu_seqlens", a.cu_seqlens}});
  check_rank(kBackwardOp, "y", a.y, 4);
  TORCH_CHECK(a.wx.has_value() == a.b.has_value(), kBackwardOp,
              ": wx and b: expected both or neither");
  check_floating(kBackwardOp, "y", a.y);
  TORCH_CHECK(a.gate_dim >= 0 && a.gate_dim <= 4, kBackwardOp,
              ": gate_dim: expected the place of the gate axis, 0 to 4, got ", a.gate_dim);
  const Sizes y = a.y.sym_sizes().vec();
  check_shape(kBackwardOp, "r", a.r, {4, y[2], y[3], y[3]}, "(4,NH,DH,DH)");
  check_parameter(kBackwardOp, "r", a.r, a.y.scalar_type());
  if (a.wx) {
    check_shape(kBackwardOp, "wx", *a.wx, {y[0], y[1], 4, y[2], y[3]}, "(B,T,4,NH,DH)");
    check_dtype(kBackwardOp, "wx", *a.wx, a.y.scalar_type());
    check_shape(kBackwardOp, "b", *a.b, {4, y[2], y[3]}, "(4,NH,DH)");
    check_parameter(kBackwardOp, "b", *a.b, a.y.scalar_type());
  }
  if (a.dy) check_shape(kBackwardOp, "dy", *a.dy, y, "(B,T,NH,DH)");
  if (a.cu_seqlens) check_cu_seqlens(kBackwardOp, *a.cu_seqlens, y[0]);
  check_reset(kBackwardOp, a.reset, y[0], y[1]);
  const Sizes state{state_count(a.cu_seqlens, a.y), y[2], y[3]};
  const std::array<std::pair<const char*, const OptionalTensor*>, 7> states{
      {{"dy_last", &a.dy_last},
       {"dc", &a.dc},
       {"dn", &a.dn},
       {"y0", &a.y0},
       {"c0", &a.c0},
       {"n0", &a.n0},
       {"m0", &a.m0}}};
  for (const auto& [name, tensor] : states)
    if (*tensor) check_shape(kBackwardOp, name, **tensor, state, "(B or sequences,NH,DH)");
}

void check_slstm_saved(const SlstmBackwardArguments& a, bool preactivations) {
  const cpu::SlstmCell cell = slstm_cell(a.cell);
  const Sizes y = a.y.sym_sizes().vec();
  const at::ScalarType type = accumulate_type(a.y.scalar_type());
  check_dtype(kBackwardOp, "checkpoints", a.checkpoints, type);
  check_shape(kBackwardOp, "checkpoints", a.checkpoints,
              checkpoint_sizes(y, state_count(a.cu_seqlens, a.y), a.cu_seqlens.has_value(), cell,
                               a.recompute(), preactivations),
              preactivations ? "(slots,NH,K,DH)" : "(B,NH,ceil(T/16),K,DH)");
  if (a.recompute()) return;
  check_dtype(kBackwardOp, "gates", a.gates, type);
  if (preactivations) {
    check_shape(kBackwardOp, "gates", a.gates, {y[0], y[1], 4, y[2], y[3]}, "(B,T,4,NH,DH)");
  } else {
    check_shape(kBackwardOp, "gates", a.gates,
                {y[0], y[2], y[1], cpu::slstm_saved_gates(cell), y[3]}, "(B,NH,T,S,DH)");
  }
}

SlstmResults empty_slstm_results(const SlstmArguments& a, bool saved) {
  const cpu::SlstmCell cell = slstm_cell(a.cell);
  const Sizes y{a.wx.sym_size(0), a.wx.sym_size(1), a.wx.sym_size(3), a.wx.sym_size(4)};
  const auto options = a.wx.options().dtype(accumulate_type(a.wx.scalar_type()));
  const c10::SymInt count = state_count(a.cu_seqlens, a.wx);
  const auto state = [&] { return at::empty_symint({count, y[2], y[3]}, options); };
  at::Tensor gates, checkpoints;
  if (saved) {
    if (a.recompute) {
      gates = at::empty({0}, options);
    } else if (a.preactivations) {
      gates = empty_gates(y, options, slstm_gate_dim(a.wx));
    } else {
      gates = at::empty_symint({y[0], y[2], y[1], cpu::slstm_saved_gates(cell), y[3]}, options);
    }
    checkpoints = at::empty_symint(
        checkpoint_sizes(y, count, a.cu_seqlens.has_value(), cell, a.recompute, a.preactivations),
        options);
  }
  return {
      at::empty_symint(y, a.wx.options()), state(), state(), state(), state(), gates, checkpoints};
}

int64_t slstm_gate_dim(const at::Tensor& wx) {
  const auto stride = wx.sym_strides();
  if (stride[2] < stride[4]) return 4;
  if (stride[2] < stride[3]) return 3;
  return stride[2] > stride[0] ? 0 : 2;
}

std::vector<cpu::SlstmRow> slstm_sequences(int64_t batch, int64_t time,
                                           const OptionalTensor& cu_seqlens) {
  std::vector<cpu::SlstmRow> rows;
  if (!cu_seqlens) {
    for (int64_t i = 0; i < batch; ++i) rows.push_back({i, 0, time, i});
    return rows;
  }
  const std::vector<int64_t> starts = sequence_starts(kOp, *cu_seqlens, time);
  for (size_t i = 0; i + 1 < starts.size(); ++i)
    rows.push_back({0, starts[i], starts[i + 1] - starts[i], static_cast<int64_t>(i)});
  std::stable_sort(rows.begin(), rows.end(), [](const cpu::SlstmRow& a, const cpu::SlstmRow& b) {
    return a.length > b.length;
  });
  return rows;
}

SlstmGradients empty_slstm_gradients(const SlstmBackwardArguments& a) {
  const Sizes y = a.y.sym_sizes().vec();
  const auto options = a.y.options().dtype(accumulate_type(a.y.scalar_type()));
  const Sizes state{state_count(a.cu_seqlens, a.y), y[2], y[3]};
  return {
      empty_gates(y, a.y.options(), a.gate_dim),  at::empty_symint({4, y[2], y[3], y[3]}, options),
      at::empty_symint({4, y[2], y[3]}, options), at::empty_symint(state, options),
      at::empty_symint(state, options),           at::empty_symint(state, options)};
}

}  // namespace xlstm::ops
