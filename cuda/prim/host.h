#pragma once
// Host bodies of the primitives, executed by the emulator in tests/simt. Meaning: the PTX instruction of the device
// body (device_sm80.cuh, device_sm90.cuh). Every function that waits or needs the whole warp takes its call site.
#include <cmath>
#include <cstring>

#include "cuda/prim/host_sm90.h"
#include "cuda/prim/types.h"
#include "tests/simt/runtime.h"

namespace prim {

using simt::Dim3;
using simt::Where;

Dim3 thread_idx();
Dim3 block_idx();
Dim3 block_dim();
Dim3 grid_dim();
unsigned char* dynamic_shared();
/// Address within the block's shared window; the pointer must lie there.
u32 shared_u32(const void* pointer);
/// Ends the kernel when that place of shared memory is not at a multiple of `bytes` of the shared window: swizzled
/// tiles want 1024.
void require_aligned(const void* shared, u32 bytes);

// Barriers, shuffles, votes -------------------------------------------------------------------------------------------
void sync_block(Where where = Where::current());
void named_sync(u32 id, u32 threads, Where where = Where::current());
void named_arrive(u32 id, u32 threads, Where where = Where::current());
void sync_warp(u32 mask = ~0U, Where where = Where::current());
u32 shfl(u32 value, u32 lane, u32 mask = ~0U, Where where = Where::current());
u32 shfl_xor(u32 value, u32 lanes, u32 mask = ~0U, Where where = Where::current());
u32 shfl_up(u32 value, u32 delta, u32 mask = ~0U, Where where = Where::current());
u32 shfl_down(u32 value, u32 delta, u32 mask = ~0U, Where where = Where::current());
u32 ballot(bool vote, u32 mask = ~0U, Where where = Where::current());

/// Bytes of a (0 to 3) and b (4 to 7), each named by 4 bits of the selector, the lowest first; the 8 of a name repeats a sign
/// on the device and must be 0.
inline u32 byte_perm(u32 a, u32 b, u32 selector) {
  u32 r = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 byte = selector >> 4 * i & 7U;
    r |= ((byte < 4 ? a : b) >> 8 * (byte % 4) & 0xffU) << 8 * i;
  }
  return r;
}
inline u32 bits_of(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Conversions, round to nearest even ----------------------------------------------------------------------------------
inline float bf16_to_float(u16 bits) { return float_of(static_cast<u32>(bits) << 16); }
inline u16 float_to_bf16(float value) {
  const u32 bits = bits_of(value);
  if (value != value) return 0x7fff;
  return static_cast<u16>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}
#if defined(__aarch64__)  // GCC before 13 has no _Float16 in C++ there
using Half = __fp16;
#else
using Half = _Float16;
#endif
inline float f16_to_float(u16 bits) {
  Half value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline u16 float_to_f16(float value) {
  if (value != value) return 0x7fff;
  const auto half = static_cast<Half>(value);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline u32 pack_bf16x2(float low, float high) {
  return float_to_bf16(low) | static_cast<u32>(float_to_bf16(high)) << 16;
}
inline u32 pack_f16x2(float low, float high) {
  return float_to_f16(low) | static_cast<u32>(float_to_f16(high)) << 16;
}
/// Both halves; the product of two bfloat16 numbers is exact in float32, so one rounding.
inline u32 mul_bf16x2(u32 a, u32 b) {
  return pack_bf16x2(
      bf16_to_float(static_cast<u16>(a)) * bf16_to_float(static_cast<u16>(b)),
      bf16_to_float(static_cast<u16>(a >> 16)) * bf16_to_float(static_cast<u16>(b >> 16)));
}
/// Both halves. Rounded to float32 before, which tells where the two are far apart: the device rounds once.
inline u32 add_f16x2(u32 a, u32 b) {
  return pack_f16x2(
      f16_to_float(static_cast<u16>(a)) + f16_to_float(static_cast<u16>(b)),
      f16_to_float(static_cast<u16>(a >> 16)) + f16_to_float(static_cast<u16>(b >> 16)));
}
inline u32 add_bf16x2(u32 a, u32 b) {
  return pack_bf16x2(
      bf16_to_float(static_cast<u16>(a)) + bf16_to_float(static_cast<u16>(b)),
      bf16_to_float(static_cast<u16>(a >> 16)) + bf16_to_float(static_cast<u16>(b >> 16)));
}
/// Nearest tf32, ties away from zero (cvt.rna).
inline u32 to_tf32(float value) {
  return value != value ? 0x7fffffffU : (bits_of(value) + 0x1000U) & 0xffffe000U;
}

inline float flushed(float value) {
  return std::fabs(value) < 1.17549435e-38F ? std::copysign(0.0F, value) : value;
}
inline float ex2(float x) { return flushed(std::exp2(flushed(x))); }
inline float rcp(float x) { return flushed(1.0F / flushed(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }

// cp.async: `valid` bytes are copied, the rest of the 16 (8, 4) is zero -----------------------------------------------
void cp_async16(void* dst, const void* src, u32 valid = 16);
void cp_async8(void* dst, const void* src, u32 valid = 8);
void cp_async4(void* dst, const void* src, u32 valid = 4);
void cp_async_commit();
void cp_async_wait_pending(u32 pending);
template <u32 kPending>
void cp_async_wait() {
  cp_async_wait_pending(kPending);
}

// Matrix fragments ----------------------------------------------------------------------------------------------------
void ldmatrix(u32* registers, const void* row, u32 tiles, bool transposed, Where where);
void stmatrix(void* row, u32* registers, u32 tiles, bool transposed, Where where);
inline void ldmatrix_x1(u32 (&r)[1], const void* row, Where where = Where::current()) {
  ldmatrix(r, row, 1, false, where);
}
inline void ldmatrix_x2(u32 (&r)[2], const void* row, Where where = Where::current()) {
  ldmatrix(r, row, 2, false, where);
}
inline void ldmatrix_x4(u32 (&r)[4], const void* row, Where where = Where::current()) {
  ldmatrix(r, row, 4, false, where);
}
inline void ldmatrix_x1_trans(u32 (&r)[1], const void* row, Where where = Where::current()) {
  ldmatrix(r, row, 1, true, where);
}
inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row, Where where = Where::current()) {
  ldmatrix(r, row, 2, true, where);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, Where where = Where::current()) {
  ldmatrix(r, row, 4, true, where);
}
inline void stmatrix_x4(void* row, u32 (&r)[4], Where where = Where::current()) {
  stmatrix(row, r, 4, false, where);
}
inline void stmatrix_x4_trans(void* row, u32 (&r)[4], Where where = Where::current()) {
  stmatrix(row, r, 4, true, where);
}
u32 movmatrix_trans(u32 value, Where where = Where::current());
/// d (16x8) += a (16x16) b (16x8)
void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where = Where::current());
void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where = Where::current());
/// d (16x8) += a (16x8) b (8x8); operands from to_tf32
void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where = Where::current());

// Memory order across blocks. Inline: a thread sanitizer must see the atomics in the kernel's own code ----------------
inline float load_if(const float* p, bool wanted) { return wanted ? *p : 0.0F; }
inline u32 ld_acquire(const u32* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void st_release(u32* p, u32 value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
inline void red_release_add(u32* p, u32 value) { __atomic_fetch_add(p, value, __ATOMIC_RELEASE); }
inline u32 atomic_add(u32* p, u32 value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline u32 atomic_add_acq_rel(u32* p, u32 value) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}
/// In every turn of a spin loop.
void backoff(Where where = Where::current());

// Clusters ------------------------------------------------------------------------------------------------------------
u32 cluster_rank();
u32 cluster_size();
void cluster_arrive(Where where = Where::current());
void cluster_wait(Where where = Where::current());
inline void cluster_sync(Where where = Where::current()) {
  cluster_arrive(where);
  cluster_wait(where);
}
void* remote_pointer(void* own, u32 rank, std::size_t bytes);
/// Stores to the place of `own` in the shared memory of block `rank` of the cluster.
inline void remote_store(u32* own, u32 rank, u32 value) {
  *static_cast<u32*>(remote_pointer(own, rank, 4)) = value;
}
inline u32 remote_load(u32* own, u32 rank) {
  return *static_cast<u32*>(remote_pointer(own, rank, 4));
}

}  // namespace prim
