// The sLSTM operators on the CPU: from tensors to the plain parameters of csrc/ops/cpu, work items over the threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "csrc/ops/cpu/slstm_params.h"
#include "csrc/ops/rows.h"
#include "csrc/ops/slstm_arguments.h"

namespace xlstm::ops {
namespace {

using cpu::SlstmRow;

cpu::SlstmDtype dtype_code(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return cpu::SlstmDtype::kFloat64;
    case at::kBFloat16:
      return cpu::SlstmDtype::kBFloat16;
    case at::kHalf:
      return cpu::SlstmDtype::kFloat16;
    default:
      return cpu::SlstmDtype::kFloat32;
  }
}

/// Tiles of rows per head such that the slowest thread has the least to do: a step costs its rows and, for reading the
/// recurrent matrix, about four more.
int64_t tiles_per_head(int64_t rows, int64_t heads) {
  constexpr int64_t kMatrixCost = 4, kLargestTile = 32;
  const int64_t threads = at::get_num_threads();
  int64_t best = 1, best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t tiles = std::max<int64_t>(1, rows / kLargestTile); tiles <= rows; ++tiles) {
    const int64_t turns = (heads * tiles + threads - 1) / threads;
    const int64_t cost = turns * ((rows + tiles - 1) / tiles + kMatrixCost);
    if (cost < best_cost) best = tiles, best_cost = cost;
    if (heads * tiles >= 2 * threads && tiles * kLargestTile >= 2 * rows) break;
  }
  return best;
}

/// y (B,T,NH,DH)
void set_shape(cpu::SlstmShape& p, const at::Tensor& y, const std::vector<SlstmRow>& rows,
               const at::Tensor& reset, std::string_view cell) {
  const at::ScalarType dtype = y.scalar_type();
  p.time = y.size(1);
  p.heads = y.size(2);
  p.dh = y.size(3);
  p.cell = slstm_cell(cell);
  p.dtype = dtype_code(dtype);
  const int64_t lanes = dtype == at::kDouble ? 8 : 16;
  p.dh_padded = (p.dh + lanes - 1) / lanes * lanes;
  p.rows = rows.data();
  p.row_count = static_cast<int64_t>(rows.size());
  const int64_t tiles = tiles_per_head(p.row_count, p.heads);
  p.tile_rows = std::max<int64_t>(1, (p.row_count + tiles - 1) / tiles);
  p.tile_count = (p.row_count + p.tile_rows - 1) / p.tile_rows;
  p.checkpoint_slots = (p.time + cpu::kSlstmSegment - 1) / cpu::kSlstmSegment;
  p.reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr;
  if (reset.defined()) std::copy_n(reset.strides().begin(), 2, p.reset_stride);
}

/// Runs kernel on all items, `space` Reals of workspace per thread; one thread where the work is not worth more.
template <class Params>
void run_items(const Params& params, int64_t space, void (*kernel)(const Params&)) {
  constexpr double kWorthAThread = 2e6;  // floating point operations
  const int64_t items = params.heads * params.tile_count;
  const double each =
      8.0 * static_cast<double>(params.dh * params.dh) *
      static_cast<double>(params.row_count > 0 ? params.rows[0].length * params.tile_rows : 0);
  const int64_t grain = each > 0 ? static_cast<int64_t>(kWorthAThread / each) + 1 : items;
  const int64_t real_bytes = params.dtype == cpu::SlstmDtype::kFloat64 ? 8 : 4;
  at::parallel_for(0, items, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    const at::DataPtr workspace =
        c10::GetCPUAllocator()->allocate(static_cast<size_t>(space * real_bytes));
    Params part = params;
    part.workspace = workspace.get();
    part.item_begin = begin;
    part.item_end = end;
    kernel(part);
  });
}

