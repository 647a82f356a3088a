#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/ops/causal_conv1d_arguments.h"
#include "csrc/ops/cpu/causal_conv1d_params.h"
#include "csrc/ops/rows.h"
#include "csrc/ops/sequences.h"

namespace xlstm::ops {
namespace {

// Everything the kernels read, alive while they run.
struct Problem {
  cpu::CausalConv1dParams params;
  std::vector<cpu::ConvSequence> sequences;
  std::vector<cpu::ConvItem> items;
  at::Tensor x, weight, bias, state0, reset, dy, dstate;
};

std::vector<cpu::ConvSequence> packed_sequences(const at::Tensor& cu_seqlens, int64_t time) {
  const std::vector<int64_t> starts = sequence_starts("causal_conv1d", cu_seqlens, time);
  std::vector<cpu::ConvSequence> sequences;
  for (size_t i = 0; i + 1 < starts.size(); ++i)
    sequences.push_back({0, starts[i], starts[i + 1] - starts[i]});
  return sequences;
}

// Packs `tensor` unless its channels are contiguous.
at::Tensor unit_channels(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

void add_items(Problem& problem, bool with_state_grad) {
  const cpu::CausalConv1dParams& p = problem.params;
  for (int64_t i = 0; i < p.sequence_count; ++i) {
    const int64_t length = problem.sequences[i].length;
    int64_t begin = with_state_grad ? 1 - p.width : 0;
    for (int64_t end = 0; begin < length || begin < 0; begin = end) {
      end = std::min(length, std::max<int64_t>(begin, 0) + cpu::kConvItemRows);
      problem.items.push_back({i, begin, end});
    }
  }
}

Problem make_problem(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& state0, const OptionalTensor& reset,
                     const OptionalTensor& cu_seqlens, bool silu) {
  check_causal_conv1d({x, weight, bias, state0, reset, cu_seqlens, silu});
  Problem problem;
  cpu::CausalConv1dParams& p = problem.params;
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  p.dtype = dtype_code(x, "causal_conv1d: x");
  p.time = x.size(1);
  p.channels = x.size(2);
  p.width = weight.size(1);
  p.silu = silu;
  problem.x = unit_channels(x);
  problem.weight = weight.t().to(accumulate).contiguous();
  problem.bias = parameter(bias, accumulate);
  p.x = problem.x.const_data_ptr();
  p.x_batch_stride = problem.x.stride(0);
  p.x_time_stride = problem.x.stride(1);
  p.weight = problem.weight.const_data_ptr();
  p.bias = data_or_null(problem.bias);
  if (cu_seqlens) {
    problem.sequences = packed_sequences(*cu_seqlens, p.time);
  } else {
    for (int64_t b = 0; b < x.size(0); ++b) problem.sequences.push_back({b, 0, p.time});
  }
  p.sequences = problem.sequences.data();
  p.sequence_count = static_cast<int64_t>(problem.sequences.size());
  if (state0) {
    problem.state0 = state0->to(x.scalar_type()).contiguous();
    p.state0 = problem.state0.const_data_ptr();
  }
  if (reset) {
    problem.reset = reset->contiguous();
    p.reset = problem.reset.const_data_ptr<bool>();
  }
  return problem;
}

void set_items(Problem& problem) {
  problem.params.items = problem.items.data();
  problem.params.item_count = static_cast<int64_t>(problem.items.size());
}

std::tuple<at::Tensor, at::Tensor> causal_conv1d_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                     const OptionalTensor& bias,
                                                     const OptionalTensor& state0,
                                                     const OptionalTensor& reset,
                                                     const OptionalTensor& cu_seqlens, bool silu) {
  Problem problem = make_problem(x, weight, bias, state0, reset, cu_seqlens, silu);
  cpu::CausalConv1dParams& p = problem.params;
  add_items(problem, false);
  set_items(problem);
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor state = at::empty({p.sequence_count, p.width - 1, p.channels}, x.options());
  p.y = y.mutable_data_ptr();
  p.state = state.mutable_data_ptr();
  cpu::causal_conv1d(p);
  return {y, state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> causal_conv1d_backward_cpu(
    const OptionalTensor& dy, const OptionalTensor& dstate, const at::Tensor& x,
    const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state0,
    const OptionalTensor& reset, const OptionalTensor& cu_seqlens, bool silu) {
  Problem problem = make_problem(x, weight, bias, state0, reset, cu_seqlens, silu);
  cpu::CausalConv1dParams& p = problem.params;
  check_causal_conv1d_gradients({x, weight, bias, state0, reset, cu_seqlens, silu},
                                {x.size(0), p.time, p.channels, p.width, p.sequence_count}, dy,
                                dstate);
  add_items(problem, state0.has_value());
  set_items(problem);
  if (dy) {
    problem.dy = unit_channels(dy->to(x.scalar_type()));
    p.dy = problem.dy.const_data_ptr();
    p.dy_batch_stride = problem.dy.stride(0);
    p.dy_time_stride = problem.dy.stride(1);
  }
  if (dstate) {
    problem.dstate = dstate->to(x.scalar_type()).contiguous();
    p.dstate = problem.dstate.const_data_ptr();
  }
  const auto accumulate = x.options().dtype(accumulate_type(x.scalar_type()));
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor dstate0 = at::empty(state0 ? state0->sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor dweight = at::empty({p.width, p.channels}, accumulate);
  at::Tensor dbias = at::empty({bias ? p.channels : 0}, accumulate);
  const RowBlocks groups = row_blocks(p.item_count, 1);
  p.group_items = groups.rows;
  p.group_count = groups.count;
  const at::Tensor partials = at::empty({groups.count, p.width + 1, p.channels}, accumulate);
  p.dx = dx.mutable_data_ptr();
  p.dstate0 = state0 ? dstate0.mutable_data_ptr() : nullptr;
  p.partials = partials.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  cpu::causal_conv1d_backward(p);
  at::Tensor dweight_rows = dweight.t().to(weight.scalar_type()).contiguous();
  return {dx, dweight_rows, dbias.to(bias ? bias->scalar_type() : x.scalar_type()),
          state0 ? dstate0.to(state0->scalar_type()) : dstate0};
}

at::Tensor causal_conv1d_step_cpu(const at::Tensor& x, const at::Tensor& weight,
                                  const OptionalTensor& bias, at::Tensor& state, bool silu) {
  check_causal_conv1d_step(x, weight, bias, state);
  cpu::CausalConv1dStepParams p;
  p.dtype = dtype_code(x, "causal_conv1d_step: x");
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.width = weight.size(1);
  p.silu = silu;
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  at::Tensor rows = x;
  p.x = rows_of(rows);
  const at::Tensor weights = weight.t().to(accumulate).contiguous();
  const at::Tensor biases = parameter(bias, accumulate);
  p.weight = weights.const_data_ptr();
  p.bias = data_or_null(biases);
  at::Tensor window = unit_channels(state);
  p.state = window.mutable_data_ptr();
  p.state_batch_stride = window.stride(0);
  p.state_row_stride = window.stride(1);
  at::Tensor y = at::empty(x.sizes(), x.options());
  p.y = y.mutable_data_ptr();
  cpu::causal_conv1d_step(p);
  if (!window.is_same(state)) state.copy_(window);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("causal_conv1d", causal_conv1d_cpu);
  m.impl("causal_conv1d_backward", causal_conv1d_backward_cpu);
  m.impl("causal_conv1d_step", causal_conv1d_step_cpu);
}

}  // namespace xlstm::ops
