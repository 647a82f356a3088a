#pragma once
// What the sm_90a kernels of the mLSTM share: tiles that the copy engine fills and wgmma reads, their descriptors and
// register fragments, and the ring of slots between a producing and two consuming warpgroups. A kernel body that uses them
// stands inside #if PRIM_HAS_SM90A: older targets do not assemble them.
//
// A tile of R rows and C columns of bfloat16 lies in shared memory as C / 64 strips, one behind the other: R rows of 128
// bytes each, swizzled (16-byte piece p of row r at p ^ (r % 8)), from a multiple of 1024 bytes on. A strip of 64 rows is
// one box of a tensor copy. The same bytes serve wgmma in both majors:
//   K-major    rows are m or n, columns are k (A, and B as [n][k])
//   MN-major   rows are k, columns are m or n (A as [k][m], B as [k][n]: the transposed operands)
#include "cuda/mlstm/mlstm_tiles.cuh"

namespace xlstm::cuda {

using prim::u64;

inline constexpr int kStripColumns = 64;
inline constexpr u32 kStripRowBytes = 128;
inline constexpr int kBoxRows = 64;
inline constexpr u32 kBoxBytes = kBoxRows * kStripRowBytes;

/// A tile in shared memory, see above.
template <int kRows, int kCols>
struct alignas(1024) StripTile {
  static_assert(kRows % 8 == 0 && kCols % kStripColumns == 0, "whole strips");
  static constexpr int kStrips = kCols / kStripColumns;
  static constexpr u32 kStripBytes = kRows * kStripRowBytes;

  unsigned char bytes[kStrips * kStripBytes];

  /// The 16-byte piece that holds (row, col).
  DEVICE_FUNCTION unsigned char* piece(int row, int col) {
    const u32 strip = static_cast<u32>(col) / kStripColumns * kStripBytes;
    const u32 at = static_cast<u32>((col / 8 ^ row) % 8 * 16);
    return bytes + strip + static_cast<u32>(row) * kStripRowBytes + at;
  }
  DEVICE_FUNCTION unsigned char* strip(int index) { return bytes + index * kStripBytes; }
};

/// What a descriptor needs to know of a tile: its shared address and the rows of its strips.
struct Strips {
  u32 address, rows;

  /// From row `row` (a multiple of 8) and strip `strip` on.
  DEVICE_FUNCTION Strips from(int row, int strip) const {
    return {address + static_cast<u32>(row) * kStripRowBytes +
                static_cast<u32>(strip) * rows * kStripRowBytes,
            rows};
  }
  DEVICE_FUNCTION Strips shifted(u32 bytes) const { return {address + bytes, rows}; }
  /// k is a multiple of 16.
  DEVICE_FUNCTION u64 k_major(int k) const {
    const u32 strip = static_cast<u32>(k) / kStripColumns * rows * kStripRowBytes;
    return prim::wgmma_descriptor(address + strip + static_cast<u32>(k % kStripColumns) * 2, 16,
                                  8 * kStripRowBytes, prim::Swizzle::k128);
  }
  DEVICE_FUNCTION u64 mn_major(int k) const {
    return prim::wgmma_descriptor(address + static_cast<u32>(k) * kStripRowBytes,
                                  rows * kStripRowBytes, 8 * kStripRowBytes, prim::Swizzle::k128);
  }
  template <bool kTransposed>
  DEVICE_FUNCTION u64 descriptor(int k) const {
    return kTransposed ? mn_major(k) : k_major(k);
  }
};

template <int kRows, int kCols>
DEVICE_FUNCTION Strips strips_of(StripTile<kRows, kCols>& tile) {
  return {prim::shared_u32(tile.bytes), kRows};
}

// Products --------------------------------------------------------------------------------------------------------------
// Between a wgmma_fence and a wgmma_commit of the caller. Register v of thread t of the warpgroup is row
// 16 (t / 32) + t % 32 / 4 + 8 (v / 2 % 2) and column 8 (v / 4) + 2 (t % 4) + v % 2 of d.

/// d (64 x N) = a (64 x kDepth) b (kDepth x N) [+ d]; kTransA, kTransB: that operand is MN-major.
template <int N, bool kTransA, bool kTransB, int kDepth>
DEVICE_FUNCTION void multiply_tiles(float (&d)[N / 2], Strips a, Strips b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16)
    prim::wgmma_bf16<N, kTransA, kTransB>(d, a.template descriptor<kTransA>(k),
                                          b.template descriptor<kTransB>(k), accumulate || k > 0);
}