at::Tensor in_type(const OptionalTensor& t, at::ScalarType type) {
  return t ? t->to(type).contiguous() : at::Tensor();
}
const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_data_of(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

/// Everything that a kernel's inputs point to, in the type of computation.
struct InputTensors {
  at::Tensor wx, r, b, y0, c0, n0, m0, reset;

  template <class Arguments>
  InputTensors(const Arguments& a, at::ScalarType type)
      : r(in_type(a.r, type)),
        b(in_type(a.b, type)),
        y0(in_type(a.y0, type)),
        c0(in_type(a.c0, type)),
        n0(in_type(a.n0, type)),
        m0(in_type(a.m0, type)),
        reset(in_type(a.reset, at::kBool)) {}

  void set(cpu::SlstmInputs& p) const {
    p.wx = data_of(wx);
    if (wx.defined()) std::copy_n(wx.strides().begin(), 5, p.wx_stride);
    p.r = data_of(r);
    p.b = data_of(b);
    p.y0 = data_of(y0);
    p.c0 = data_of(c0);
    p.n0 = data_of(n0);
    p.m0 = data_of(m0);
  }
};

SlstmResults forward_cpu(const SlstmArguments& a, bool saved) {
  check_slstm_arguments(a);
  SlstmResults results = empty_slstm_results(a, saved);
  const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
  InputTensors inputs(a, accumulate_type(a.wx.scalar_type()));
  inputs.wx = a.wx;
  const std::vector<SlstmRow> rows = slstm_sequences(a.wx.size(0), a.wx.size(1), a.cu_seqlens);

  cpu::SlstmForwardParams p{};
  set_shape(p, y, rows, inputs.reset, a.cell);
  inputs.set(p);
  p.recompute = a.recompute;
  p.y = y.mutable_data_ptr();
  p.y_last = y_last.mutable_data_ptr();
  p.c = c.mutable_data_ptr();
  p.n = n.mutable_data_ptr();
  p.m = m.mutable_data_ptr();
  p.gates = a.recompute ? nullptr : mutable_data_of(gates);
  p.checkpoints = mutable_data_of(checkpoints);
  if (p.cell == cpu::SlstmCell::kLstm) {
    n.zero_();
    m.zero_();
  }
  if (saved && a.cu_seqlens) checkpoints.zero_();  // not every slot has a writer
  run_items(p, cpu::slstm_forward_workspace(p.tile_rows, p.dh, p.dh_padded),
            &cpu::slstm_forward_items);
  return results;
}

SlstmOutputs slstm_cpu(const SlstmArguments& a) {
  auto [y, y_last, c, n, m, gates, checkpoints] = forward_cpu(a, false);
  return {y, y_last, c, n, m};
}

SlstmResults slstm_forward_cpu(const SlstmArguments& a) {
  TORCH_CHECK(!a.preactivations, "slstm_forward: preactivations: expected False on the CPU");
  return forward_cpu(a, true);
}

SlstmGradients slstm_backward_cpu(const SlstmBackwardArguments& a) {
  check_slstm_backward_arguments(a);
  check_slstm_saved(a, false);
  const at::ScalarType type = accumulate_type(a.y.scalar_type());
  const at::Tensor dy = a.dy ? a.dy->to(a.y.scalar_type()) : at::Tensor(),
                   dy_last = in_type(a.dy_last, type), dc = in_type(a.dc, type),
                   dn = in_type(a.dn, type), gates = a.gates.contiguous(),
                   checkpoints = a.checkpoints.contiguous();
  InputTensors inputs(a, type);
  if (a.wx) inputs.wx = *a.wx;
  const std::vector<SlstmRow> rows = slstm_sequences(a.y.size(0), a.y.size(1), a.cu_seqlens);
  SlstmGradients gradients = empty_slstm_gradients(a);
  auto& [dwx, dr, db, dy0, dc0, dn0] = gradients;

  cpu::SlstmBackwardParams p{};
  set_shape(p, a.y, rows, inputs.reset, a.cell);
  inputs.set(p);
  p.recompute = a.recompute();
  p.recurrent_clip = a.recurrent_clip;
  p.recurrent_cut = a.recurrent_cut;
  const at::Tensor dr_parts =
                       at::empty({p.heads, p.tile_count, 4, p.dh, p.dh_padded}, dr.options()),
                   db_parts = at::empty({p.heads, p.tile_count, 4, p.dh_padded}, dr.options());
  p.dy = data_of(dy);
  if (p.dy) std::copy_n(dy.strides().begin(), 4, p.dy_stride);
  p.dy_last = data_of(dy_last);
  p.dc_last = data_of(dc);
  p.dn_last = data_of(dn);
  p.gates = p.recompute ? nullptr : gates.const_data_ptr();
  p.checkpoints = checkpoints.const_data_ptr();
  p.dwx = dwx.mutable_data_ptr();
  std::copy_n(dwx.strides().begin(), 5, p.dwx_stride);
  p.dr = dr_parts.mutable_data_ptr();
  p.db = db_parts.mutable_data_ptr();
  p.dy0 = dy0.mutable_data_ptr();
  p.dc0 = dc0.mutable_data_ptr();
  p.dn0 = dn0.mutable_data_ptr();
  if (p.cell == cpu::SlstmCell::kLstm) dn0.zero_();
  run_items(p, cpu::slstm_backward_workspace(p.tile_rows, p.dh, p.dh_padded, p.recompute),
            &cpu::slstm_backward_items);
  dr = dr_parts.sum(1).narrow(-1, 0, p.dh).transpose(0, 1).contiguous();
  db = db_parts.sum(1).narrow(-1, 0, p.dh).transpose(0, 1).contiguous();
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("slstm", slstm_kernel<slstm_cpu>);
  m.impl("slstm_forward", slstm_forward_kernel<slstm_forward_cpu>);
  m.impl("slstm_backward", slstm_backward_kernel<slstm_backward_cpu>);
}

}  // namespace xlstm::ops
