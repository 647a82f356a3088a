// The backward pass as a sequence of launches: gates again (twice where dv has chunks of its own), prep (G and z), [states
// that enter the segments,] dv, dq and dk by fused sweeps or by the state and out kernels, gate gradients last.
#include <algorithm>
#include <initializer_list>

#include "cuda/mlstm/hopper/mlstm_launch_sm90.h"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_plan.h"

namespace xlstm::cuda {
namespace {

/// A piece that not every call needs: these are as large as the states of all sequences.
float* take_if(bool needed, int64_t count, Workspace& workspace) {
  return needed ? workspace.take<float>(count) : nullptr;
}

struct BackwardMemory {
  GateRun* ends;  // of either chunks: those of dv are not shorter
  GateRecord *records, *dv_records;
  float *gamma, *dv_gamma, *z;
  void* g;  // (B,T,NH,DV), bfloat16 or float32
  float *dots_r, *dots_c;
  float *dc0, *dn0;      // the caller's, else where the gate gradients need them; or null
  float *end_c, *end_n;  // the final states, computed again for their gradients' sake; or null
  SegmentMemory forward_segments, reverse_segments;
  StateMemory states;  // C first, then dC in its place
  Anchors anchors;
  BackwardMemory(const MlstmPlan& plan, const MlstmProblem& problem, const MlstmBackward& call,
                 Workspace& workspace)
      : ends(workspace.take<GateRun>(positions_of(plan.chunks) / plan.chunks.length)),
        records(workspace.take<GateRecord>(positions_of(plan.chunks))),
        dv_records(workspace.take<GateRecord>(positions_of(plan.dv_chunks))),
        gamma(workspace.take<float>(positions_of(plan.chunks) / plan.chunks.length)),
        dv_gamma(workspace.take<float>(positions_of(plan.dv_chunks) / plan.dv_chunks.length)),
        z(workspace.take<float>(positions_of(plan.chunks))),
        g(workspace.take<uint16_t>(problem.batch * problem.time * problem.num_heads * problem.dv *
                                   plan.planes)),
        dots_r(workspace.take<float>(positions_of(plan.chunks) * plan.dot_tiles)),
        dots_c(workspace.take<float>(positions_of(plan.chunks) * plan.dot_tiles)),
        dc0(call.dc0),
        dn0(call.dn0),
        end_c(take_if(call.dc != nullptr, plan.items() * problem.dqk * problem.dv, workspace)),
        end_n(take_if(call.dn != nullptr, plan.items() * problem.dqk, workspace)),
        forward_segments(plan, problem, workspace),
        reverse_segments(plan, problem, workspace),
        states(plan, problem, workspace),
        anchors(take_anchors(plan, workspace)) {
    const bool has_start = call.in.c0 != nullptr || call.in.n0 != nullptr;
    if (dc0 == nullptr)
      dc0 = take_if(has_start, plan.items() * problem.dqk * problem.dv, workspace);
    if (dn0 == nullptr) dn0 = take_if(has_start, plan.items() * problem.dqk, workspace);
  }
};

/// One backward call: the pieces that every launch takes from.
struct Backward {
  const MlstmProblem& problem;
  const DeviceLimits& device;
  const MlstmBackward& call;
  const MlstmPlan& plan;
  const BackwardMemory& memory;
  Stream stream;

  Operand key_like(const View& view) const { return operand_of(view, problem.dqk, problem.dtype); }
  Operand value_like(const View& view) const { return operand_of(view, problem.dv, problem.dtype); }

  Operand g() const {
    const int64_t head = problem.dv, time = head * problem.num_heads, batch = time * problem.time;
    return operand_of({memory.g, batch, time, head, 1}, problem.dv,
                      plan.planes == 1 ? Dtype::kBFloat16 : Dtype::kFloat32);
  }

