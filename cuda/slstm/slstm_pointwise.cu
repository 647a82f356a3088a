// Step by step, between matrix products of the caller: one thread per unit and sequence.
#include <stdexcept>

#include "cuda/prim/launch.h"
#include "cuda/slstm/slstm_block.cuh"
#include "cuda/slstm/slstm_gates.cuh"
#include "cuda/slstm/slstm_launch.h"

namespace xlstm::cuda {
namespace {

/// What a thread works on.
struct PointwisePlace {
  SlstmRow row;
  int head, unit;
  int64_t state;  ///< place in (N,NH,DH)

  DEVICE_FUNCTION explicit PointwisePlace(const SlstmShape& s)
      : state(int64_t{prim::block_idx().x} * kSlstmThreads + prim::thread_idx().x) {
    const int64_t per_sequence = int64_t{s.num_heads} * s.dh, sequence = state / per_sequence;
    row = slstm_row(s, static_cast<int>(sequence < s.num_sequences ? sequence : s.num_sequences));
    head = static_cast<int>(state % per_sequence / s.dh);
    unit = static_cast<int>(state % s.dh);
  }
  /// Place in contiguous (N,4,NH,DH) of gate 0; the others follow at NH DH each.
  DEVICE_FUNCTION int64_t gates(const SlstmShape& s) const {
    const int64_t per_sequence = int64_t{s.num_heads} * s.dh;
    return state + 3 * (state / per_sequence) * per_sequence;
  }
};

template <class Cell>
class PointwiseForward {
 public:
  DEVICE_FUNCTION explicit PointwiseForward(const SlstmPointwiseForward& params)
      : step(params.step), p(params.all), s(p.shape), at(s) {}

  DEVICE_FUNCTION void run() {
    const int t = static_cast<int>(step.t), length = at.row.length;
    if (at.row.sequence < 0 || (t >= length && t > 0)) return;
    float y = 0;
    CellState state = t == 0 ? start(y) : running();
    if (t < length) {
      const bool reset = slstm_reset(s, at.row, t);
      if (reset) state = empty_state();
      keep(t, state);
      const bool product = !reset && (t > 0 || s.in.y0 != nullptr);
      const CellStep r = Cell::step(gates(t, product), state);
      state = r.after;
      y = r.o * r.hidden;
      store_number(p.call.y.data, slstm_offset(p.call.y, at.row, t, at.head, at.unit), s.dtype, y);
      if (step.y != nullptr) store_number(step.y, at.state, s.dtype, y);
    }
    p.call.y_last[at.state] = y;
    p.call.c[at.state] = state.c;
    if (Cell::kStates == 3) p.call.n[at.state] = state.n, p.call.m[at.state] = state.m;
  }

 private:
  DEVICE_FUNCTION CellState start(float& y) const {
    CellState state = empty_state();
    if (s.in.y0 == nullptr) return state;
    y = s.in.y0[at.state];
    state.c = s.in.c0[at.state];
    if (Cell::kStates == 3) state.n = s.in.n0[at.state], state.m = p.call.m0[at.state];
    return state;
  }
  DEVICE_FUNCTION CellState running() const {
    CellState state = empty_state();
    state.c = p.call.c[at.state];
    if (Cell::kStates == 3) state.n = p.call.n[at.state], state.m = p.call.m[at.state];
    return state;
  }
  DEVICE_FUNCTION void keep(int t, const CellState& state) const {
    if (p.call.checkpoints == nullptr || t % static_cast<int>(kSlstmCheckpointTokens) != 0) return;
    float* to =
        p.call.checkpoints + slstm_checkpoint(s, at.row, t, at.head, at.unit, Cell::kStates);
    to[0] = state.c;
    if (Cell::kStates == 3) to[s.dh] = state.n, to[2 * s.dh] = state.m;
  }
  DEVICE_FUNCTION CellGates gates(int t, bool product) const {
    const int64_t x = slstm_offset(p.call.wx, at.row, t, at.head, at.unit);
    const int64_t r = at.row.sequence * step.product.batch + at.head * step.product.head +
                      at.unit * step.product.unit;
    CellGates out;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t b = (int64_t{gate} * s.num_heads + at.head) * s.dh + at.unit;
      out.g[gate] = load_number(p.call.wx.data, x + gate * p.call.wx.gate, s.dtype) +
                    load_number(p.call.b, b, p.b_dtype);
      if (product)
        out.g[gate] +=
            load_number(step.product.data, r + gate * step.product.gate, step.product_dtype);
      if (p.call.gates.data == nullptr) continue;
      const int64_t kept =
          slstm_offset(p.call.gates, at.row, t, at.head, at.unit) + gate * p.call.gates.gate;
      store_number(p.call.gates.data, kept, s.gates_dtype, out.g[gate]);
    }
    return out;
  }

  const SlstmStep& step;
  const SlstmForwardParams& p;
  const SlstmShape& s;
  const PointwisePlace at;
};

template <class Cell>
class PointwiseBackward {
 public:
  DEVICE_FUNCTION explicit PointwiseBackward(const SlstmPointwiseBackward& params)
      : step(params.step), p(params.all), s(p.shape), at(s) {}

