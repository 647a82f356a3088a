#pragma once
// How wgmma operands and accumulators lie, for the kernels of the emulator's tests and of the conformance programs.
#include "cuda/prim/prim.h"

namespace conformance {

/// A wgmma operand of `mn` rows (or columns) and `depth` k, as tensor copies lay it down: strips as wide as the
/// swizzle, one behind the other. Transposed: [k][mn] in memory, else [mn][k].
struct Operand {
  bool transposed;
  prim::Swizzle mode;
  prim::u32 mn, depth;

  PRIM_FUNCTION prim::u32 bytes() const { return 2 * mn * depth; }
  PRIM_FUNCTION prim::u32 columns() const { return prim::swizzle_bytes(mode) / 2; }  // of a strip
  PRIM_FUNCTION prim::u32 rows() const { return transposed ? depth : mn; }
  PRIM_FUNCTION prim::u32 width() const { return transposed ? mn : depth; }
  PRIM_FUNCTION prim::u32 strip_bytes() const { return 2 * rows() * columns(); }

  /// Of k 16j .. 16j+15; `start`: shared address of the operand.
  PRIM_FUNCTION prim::u64 descriptor(prim::u32 start, prim::u32 j) const {
    const prim::u32 atom = 16 * columns();  // eight rows of a strip
    if (mode == prim::Swizzle::kNone) {
      return transposed
                 ? prim::wgmma_descriptor(start + 2 * j * atom, atom, strip_bytes(), mode)
                 : prim::wgmma_descriptor(start + 2 * j * strip_bytes(), strip_bytes(), atom, mode);
    }
    if (transposed) return prim::wgmma_descriptor(start + 2 * j * atom, strip_bytes(), atom, mode);
    const prim::u32 k = 16 * j;
    return prim::wgmma_descriptor(start + k / columns() * strip_bytes() + 2 * (k % columns()), 16,
                                  atom, mode);
  }
};

/// Register v of thread t: row 16 (t / 32) + t % 32 / 4 + 8 (v / 2 % 2), column 8 (v / 4) + 2 (t % 4) + v % 2.
template <int kCount>
DEVICE_FUNCTION void store_accumulator(float* out, prim::u32 pitch, const float (&d)[kCount]) {
  const prim::u32 t = prim::thread_idx().x % 128;
#pragma unroll
  for (prim::u32 v = 0; v < kCount; ++v) {
    const prim::u32 row = 16 * (t / 32) + t % 32 / 4 + 8 * (v / 2 % 2);
    out[row * pitch + 8 * (v / 4) + 2 * (t % 4) + v % 2] = d[v];
  }
}

}  // namespace conformance
