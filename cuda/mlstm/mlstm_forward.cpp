// The forward pass as a sequence of launches: gates, [states that enter the segments,] then either the fused sweep or the
// state and out kernels.
#include <algorithm>

#include "cuda/mlstm/hopper/mlstm_launch_sm90.h"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_plan.h"

namespace xlstm::cuda {
namespace {

struct ForwardMemory {
  GateRun* ends;
  GateRecord* records;
  float* gamma;
  SegmentMemory segments;
  StateMemory states;
  ForwardMemory(const MlstmPlan& plan, const MlstmProblem& problem, Workspace& workspace)
      : ends(workspace.take<GateRun>(positions_of(plan.chunks) / plan.chunks.length)),
        records(workspace.take<GateRecord>(positions_of(plan.chunks))),
        gamma(workspace.take<float>(positions_of(plan.chunks) / plan.chunks.length)),
        segments(plan, problem, workspace),
        states(plan, problem, workspace) {}
};

StateParams state_params(const MlstmPlan& plan, const MlstmProblem& problem,
                         const MlstmForward& call, const ForwardMemory& memory) {
  StateParams p;
  p.chunks = plan.chunks;
  p.b = operand_of(call.in.k, problem.dqk, problem.dtype);
  p.x = operand_of(call.in.v, problem.dv, problem.dtype);
  p.records = memory.records;
  p.gamma = memory.gamma;
  p.dqk = static_cast<int32_t>(problem.dqk);
  p.dv = static_cast<int32_t>(problem.dv);
  p.start_c = call.in.c0;
  p.start_n = call.in.n0;
  return p;
}

SweepParams h_params(const MlstmPlan& plan, const MlstmProblem& problem, const MlstmForward& call,
                     const ForwardMemory& memory) {
  SweepParams p;
  p.chunks = plan.chunks;
  p.a = operand_of(call.in.q, problem.dqk, problem.dtype);
  p.b = operand_of(call.in.k, problem.dqk, problem.dtype);
  p.x = operand_of(call.in.v, problem.dv, problem.dtype);
  p.out = operand_of(call.h, problem.dv, problem.dtype);
  p.scale = problem.scale;
  p.records = memory.records;
  p.gamma = memory.gamma;
  p.normalize = problem.normalize;
  p.eps = problem.eps;
  p.product = call.product;
  p.dqk = static_cast<int32_t>(problem.dqk);
  p.dv = static_cast<int32_t>(problem.dv);
  return p;
}

size_t workspace_of(const MlstmProblem& problem, const DeviceLimits& device) {
  Workspace count(nullptr);
  ForwardMemory(plan_mlstm(problem, device, Direction::kForward), problem, count);
  return count.used();
}

}  // namespace

size_t mlstm_forward_workspace(const MlstmProblem& problem, const DeviceLimits& device) {
  return std::max(workspace_of(problem, device), workspace_of(problem, without_hopper(device)));
}

void mlstm_forward(const MlstmProblem& problem, const DeviceLimits& device,
                   const MlstmForward& call, void* workspace, Stream stream) {
  MlstmPlan plan = plan_mlstm(problem, device, Direction::kForward);
  plan.chunks.cu_seqlens = call.in.cu_seqlens;
  Workspace pieces(workspace);
  const ForwardMemory memory(plan, problem, pieces);
  StateParams state = state_params(plan, problem, call, memory);
  SweepParams h = h_params(plan, problem, call, memory);
  if (plan.sm90 && !sweep_sm90_takes(h))
    return mlstm_forward(problem, without_hopper(device), call, workspace, stream);
  launch_gates(gates_params(plan.chunks, problem, call.in, memory.ends, memory.records,
                            memory.gamma, call.m),
               stream);
  const SegmentStarts starts = segment_starts(plan, state, memory.segments, device, stream);
  if (plan.fused) {
    h.start_c = starts.c;
    h.start_n = starts.n;
    h.end_c = call.c;
    h.end_n = call.n;
    (plan.sm90 ? launch_sweep_sm90 : launch_sweep)(Use::kH, h, device, stream);
    return;
  }
  state.start_c = starts.c;
  state.start_n = starts.n;
  state.end_c = call.c;
  state.end_n = call.n;
  state.states = memory.states.c;
  state.state_n = memory.states.n;
  launch_state(state, device, stream);
  h.states = memory.states.c;
  h.state_n = memory.states.n;
  launch_out(Use::kH, h, device, stream);
}

}  // namespace xlstm::cuda
