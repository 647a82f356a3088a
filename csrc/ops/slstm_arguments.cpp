#include "csrc/ops/slstm_arguments.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>
#include <vector>

namespace xlstm::ops {
namespace {

std::string shape_of(const at::Tensor& t) {
  std::string text = "(";
  for (const auto& size : t.sym_sizes()) {
    if (text.size() > 1) text += ",";
    const auto number = size.maybe_as_int();
    text += number ? std::to_string(*number) : std::string("s");
  }
  return text + ") " + c10::toString(t.scalar_type());
}

void check_shape(const at::Tensor& t, const char* name, c10::SymIntArrayRef sizes,
                 const char* meaning) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i)
    same = t.sym_size(static_cast<int64_t>(i)) == sizes[i];
  std::string expected = "(";
  for (size_t i = 0; !same && i < sizes.size(); ++i) {
    const auto number = sizes[i].maybe_as_int();
    expected += (i ? "," : "") + (number ? std::to_string(*number) : std::string("s"));
  }
  TORCH_CHECK(same, "slstm: ", name, ": expected ", meaning, " = ", expected, "), got ",
              shape_of(t));
}

void check_parameter(const at::Tensor& t, const char* name, const at::Tensor& wx) {
  const at::ScalarType state = slstm_state_type(wx.scalar_type());
  TORCH_CHECK(t.scalar_type() == wx.scalar_type() || t.scalar_type() == state, "slstm: ", name,
              ": expected ",
              wx.scalar_type() == state
                  ? ""
                  : std::string(c10::toString(wx.scalar_type())) + " (as wx) or ",
              c10::toString(state), ", got ", c10::toString(t.scalar_type()));
  TORCH_CHECK(t.device() == wx.device(), "slstm: ", name, ": expected on ", wx.device(),
              " as wx, got ", t.device());
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
  const at::ScalarType type = slstm_state_type(a.wx.scalar_type());
  const std::array<std::pair<const char*, const OptionalTensor*>, 4> states{
      {{"y0", &a.y0}, {"c0", &a.c0}, {"n0", &a.n0}, {"m0", &a.m0}}};
  for (const auto& [name, state] : states) {
    if (!state->has_value()) continue;
    check_shape(**state, name, {count, a.wx.sym_size(3), a.wx.sym_size(4)},
                a.cu_seqlens ? "(sequences,NH,DH)" : "(B,NH,DH)");
    TORCH_CHECK((*state)->scalar_type() == type, "slstm: ", name, ": expected ",
                c10::toString(type), ", got ", c10::toString((*state)->scalar_type()));
    TORCH_CHECK((*state)->device() == a.wx.device(), "slstm: ", name, ": expected on ",
                a.wx.device(), " as wx, got ", (*state)->device());
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

at::ScalarType slstm_state_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

void check_slstm_arguments(const SlstmArguments& a) {
  slstm_cell(a.cell);
  check_clip(a.recurrent_clip);
  const at::ScalarType type = a.wx.scalar_type();
  TORCH_CHECK(a.wx.dim() == 5 && a.wx.sym_size(2) == 4,
              "slstm: wx: expected (B,T,4,NH,DH), gates in the order i, f, z, o, got ",
              shape_of(a.wx));
  TORCH_CHECK(a.wx.sym_size(3) >= 1 && a.wx.sym_size(4) >= 1,
              "slstm: wx: expected NH >= 1 and DH >= 1, got ", shape_of(a.wx));
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      "slstm: wx: expected float32, float64, bfloat16 or float16, got ", c10::toString(type));
  const c10::SymInt heads = a.wx.sym_size(3), dh = a.wx.sym_size(4);
  check_shape(a.r, "r", {4, heads, dh, dh}, "(4,NH,DH,DH)");
  check_shape(a.b, "b", {4, heads, dh}, "(4,NH,DH)");
  check_parameter(a.r, "r", a.wx);
  check_parameter(a.b, "b", a.wx);
  if (a.cu_seqlens) {
    TORCH_CHECK(a.cu_seqlens->dim() == 1 && a.cu_seqlens->sym_size(0) >= 1 &&
                    a.cu_seqlens->scalar_type() == at::kInt,
                "slstm: cu_seqlens: expected (sequences + 1) int32, got ", shape_of(*a.cu_seqlens));
    TORCH_CHECK(a.cu_seqlens->device() == a.wx.device(), "slstm: cu_seqlens: expected on ",
                a.wx.device(), " as wx, got ", a.cu_seqlens->device());
    TORCH_CHECK(a.wx.sym_size(0) == 1, "slstm: wx: expected B = 1 with cu_seqlens, got ",
                shape_of(a.wx));
  }
  check_states(a, state_count(a.cu_seqlens, a.wx));
  if (!a.reset) return;
  check_shape(*a.reset, "reset", {a.wx.sym_size(0), a.wx.sym_size(1)}, "(B,T)");
  TORCH_CHECK(a.reset->scalar_type() == at::kBool, "slstm: reset: expected bool, got ",
              c10::toString(a.reset->scalar_type()));
  TORCH_CHECK(a.reset->device() == a.wx.device(), "slstm: reset: expected on ", a.wx.device(),
              " as wx, got ", a.reset->device());
}

void check_slstm_backward_arguments(const SlstmBackwardArguments& a) {
  slstm_cell(a.cell);
  check_clip(a.recurrent_clip);
  TORCH_CHECK(a.y.dim() == 4, "slstm_backward: y: expected (B,T,NH,DH), got ", shape_of(a.y));
  TORCH_CHECK(a.wx.has_value() == a.b.has_value(),
              "slstm_backward: wx and b: expected both or neither");
  const Sizes y = a.y.sym_sizes().vec();
  check_shape(a.r, "r", {4, y[2], y[3], y[3]}, "(4,NH,DH,DH)");
  if (a.wx) check_shape(*a.wx, "wx", {y[0], y[1], 4, y[2], y[3]}, "(B,T,4,NH,DH)");
  if (a.dy) check_shape(*a.dy, "dy", y, "(B,T,NH,DH)");
}

void check_slstm_saved(const SlstmBackwardArguments& a, bool preactivations) {
  const cpu::SlstmCell cell = slstm_cell(a.cell);
  const Sizes y = a.y.sym_sizes().vec();
  check_shape(a.checkpoints, "checkpoints",
              checkpoint_sizes(y, state_count(a.cu_seqlens, a.y), a.cu_seqlens.has_value(), cell,
                               a.recompute(), preactivations),
              preactivations ? "(slots,NH,K,DH)" : "(B,NH,ceil(T/16),K,DH)");
  if (a.recompute()) return;
  if (preactivations) {
    check_shape(a.gates, "gates", {y[0], y[1], 4, y[2], y[3]}, "(B,T,4,NH,DH)");
  } else {
    check_shape(a.gates, "gates", {y[0], y[2], y[1], cpu::slstm_saved_gates(cell), y[3]},
                "(B,NH,T,S,DH)");
  }
}

SlstmResults empty_slstm_results(const SlstmArguments& a, bool saved) {
  const cpu::SlstmCell cell = slstm_cell(a.cell);
  const Sizes y{a.wx.sym_size(0), a.wx.sym_size(1), a.wx.sym_size(3), a.wx.sym_size(4)};
  const auto options = a.wx.options().dtype(slstm_state_type(a.wx.scalar_type()));
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
  const at::Tensor ends = cu_seqlens->to(at::kCPU).contiguous();
  const int32_t* const end = ends.const_data_ptr<int32_t>();
  const int64_t count = ends.size(0) - 1;
  TORCH_CHECK(end[0] == 0 && end[count] == time,
              "slstm: cu_seqlens: expected to go from 0 to T = ", time, ", got ", end[0], " to ",
              end[count]);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(end[i] <= end[i + 1], "slstm: cu_seqlens: expected no falling values, got ", end[i],
                " before ", end[i + 1]);
    rows.push_back({0, end[i], end[i + 1] - end[i], i});
  }
  std::stable_sort(rows.begin(), rows.end(), [](const cpu::SlstmRow& a, const cpu::SlstmRow& b) {
    return a.length > b.length;
  });
  return rows;
}

SlstmGradients empty_slstm_gradients(const SlstmBackwardArguments& a) {
  const Sizes y = a.y.sym_sizes().vec();
  const auto options = a.y.options().dtype(slstm_state_type(a.y.scalar_type()));
  const Sizes state{state_count(a.cu_seqlens, a.y), y[2], y[3]};
  return {
      empty_gates(y, a.y.options(), a.gate_dim),  at::empty_symint({4, y[2], y[3], y[3]}, options),
      at::empty_symint({4, y[2], y[3]}, options), at::empty_symint(state, options),
      at::empty_symint(state, options),           at::empty_symint(state, options)};
}

}  // namespace xlstm::ops
