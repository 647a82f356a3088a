#pragma once
// Host bodies of the sm_90 primitives, executed by the emulator in tests/simt. Part of host.h, which includes it.
#include "cuda/prim/types.h"
#include "tests/simt/runtime.h"

namespace prim {

using simt::Where;

// mbarrier: 8 bytes of shared memory, 8-byte aligned --------------------------------------------------------------------
/// Phase 0 begins and ends after `count` arrivals and when all expected bytes have arrived.
void mbar_init(u64* bar, u32 count);
void mbar_inval(u64* bar);
/// After the mbar_inits of this thread: the copy engine and other blocks may use them (after a barrier).
void fence_mbar_init();
void mbar_arrive(u64* bar);
void mbar_expect_tx(u64* bar, u32 bytes);
void mbar_arrive_expect_tx(u64* bar, u32 bytes);
/// Arrives at the barrier at the place of `bar` in block `rank` of the cluster.
void mbar_arrive_remote(u64* bar, u32 rank);
/// True when the phase of that parity has completed; true for parity 1 on a fresh barrier.
bool mbar_test(u64* bar, u32 parity, Where where = Where::current());
void mbar_wait(u64* bar, u32 parity, Where where = Where::current());
/// As mbar_wait, and ordered after arrivals and st_async of other blocks.
void mbar_wait_cluster(u64* bar, u32 parity, Where where = Where::current());
/// One arrival when all cp.async of this thread so far are done. The first form adds that arrival to the phase's
/// count, the second takes it from the count of mbar_init.
void cp_async_mbar_arrive(u64* bar);
void cp_async_mbar_arrive_noinc(u64* bar);

/// Shared memory this thread has written (or seen written) becomes visible to wgmma and to the copy engine.
void fence_proxy_async();
/// The same for all memory, that of other blocks included.
void fence_proxy_async_all();

// Tensor copies. Coordinates in elements, dimension 0 first; what lies outside the tensor is read as zero and not
// written. A load completes `bar` by the bytes of the whole box. One thread issues ---------------------------------------
void tma_load(void* dst, const TensorMap& map, u32 rank, const int* coordinates, u64* bar,
              u32 mask);
void tma_store(const TensorMap& map, const void* src, u32 rank, const int* coordinates);

inline void tma_load_2d(void* dst, const TensorMap& map, int c0, int c1, u64* bar) {
  const int c[] = {c0, c1};
  tma_load(dst, map, 2, c, bar, 0);
}
inline void tma_load_3d(void* dst, const TensorMap& map, int c0, int c1, int c2, u64* bar) {
  const int c[] = {c0, c1, c2};
  tma_load(dst, map, 3, c, bar, 0);
}
inline void tma_load_4d(void* dst, const TensorMap& map, int c0, int c1, int c2, int c3, u64* bar) {
  const int c[] = {c0, c1, c2, c3};
  tma_load(dst, map, 4, c, bar, 0);
}
/// To the same place in every block of `mask` (bit = rank in the cluster); each completes its own barrier.
inline void tma_load_2d_multicast(void* dst, const TensorMap& map, int c0, int c1, u64* bar,
                                  u16 mask) {
  const int c[] = {c0, c1};
  tma_load(dst, map, 2, c, bar, 0x10000U | mask);
}
inline void tma_load_3d_multicast(void* dst, const TensorMap& map, int c0, int c1, int c2, u64* bar,
                                  u16 mask) {
  const int c[] = {c0, c1, c2};
  tma_load(dst, map, 3, c, bar, 0x10000U | mask);
}
inline void tma_load_4d_multicast(void* dst, const TensorMap& map, int c0, int c1, int c2, int c3,
                                  u64* bar, u16 mask) {
  const int c[] = {c0, c1, c2, c3};
  tma_load(dst, map, 4, c, bar, 0x10000U | mask);
}
inline void tma_store_2d(const TensorMap& map, const void* src, int c0, int c1) {
  const int c[] = {c0, c1};
  tma_store(map, src, 2, c);
}
inline void tma_store_3d(const TensorMap& map, const void* src, int c0, int c1, int c2) {
  const int c[] = {c0, c1, c2};
  tma_store(map, src, 3, c);
}
inline void tma_store_4d(const TensorMap& map, const void* src, int c0, int c1, int c2, int c3) {
  const int c[] = {c0, c1, c2, c3};
  tma_store(map, src, 4, c);
}
void tma_store_commit();
void tma_store_wait_pending(u32 pending, bool read_only);
/// At most kPending of this thread's newest groups still read shared memory.
template <u32 kPending>
void tma_store_wait_read() {
  tma_store_wait_pending(kPending, true);
}
/// At most kPending of this thread's newest groups are not yet written.
template <u32 kPending>
void tma_store_wait() {
  tma_store_wait_pending(kPending, false);
}
void tma_prefetch(const TensorMap& map);
/// `bytes` (a multiple of 16, addresses as well) of global memory; completes `bar` by as many.
void bulk_load(void* dst, const void* src, u32 bytes, u64* bar);

// Stores to the place of `own` in block `rank` of the cluster ------------------------------------------------------------
/// Asynchronous; completes `bar` of the same block by the bytes. Waited for by mbar_wait_cluster.
void st_async(u32* own, u32 rank, u32 value, u64* bar);
void st_async_x4(u32* own, u32 rank, const u32 (&v)[4], u64* bar);
void bulk_copy_remote(void* own, u32 rank, const void* src, u32 bytes, u64* bar);
void* remote_pointer(void* own, u32 rank, std::size_t bytes);
inline void remote_store_x4(u32* own, u32 rank, const u32 (&v)[4]) {
  auto* to = static_cast<u32*>(remote_pointer(own, rank, 16));
  for (u32 i = 0; i < 4; ++i) to[i] = v[i];
}

/// True in one lane; the whole warp calls it.
bool elect_one(Where where = Where::current());

// wgmma: 64 x N x 16 by four warps that begin at a multiple of four ------------------------------------------------------
/// Before the first product, and between any access to registers of a product and that product.
void wgmma_fence(Where where = Where::current());
void wgmma_commit(Where where = Where::current());
void wgmma_wait_pending(u32 pending, const Where& where);
template <u32 kPending>
void wgmma_wait(Where where = Where::current()) {
  wgmma_wait_pending(kPending, where);
}
/// After wgmma_wait, on registers of its products: keeps the compiler from reading them earlier. No instruction.
template <class T, int kCount>
void fence_registers(T (&)[kCount]) {}

struct WgmmaShape {
  u32 n;
  bool half, transposed_a, transposed_b, registers_a, accumulate;
};
void wgmma(float* d, const u32* a_registers, u64 a, u64 b, WgmmaShape shape, const Where& where);
constexpr bool wgmma_columns(int n) {
  return n == 8 || n == 16 || n == 32 || n == 64 || n == 128 || n == 192 || n == 256;
}

/// d (64 x N) = a (64 x 16) b (16 x N) [+ d]. kTransA: a lies as [k][m]; kTransB: b lies as [k][n], else [n][k].
/// Registers of d and a hold NaN until the wait and must live until then.
template <int N, bool kTransA, bool kTransB>
void wgmma_bf16(float (&d)[N / 2], u64 a, u64 b, bool accumulate, Where where = Where::current()) {
  static_assert(wgmma_columns(N), "N");
  wgmma(d, nullptr, a, b, {N, false, kTransA, kTransB, false, accumulate}, where);
}
template <int N, bool kTransA, bool kTransB>
void wgmma_f16(float (&d)[N / 2], u64 a, u64 b, bool accumulate, Where where = Where::current()) {
  static_assert(wgmma_columns(N), "N");
  wgmma(d, nullptr, a, b, {N, true, kTransA, kTransB, false, accumulate}, where);
}
/// The same with a from the registers of each warp's 16 rows (the A fragment of mma_bf16).
template <int N, bool kTransB>
void wgmma_bf16_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate,
                   Where where = Where::current()) {
  static_assert(wgmma_columns(N), "N");
  wgmma(d, a, 0, b, {N, false, false, kTransB, true, accumulate}, where);
}
template <int N, bool kTransB>
void wgmma_f16_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate,
                  Where where = Where::current()) {
  static_assert(wgmma_columns(N), "N");
  wgmma(d, a, 0, b, {N, true, false, kTransB, true, accumulate}, where);
}

// Registers per thread: all four warps of a warpgroup call it; up waits until the block's pool has enough ----------------
void change_max_registers(u32 registers, bool up, const Where& where);
template <u32 kRegisters>
void set_max_registers_up(Where where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24, 32 .. 256");
  change_max_registers(kRegisters, true, where);
}
template <u32 kRegisters>
void set_max_registers_down(Where where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24, 32 .. 256");
  change_max_registers(kRegisters, false, where);
}

}  // namespace prim
