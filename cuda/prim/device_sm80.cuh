#pragma once
// Device bodies, sm_80 and later: one instruction each. tests/python/test_cuda_primitives.py reads the PTX they become.
#include "cuda/prim/types.h"

namespace prim {

#define PRIM_DEVICE __device__ __forceinline__

PRIM_DEVICE dim3 thread_idx() { return dim3(threadIdx.x, threadIdx.y, threadIdx.z); }
PRIM_DEVICE dim3 block_idx() { return dim3(blockIdx.x, blockIdx.y, blockIdx.z); }
PRIM_DEVICE dim3 block_dim() { return blockDim; }
PRIM_DEVICE dim3 grid_dim() { return gridDim; }
PRIM_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char prim_dynamic_shared[];
  return prim_dynamic_shared;
}
PRIM_DEVICE u32 shared_u32(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

PRIM_DEVICE void require_aligned(const void* shared, u32 bytes) {
  if (shared_u32(shared) % bytes != 0) __trap();
}

PRIM_DEVICE void sync_block() { __syncthreads(); }
PRIM_DEVICE void named_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PRIM_DEVICE void named_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PRIM_DEVICE void sync_warp(u32 mask = ~0U) { __syncwarp(mask); }
PRIM_DEVICE u32 shfl(u32 v, u32 lane, u32 mask = ~0U) {
  return __shfl_sync(mask, v, static_cast<int>(lane));
}
PRIM_DEVICE u32 shfl_xor(u32 v, u32 lanes, u32 mask = ~0U) {
  return __shfl_xor_sync(mask, v, static_cast<int>(lanes));
}
PRIM_DEVICE u32 shfl_up(u32 v, u32 delta, u32 mask = ~0U) { return __shfl_up_sync(mask, v, delta); }
PRIM_DEVICE u32 shfl_down(u32 v, u32 delta, u32 mask = ~0U) {
  return __shfl_down_sync(mask, v, delta);
}
PRIM_DEVICE u32 ballot(bool vote, u32 mask = ~0U) { return __ballot_sync(mask, vote); }

PRIM_DEVICE u32 byte_perm(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
PRIM_DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
PRIM_DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
PRIM_DEVICE float bf16_to_float(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
PRIM_DEVICE u16 float_to_bf16(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
PRIM_DEVICE float f16_to_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
PRIM_DEVICE u16 float_to_f16(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// The first source goes to the upper half.
PRIM_DEVICE u32 pack_bf16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
PRIM_DEVICE u32 pack_f16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Adds -0: mul.bf16x2 does not assemble for sm_80.
PRIM_DEVICE u32 mul_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000U));
  return r;
}
PRIM_DEVICE u32 add_f16x2(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Multiplies by 1: add.bf16x2 does not assemble for sm_80.
PRIM_DEVICE u32 add_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80U), "r"(b));
  return r;
}
PRIM_DEVICE u32 to_tf32(float value) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(value));
  return r;
}
PRIM_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PRIM_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PRIM_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PRIM_DEVICE void cp_async16(void* dst, const void* src, u32 valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_u32(dst)), "l"(src),
               "r"(valid)
               : "memory");
}
PRIM_DEVICE void cp_async8(void* dst, const void* src, u32 valid = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_u32(dst)), "l"(src),
               "r"(valid)
               : "memory");
}
PRIM_DEVICE void cp_async4(void* dst, const void* src, u32 valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_u32(dst)), "l"(src),
               "r"(valid)
               : "memory");
}
PRIM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <u32 kPending>
PRIM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#define PRIM_LDMATRIX(NAME, QUALIFIER)                                                           \
  PRIM_DEVICE void ldmatrix_x1##NAME(u32(&r)[1], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" QUALIFIER ".shared.b16 {%0}, [%1];"             \
                 : "=r"(r[0])                                                                    \
                 : "r"(shared_u32(row))                                                          \
                 : "memory");                                                                    \
  }                                                                                              \
  PRIM_DEVICE void ldmatrix_x2##NAME(u32(&r)[2], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" QUALIFIER ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                        \
                 : "r"(shared_u32(row))                                                          \
                 : "memory");                                                                    \
  }                                                                                              \
  PRIM_DEVICE void ldmatrix_x4##NAME(u32(&r)[4], const void* row) {                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" QUALIFIER ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                \
                 : "r"(shared_u32(row))                                                          \
                 : "memory");                                                                    \
  }
PRIM_LDMATRIX(, "")
PRIM_LDMATRIX(_trans, ".trans")
#undef PRIM_LDMATRIX

PRIM_DEVICE u32 movmatrix_trans(u32 value) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(value));
  return r;
}

#define PRIM_MMA(NAME, SHAPE, TYPE)                                                     \
  PRIM_DEVICE void NAME(float(&d)[4], const u32(&a)[4], u32 b0, u32 b1) {               \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));       \
  }
PRIM_MMA(mma_bf16, "m16n8k16", "bf16")
PRIM_MMA(mma_f16, "m16n8k16", "f16")
PRIM_MMA(mma_tf32, "m16n8k8", "tf32")
#undef PRIM_MMA

/// *p, or 0 without reading.
PRIM_DEVICE float load_if(const float* p, bool wanted) {
  float v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.f32 %0, "
      "[%1];\n}"
      : "=f"(v)
      : "l"(p), "r"(static_cast<u32>(wanted))
      : "memory");
  return v;
}
PRIM_DEVICE u32 ld_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
PRIM_DEVICE void st_release(u32* p, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PRIM_DEVICE void red_release_add(u32* p, u32 v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PRIM_DEVICE u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
PRIM_DEVICE u32 atomic_add_acq_rel(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(v)
               : "memory");
  return old;
}
PRIM_DEVICE void backoff() { __nanosleep(20); }

}  // namespace prim
