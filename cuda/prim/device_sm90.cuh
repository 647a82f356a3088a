#pragma once
// Device bodies of sm_90 and later: stmatrix and clusters. Calling one on an older target does not assemble.
#include "cuda/prim/device_sm80.cuh"

namespace prim {

#define PRIM_STMATRIX(NAME, QUALIFIER)                                         \
  PRIM_DEVICE void NAME(void* row, u32(&r)[4]) {                               \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" QUALIFIER                     \
                 ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_u32(row)), \
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                    \
                 : "memory");                                                  \
  }
PRIM_STMATRIX(stmatrix_x4, "")
PRIM_STMATRIX(stmatrix_x4_trans, ".trans")
#undef PRIM_STMATRIX

PRIM_DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
PRIM_DEVICE u32 cluster_size() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
PRIM_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
PRIM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
PRIM_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
PRIM_DEVICE u32 remote_address(const void* own, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_u32(own)), "r"(rank));
  return r;
}
PRIM_DEVICE void remote_store(u32* own, u32 rank, u32 value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_address(own, rank)), "r"(value)
               : "memory");
}
PRIM_DEVICE u32 remote_load(u32* own, u32 rank) {
  u32 v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(v)
               : "r"(remote_address(own, rank))
               : "memory");
  return v;
}

}  // namespace prim
