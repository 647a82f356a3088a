#pragma once
// What the kernels under test with tensor copies and wgmma have in common.
#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"

namespace simt_test {

/// Bytes before the first tile: barriers live there.
inline constexpr prim::u32 kTile = 1024;

struct LaunchOptions {
  std::uint64_t seed = 0;
  prim::u32 offset = 0;
};

/// Rows of 16-bit numbers, `pitch` apart; boxes of `box_width` x `box_height`.
inline prim::TensorMap matrix_map(void* base, prim::u32 width, prim::u32 height, prim::u32 pitch,
                                  prim::u32 box_width, prim::u32 box_height, prim::Swizzle mode) {
  return prim::make_tensor_map(
      {base, 2, {width, height}, {2, prim::u64{2} * pitch}, {box_width, box_height}, 2, mode});
}

}  // namespace simt_test