/// d (64 x N) += a b for A fragments in registers; fragment j holds k 16j .. 16j+15.
template <int N, bool kTransB, int kSteps>
DEVICE_FUNCTION void multiply_fragments(float (&d)[N / 2], const u32 (&a)[kSteps][4], Strips b) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j)
    prim::wgmma_bf16_rs<N, kTransB>(d, a[j], b.template descriptor<kTransB>(16 * j), true);
}

/// The warp's A fragment (16 x 16) of a tile that is [k][m], at rows k0 and columns m0.
template <int kRows, int kCols>
DEVICE_FUNCTION void fragment_a_transposed(u32 (&a)[4], StripTile<kRows, kCols>& tile, int m0,
                                           int k0) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
  prim::ldmatrix_x4_trans(a, tile.piece(k0 + l % 8 + 8 * (l / 16), m0 + 8 * (l / 8 % 2)));
}
/// The same of a tile that is [m][k].
template <int kRows, int kCols>
DEVICE_FUNCTION void fragment_a(u32 (&a)[4], StripTile<kRows, kCols>& tile, int m0, int k0) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
  prim::ldmatrix_x4(a, tile.piece(m0 + l % 16, k0 + 8 * (l / 16)));
}

/// Rounds 16 columns of the warp's 16 rows of an accumulator (registers 8j .. 8j+7) to the A fragment of their product.
template <int kCount>
DEVICE_FUNCTION void accumulator_fragment(u32 (&a)[4], const float (&d)[kCount], int j) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = prim::pack_bf16x2(d[8 * j + 2 * r], d[8 * j + 2 * r + 1]);
}

/// Stores the warp's 16 rows of an accumulator, rounded, at rows row0 and columns col0 of a tile. Before wgmma or the copy
/// engine reads it: fence_proxy_async and a barrier.
template <int kCount, int kRows, int kCols>
DEVICE_FUNCTION void store_rounded(StripTile<kRows, kCols>& tile, int row0, int col0,
                                   const float (&d)[kCount]) {
  const int l = static_cast<int>(prim::thread_idx().x % 32);
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {
    u32 a[4];
    accumulator_fragment(a, d, j);
    prim::stmatrix_x4(tile.piece(row0 + l % 16, col0 + 16 * j + 8 * (l / 16)), a);
  }
}

/// 0: the producer, then the consumers. The same in all lanes as the compiler sees it, so that branches on it do not diverge.
DEVICE_FUNCTION int warpgroup_here() {
  return static_cast<int>(prim::shfl(prim::thread_idx().x / 128, 0));
}

// Ring ------------------------------------------------------------------------------------------------------------------

/// Slots that one thread fills by tensor copies and kConsumerWarps warps read. Use i of the ring is slot i % kSlots.
template <int kSlots, int kConsumerWarps>
struct Ring {
  u64 full[kSlots], empty[kSlots];

  /// One thread, before a fence_mbar_init and a barrier of the block.
  DEVICE_FUNCTION void init() {
    for (int i = 0; i < kSlots; ++i) {
      prim::mbar_init(&full[i], 1);
      prim::mbar_init_warps(&empty[i], kConsumerWarps);
    }
  }
  static DEVICE_FUNCTION int slot(int use) { return use % kSlots; }
  static DEVICE_FUNCTION u32 parity(int use) { return static_cast<u32>(use / kSlots & 1); }

  /// Producer: waits until the slot is free; the copies that follow complete the returned barrier by `bytes`.
  DEVICE_FUNCTION u64* fill(int use, u32 bytes) {
    prim::mbar_wait(&empty[slot(use)], parity(use) ^ 1);
    prim::mbar_arrive_expect_tx(&full[slot(use)], bytes);
    return &full[slot(use)];
  }
  /// Consumer, every thread that reads.
  DEVICE_FUNCTION void wait(int use) { prim::mbar_wait(&full[slot(use)], parity(use)); }
  /// Consumer, every warp, after a sync_warp behind its last read.
  DEVICE_FUNCTION void release(int use) { prim::mbar_arrive_warp(&empty[slot(use)]); }
};

/// Loads a tile of 64 rows from (batch, token, head, col) on; what lies outside the tensor is zero.
template <int kCols>
DEVICE_FUNCTION void load_box_tile(StripTile<kBoxRows, kCols>& tile, const prim::TensorMap& map,
                                   int col, int head, int token, int batch, u64* bar) {
#pragma unroll
  for (int i = 0; i < kCols / kStripColumns; ++i)
    prim::tma_load_4d(tile.strip(i), map, col + i * kStripColumns, head, token, batch, bar);
}

}  // namespace xlstm::cuda