  DEVICE_FUNCTION void run() {
    const int t = static_cast<int>(step.t), length = at.row.length;
    if (at.row.sequence < 0 || (t >= length && length > 0)) return;
    const bool last = t + 1 >= length;
    CellGradient d = last ? CellGradient{number(p.call.dc), number(p.call.dn)}
                          : CellGradient{number(p.call.dc0), number(p.call.dn0)};
    if (t < length) {
      float dy = last ? number(p.call.dy_last) : recurrent(t);
      if (p.call.dy.data != nullptr)
        dy += load_number(p.call.dy.data, slstm_offset(p.call.dy, at.row, t, at.head, at.unit),
                          s.dtype);
      const CellState before = state_before(t);
      const CellSlopes slopes = Cell::slopes(Cell::step(gates(t), before), before);
      const CellGates out = cell_gradients(slopes, dy, d);
      write(t, out);
      if (slstm_reset(s, at.row, t)) d = {0, 0};
    } else if (t > 0) {
      return;
    }
    p.call.dc0[at.state] = d.dc;
    if (Cell::kStates == 3) p.call.dn0[at.state] = d.dn;
  }

 private:
  DEVICE_FUNCTION float number(const float* x) const { return x == nullptr ? 0.0F : x[at.state]; }
  DEVICE_FUNCTION float recurrent(int t) const {
    if (p.call.recurrent_cut || slstm_reset(s, at.row, t + 1)) return 0;
    const float value = number(step.dy_recurrent), clip = p.call.recurrent_clip;
    return clip > 0 ? (value > clip ? clip : value < -clip ? -clip : value) : value;
  }
  DEVICE_FUNCTION CellGates gates(int t) const {
    const int64_t from = slstm_offset(p.call.gates, at.row, t, at.head, at.unit);
    CellGates out;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      out.g[gate] = load_number(p.call.gates.data, from + gate * p.call.gates.gate, s.gates_dtype);
    return out;
  }
  /// From the checkpoint before token t.
  DEVICE_FUNCTION CellState state_before(int t) const {
    const int begin = t - t % static_cast<int>(kSlstmCheckpointTokens);
    const float* from =
        p.call.checkpoints + slstm_checkpoint(s, at.row, begin, at.head, at.unit, Cell::kStates);
    CellState state = empty_state();
    state.c = from[0];
    if (Cell::kStates == 3) state.n = from[s.dh], state.m = from[2 * s.dh];
    for (int i = begin; i < t; ++i) {
      state = Cell::step(gates(i), state).after;
      if (slstm_reset(s, at.row, i + 1)) state = empty_state();
    }
    return state;
  }
  DEVICE_FUNCTION void write(int t, const CellGates& out) const {
    const int64_t to = slstm_offset(p.call.dwx, at.row, t, at.head, at.unit);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      store_number(p.call.dwx.data, to + gate * p.call.dwx.gate, s.dtype, out.g[gate]);
      if (step.dwx != nullptr)
        store_number(step.dwx, at.gates(s) + int64_t{gate} * s.num_heads * s.dh, s.dtype,
                     out.g[gate]);
    }
  }

  const SlstmStep& step;
  const SlstmBackwardParams& p;
  const SlstmShape& s;
  const PointwisePlace at;
};

template <SlstmCell kCell, bool kFast>
KERNEL_FUNCTION(kSlstmThreads, 4)
slstm_pointwise_forward_step(const GRID_CONSTANT SlstmPointwiseForward p) {
  PointwiseForward<CellPolicy<kCell, kFast>>(p).run();
}
template <SlstmCell kCell, bool kFast>
KERNEL_FUNCTION(kSlstmThreads, 4)
slstm_pointwise_backward_step(const GRID_CONSTANT SlstmPointwiseBackward p) {
  PointwiseBackward<CellPolicy<kCell, kFast>>(p).run();
}

prim::LaunchShape shape_of(const SlstmShape& s) {
  const int64_t count = int64_t{s.num_sequences} * s.num_heads * s.dh;
  return {static_cast<u32>((count + kSlstmThreads - 1) / kSlstmThreads), kSlstmThreads, 0};
}

template <SlstmCell kCell>
void launch_cell(const SlstmPointwiseForward& p, Stream stream) {
  const bool fast = p.all.shape.dtype == Dtype::kBFloat16;
  prim::launch(
      "slstm_pointwise_forward_step",
      fast ? slstm_pointwise_forward_step<kCell, true> : slstm_pointwise_forward_step<kCell, false>,
      shape_of(p.all.shape), p, stream);
}
template <SlstmCell kCell>
void launch_cell(const SlstmPointwiseBackward& p, Stream stream) {
  const bool fast = p.all.shape.dtype == Dtype::kBFloat16;
  prim::launch("slstm_pointwise_backward_step",
               fast ? slstm_pointwise_backward_step<kCell, true>
                    : slstm_pointwise_backward_step<kCell, false>,
               shape_of(p.all.shape), p, stream);
}

template <class Params>
void launch_pointwise(SlstmCell cell, const Params& p, Stream stream) {
  if (cell == SlstmCell::kSlstm) {
    launch_cell<SlstmCell::kSlstm>(p, stream);
  } else if (cell == SlstmCell::kSlstmExpf) {
    launch_cell<SlstmCell::kSlstmExpf>(p, stream);
  } else {
    launch_cell<SlstmCell::kLstm>(p, stream);
  }
}

}  // namespace

void slstm_pointwise_forward(const SlstmProblem& problem, const SlstmForward& call,
                             const SlstmStep& step, Stream stream) {
  SlstmPointwiseForward p;
  p.all.shape = slstm_shape(problem, SlstmMap(), call.in);
  p.all.b_dtype = problem.b_dtype;
  p.all.call = call;
  p.step = step;
  launch_pointwise(problem.cell, p, stream);
}

void slstm_pointwise_backward(const SlstmProblem& problem, const SlstmBackward& call,
                              const SlstmStep& step, Stream stream) {
  SlstmPointwiseBackward p;
  p.all.shape = slstm_shape(problem, SlstmMap(), call.in);
  p.all.call = call;
  p.step = step;
  launch_pointwise(problem.cell, p, stream);
}

}  // namespace xlstm::cuda
