#pragma once
// Parameters of the sLSTM kernels. A group of `blocks` blocks works on one head and one tile of sequences, from the first
// step to the last; each block owns `units` of the head's units, all four gates of them. slstm_plan.cpp divides the work.
#include <cstdint>

#include "cuda/prim/types.h"
#include "cuda/slstm/slstm.h"

namespace xlstm::cuda {

using prim::bf16;
using prim::u32;

constexpr int kSlstmThreads = 256, kSlstmWarps = 8;
/// Units whose gates fill the rows of two products (m16n8k16); the units of a warp at a time.
constexpr int kSlstmGroupUnits = 8;
/// Sequences of a block: the columns of such a product.
constexpr int kSlstmRows = 8;

/// How the units and sequences of a head are divided.
struct SlstmDivision {
  int32_t padded = 16;         ///< DH rounded up to 16
  int32_t units = 64;          ///< of a block: 128, or 64 / splits
  int32_t blocks = 1;          ///< of a group
  int32_t splits = 1;          ///< forward: warps that share the columns of R of the same units
  int32_t sequence_tiles = 1;  ///< of 8 sequences: groups per head
  int32_t first_group = 0;     ///< of this launch
};

/// What kGrid passes through global memory.
struct SlstmGridMemory {
  u32* arrivals = nullptr;   ///< [group], 0 at launch
  bf16* exchange = nullptr;  ///< [group][2][planes][8][channels][padded]
};

struct SlstmShape {
  SlstmDivision division;
  int32_t num_sequences = 0, time = 0, num_heads = 0, dh = 0;
  Dtype dtype, r_dtype, gates_dtype;
  SlstmInputs in;
  SlstmGridMemory grid;
};

struct SlstmForwardParams {
  SlstmShape shape;
  Dtype b_dtype;
  SlstmForward call;
};

/// What the steps backward multiply with, of (B,T,NH,DH); slstm_slopes.cuh packs it.
struct SlstmSlopesView {
  u32* wide = nullptr;    ///< four numbers each
  u32* narrow = nullptr;  ///< two words each, with two planes four
};

struct SlstmBackwardParams {
  SlstmShape shape;
  SlstmBackward call;
  SlstmSlopesView slopes;
};

/// Step by step: one thread per unit and sequence.
struct SlstmPointwiseForward {
  SlstmForwardParams all;
  SlstmStep step;
};
struct SlstmPointwiseBackward {
  SlstmBackwardParams all;
  SlstmStep step;
};

// Shared memory of a block -----------------------------------------------------------------------------------------------

/// The kernel's compile-time choices, as the host needs them.
struct SlstmKernelShape {
  int groups = 1;  ///< unit groups per warp: 2 with 128 units per block
  int planes = 1;  ///< bfloat16 planes per number
  int channels =
      1;            ///< numbers per unit and sequence that are passed on: 1 (y), backward 4 (gates)
  int buffers = 2;  ///< of the exchange in shared memory: 1 for kGrid
  bool small = false;  ///< a head of up to 64 units in one block
};

/// k16 steps of a warp, of them with weights in registers; those of the others lie in shared memory.
struct SlstmSteps {
  int all, resident;
};
/// 128 registers per thread, less where the rest of the kernel needs them. Forward a step takes two A fragments per unit
/// group; backward one fragment of 16 units, whose columns the warps of a block share.
PRIM_FUNCTION constexpr int slstm_resident(const SlstmKernelShape& k) {
  if (k.small) return k.channels == 1 ? 4 : 8;  // all there are
  return k.channels == 1 ? 16 / k.groups / k.planes - (k.groups - 1)
                         : (k.groups == 1 ? 28 : 20) / k.planes;
}
PRIM_FUNCTION constexpr int slstm_ceil(int a, int b) { return (a + b - 1) / b; }
PRIM_FUNCTION constexpr SlstmSteps slstm_steps(const SlstmKernelShape& k, const SlstmDivision& d) {
  const int splits = k.channels == 1 ? d.splits : kSlstmWarps * 16 / d.units;
  return {slstm_ceil(k.channels * d.padded / 16, splits), slstm_resident(k)};
}

struct SlstmShared {
  u32 barriers, partials, weights, exchange,
      total;  ///< offsets in bytes; the table of sequences comes first
};
/// Numbers of a row of the exchange: 16 bytes of padding keep ldmatrix from meeting a bank twice.
PRIM_FUNCTION constexpr int slstm_pitch(const SlstmKernelShape& k, const SlstmDivision& d) {
  return k.channels * d.padded + 8;
}
PRIM_FUNCTION constexpr u32 slstm_buffer_numbers(const SlstmKernelShape& k,
                                                 const SlstmDivision& d) {
  return static_cast<u32>(k.planes * kSlstmRows * slstm_pitch(k, d));
}
PRIM_FUNCTION constexpr SlstmShared slstm_shared(const SlstmKernelShape& k,
                                                 const SlstmDivision& d) {
  const bool forward = k.channels == 1;
  const SlstmSteps steps = slstm_steps(k, d);
  const u32 beyond = static_cast<u32>(steps.all > steps.resident ? steps.all - steps.resident : 0);
  const u32 fragments = static_cast<u32>((forward ? 2 * k.groups : 1) * k.planes);
  const bool shared_sums = forward ? d.splits > 1 : k.groups == 1;
  SlstmShared s{};
  s.barriers = kSlstmRows * 16;
  s.partials = s.barriers + 128;
  s.weights = s.partials + (shared_sums ? (forward ? 8U : 4U) * kSlstmThreads * 4 : 0);
  s.exchange = s.weights + beyond * fragments * 512 * kSlstmWarps;
  s.total = s.exchange + static_cast<u32>(k.buffers) * slstm_buffer_numbers(k, d) * 2;
  return s;
}

}  // namespace xlstm::cuda
