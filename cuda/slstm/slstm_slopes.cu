// What the steps backward multiply with, for all tokens at once: from each checkpoint its steps are replayed. One thread per
// checkpoint and unit.
#include "cuda/prim/launch.h"
#include "cuda/slstm/slstm_launch.h"
#include "cuda/slstm/slstm_slopes.cuh"

namespace xlstm::cuda {
namespace {

constexpr int kTokens = static_cast<int>(kSlstmCheckpointTokens);
constexpr int kAhead = 4;  ///< tokens whose loads are in flight together

template <class Cell, int kPlanes>
class SlopesThread {
 public:
  DEVICE_FUNCTION explicit SlopesThread(const SlstmBackwardParams& params)
      : p(params), s(params.shape) {
    const int64_t thread = int64_t{prim::block_idx().x} * kSlstmThreads + prim::thread_idx().x,
                  per_slot = int64_t{s.num_heads} * s.dh, slot = thread / per_slot;
    head = static_cast<int>(thread % per_slot / s.dh);
    unit = static_cast<int>(thread % s.dh);
    row = slstm_row(s, sequence_of(slot));
    begin = row.sequence < 0 ? 0 : static_cast<int>(slot - slstm_first_slot(s, row)) * kTokens;
  }

  DEVICE_FUNCTION void run() {
    if (row.sequence < 0 || begin >= row.length) return;
    const int end = begin + kTokens < row.length ? begin + kTokens : row.length;
    const float* from =
        p.call.checkpoints + slstm_checkpoint(s, row, begin, head, unit, Cell::kStates);
    CellState state = empty_state();
    state.c = from[0];
    if (Cell::kStates == 3) state.n = from[s.dh], state.m = from[2 * s.dh];
#pragma unroll 1
    for (int first = begin; first < end; first += kAhead) {
      u32 bits[kAhead][4];
      bool reset[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i < end) load(bits[i], reset[i], first + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= end) continue;
        CellGates gates;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          gates.g[gate] = number_of<kPlanes>(bits[i][gate], wide());
        if (reset[i]) state = empty_state();
        const CellStep step = Cell::step(gates, state);
        const int64_t token = int64_t{row.batch} * s.time + row.begin + first + i;
        store_slopes<Cell::kStates, kPlanes>(p.slopes, (token * s.num_heads + head) * s.dh + unit,
                                             Cell::slopes(step, state), reset[i]);
        state = step.after;
      }
    }
  }

 private:
  DEVICE_FUNCTION bool wide() const { return s.gates_dtype == Dtype::kFloat32; }
  /// The last sequence whose first checkpoint is not beyond the slot.
  DEVICE_FUNCTION int sequence_of(int64_t slot) const {
    if (s.in.cu_seqlens == nullptr) {
      const int64_t sequence = slot / divide_up(s.time, kTokens);
      return static_cast<int>(sequence < s.num_sequences ? sequence : s.num_sequences);
    }
    int low = 0, high = s.num_sequences;
    while (low + 1 < high) {
      const int middle = (low + high) / 2;
      (s.in.cu_seqlens[middle] / kTokens + middle <= slot ? low : high) = middle;
    }
    return low;
  }
  DEVICE_FUNCTION void load(u32 (&bits)[4], bool& reset, int t) const {
    const int64_t at = slstm_offset(p.call.gates, row, t, head, unit);
    reset = slstm_reset(s, row, t);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      bits[gate] = load_bits(p.call.gates.data, at + gate * p.call.gates.gate, wide());
  }

  const SlstmBackwardParams& p;
  const SlstmShape& s;
  int head, unit;
  SlstmRow row;
  int begin;  ///< first token of the checkpoint
};

template <SlstmCell kCell, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads)
slstm_slopes(const GRID_CONSTANT SlstmBackwardParams p) {
  SlopesThread<CellPolicy<kCell, kPlanes == 1>, kPlanes>(p).run();
}

template <SlstmCell kCell>
void launch_cell(const prim::LaunchShape& shape, const SlstmBackwardParams& p, Stream stream) {
  prim::launch("slstm_slopes",
               p.shape.dtype == Dtype::kBFloat16 ? slstm_slopes<kCell, 1> : slstm_slopes<kCell, 2>,
               shape, p, stream);
}

}  // namespace

void launch_slstm_slopes(const SlstmProblem& problem, const SlstmBackwardParams& p, Stream stream) {
  const int64_t count = slstm_checkpoint_slots(problem) * problem.num_heads * problem.dh;
  const prim::LaunchShape shape = {static_cast<u32>((count + kSlstmThreads - 1) / kSlstmThreads),
                                   kSlstmThreads, 0};
  if (problem.cell == SlstmCell::kSlstm) {
    launch_cell<SlstmCell::kSlstm>(shape, p, stream);
  } else if (problem.cell == SlstmCell::kSlstmExpf) {
    launch_cell<SlstmCell::kSlstmExpf>(shape, p, stream);
  } else {
    launch_cell<SlstmCell::kLstm>(shape, p, stream);
  }
}

}  // namespace xlstm::cuda