  void prepare() const {
    launch_gates(gates_params(plan.chunks, problem, call.in, memory.ends, memory.records,
                              memory.gamma, nullptr),
                 stream);
    if (plan.sm90_dv)
      launch_gates(gates_params(plan.dv_chunks, problem, call.in, memory.ends, memory.dv_records,
                                memory.dv_gamma, nullptr),
                   stream);
    PrepParams p;
    p.chunks = plan.chunks;
    p.h = value_like(call.h);
    p.dh = value_like(call.dh);
    p.records = memory.records;
    p.product = call.product;
    p.normalize = problem.normalize;
    p.eps = problem.eps;
    p.g = g();
    p.z = memory.z;
    launch_prep(p, stream);
  }

  StateParams state(bool reverse) const {
    StateParams p;
    p.chunks = plan.chunks;
    p.reverse = reverse;
    p.b = key_like(reverse ? call.in.q : call.in.k);
    p.x = reverse ? g() : value_like(call.in.v);
    p.records = memory.records;
    p.gamma = memory.gamma;
    p.z = reverse ? memory.z : nullptr;
    p.dqk = static_cast<int32_t>(problem.dqk);
    p.dv = static_cast<int32_t>(problem.dv);
    p.start_c = reverse ? call.dc : call.in.c0;
    p.start_n = reverse ? call.dn : call.in.n0;
    return p;
  }

  SweepParams sweep(Use use) const {
    SweepParams p;
    p.chunks = plan.chunks;
    const Operand q = key_like(call.in.q), k = key_like(call.in.k), v = value_like(call.in.v);
    p.a = use == Use::kDv ? k : use == Use::kDq ? g() : v;
    p.b = use == Use::kDv ? q : use == Use::kDq ? v : g();
    p.x = use == Use::kDv ? g() : use == Use::kDq ? k : q;
    p.out = use == Use::kDv   ? value_like(call.dv)
            : use == Use::kDq ? key_like(call.dq)
                              : key_like(call.dk);
    p.scale = problem.scale;
    p.records = memory.records;
    p.gamma = memory.gamma;
    p.dqk = static_cast<int32_t>(problem.dqk);
    p.dv = static_cast<int32_t>(problem.dv);
    if (use == Use::kDv && plan.sm90_dv) {
      p.chunks = plan.dv_chunks;
      p.records = memory.dv_records;
      p.gamma = memory.dv_gamma;
    }
    if (use != Use::kDv) {
      p.z = memory.z;
      p.dot = use == Use::kDq ? q : k;
      p.dots = use == Use::kDq ? memory.dots_r : memory.dots_c;
      if (plan.fused) p.anchors = memory.anchors;
    }
    return p;
  }

  /// Whether the plan has the sweep for sm_90a in that use.
  bool sm90(Use use) const {
    return plan.sm90 || (use == Use::kDv ? plan.sm90_dv : plan.sm90_wide);
  }
  bool sm90_takes() const {
    for (const Use use : {Use::kDv, Use::kDq, Use::kDk})
      if (sm90(use) && !sweep_sm90_takes(sweep(use))) return false;
    return true;
  }

  void run_fused() const {
    const SegmentStarts forward =
        segment_starts(plan, state(false), memory.forward_segments, device, stream);
    const SegmentStarts reverse =
        segment_starts(plan, state(true), memory.reverse_segments, device, stream);
    for (const Use use : {Use::kDv, Use::kDq, Use::kDk}) {
      SweepParams p = sweep(use);
      p.start_c = use == Use::kDq ? forward.c : reverse.c;
      p.start_n = use == Use::kDq ? forward.n : reverse.n;
      if (use == Use::kDq) p.end_c = memory.end_c, p.end_n = memory.end_n;
      if (use == Use::kDv) p.end_c = memory.dc0;
      if (use == Use::kDk) p.end_n = memory.dn0;
      (sm90(use) ? launch_sweep_sm90 : launch_sweep)(use, p, device, stream);
    }
  }

  AnchorParams anchors(bool dot) const {
    AnchorParams p;
    p.chunks = plan.chunks;
    p.anchors = memory.anchors;
    p.dot = dot;
    p.dqk = static_cast<int32_t>(problem.dqk);
    p.dv = static_cast<int32_t>(problem.dv);
    p.planes = plan.planes;
    p.states = memory.states.c;
    p.state_n = memory.states.n;
    return p;
  }

  void run_two_phase() const {
    for (const bool is_reverse : {false, true}) {
      StateParams states = state(is_reverse);
      const SegmentStarts starts = segment_starts(
          plan, states, is_reverse ? memory.reverse_segments : memory.forward_segments, device,
          stream);
      states.start_c = starts.c;
      states.start_n = starts.n;
      states.states = memory.states.c;
      states.state_n = memory.states.n;
      states.end_c = is_reverse ? memory.dc0 : memory.end_c;
      states.end_n = is_reverse ? memory.dn0 : memory.end_n;
      launch_state(states, device, stream);
      if (memory.anchors.states != nullptr) launch_anchors(anchors(is_reverse), stream);
      for (const Use use : {Use::kDv, Use::kDq, Use::kDk}) {
        if ((use == Use::kDq) == is_reverse) continue;
        SweepParams p = sweep(use);
        p.states = memory.states.c;
        p.state_n = memory.states.n;
        launch_out(use, p, device, stream);
      }
    }
  }

  void gate_gradients() const {
    GateGradientParams p;
    p.chunks = plan.chunks;
    p.igate = call.in.igate;
    p.fgate = call.in.fgate;
    p.igate_dtype = problem.igate_dtype;
    p.fgate_dtype = problem.fgate_dtype;
    p.sigmoid_input_gate = problem.sigmoid_input_gate;
    p.reset = call.in.reset;
    p.reset_batch = call.in.reset_batch;
    p.reset_time = call.in.reset_time;
    p.dots_r = memory.dots_r;
    p.dots_c = memory.dots_c;
    p.tiles = plan.dot_tiles;
    p.anchors = memory.anchors;
    p.anchor_tiles = plan.anchor_tiles;
    p.state_size = problem.dqk * problem.dv;
    p.n_size = problem.dqk;
    p.start = {call.in.c0, memory.dc0, call.in.n0, memory.dn0};
    p.end = {memory.end_c, call.dc, memory.end_n, call.dn};
    p.digate = call.digate;
    p.dfgate = call.dfgate;
    launch_gate_gradients(p, stream);
  }
};

size_t workspace_of(const MlstmProblem& problem, const DeviceLimits& device,
                    const MlstmBackward& call) {
  Workspace count(nullptr);
  BackwardMemory(plan_mlstm(problem, device, Direction::kBackward), problem, call, count);
  return count.used();
}

}  // namespace

size_t mlstm_backward_workspace(const MlstmProblem& problem, const DeviceLimits& device,
                                const MlstmBackward& call) {
  return std::max(workspace_of(problem, device, call),
                  workspace_of(problem, without_hopper(device), call));
}

void mlstm_backward(const MlstmProblem& problem, const DeviceLimits& device,
                    const MlstmBackward& call, void* workspace, Stream stream) {
  MlstmPlan plan = plan_mlstm(problem, device, Direction::kBackward);
  plan.chunks.cu_seqlens = plan.dv_chunks.cu_seqlens = call.in.cu_seqlens;
  Workspace pieces(workspace);
  const BackwardMemory memory(plan, problem, call, pieces);
  const Backward backward{problem, device, call, plan, memory, stream};
  if (!backward.sm90_takes())
    return mlstm_backward(problem, without_hopper(device), call, workspace, stream);
  backward.prepare();
  if (plan.fused) {
    backward.run_fused();
  } else {
    backward.run_two_phase();
  }
  backward.gate_gradients();
}

}  // namespace xlstm::cuda
