#pragma once
// Device bodies of sm_90 and later: mbarriers, the proxy fences, the tensor copy engine, asynchronous remote stores.
#include "cuda/prim/device_sm90.cuh"

namespace prim {

// mbarrier ------------------------------------------------------------------------------------------------------------

PRIM_DEVICE void mbar_init(u64* bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_u32(bar)), "r"(count)
               : "memory");
}
PRIM_DEVICE void mbar_inval(u64* bar) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_u32(bar)) : "memory");
}
PRIM_DEVICE void fence_mbar_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
PRIM_DEVICE void mbar_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_u32(bar)) : "memory");
}
PRIM_DEVICE void mbar_arrive_expect_tx(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_u32(bar)),
               "r"(bytes)
               : "memory");
}
PRIM_DEVICE void mbar_expect_tx(u64* bar, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_u32(bar)),
               "r"(bytes)
               : "memory");
}
PRIM_DEVICE void mbar_arrive_remote(u64* bar, u32 rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   remote_address(bar, rank))
               : "memory");
}

#define PRIM_MBAR_TEST(NAME, INSTRUCTION)            \
  PRIM_DEVICE bool NAME(u64* bar, u32 parity) {      \
    u32 done;                                        \
    asm volatile("{\n.reg .pred p;\n" INSTRUCTION    \
                 ".b64 p, [%1], %2;\n"               \
                 "selp.u32 %0, 1, 0, p;\n}"          \
                 : "=r"(done)                        \
                 : "r"(shared_u32(bar)), "r"(parity) \
                 : "memory");                        \
    return done != 0;                                \
  }
PRIM_MBAR_TEST(mbar_test, "mbarrier.test_wait.parity.shared::cta")
PRIM_MBAR_TEST(mbar_try_wait, "mbarrier.try_wait.parity.shared::cta")
PRIM_MBAR_TEST(mbar_try_wait_cluster, "mbarrier.try_wait.parity.acquire.cluster.shared::cta")
#undef PRIM_MBAR_TEST

// try_wait may give up on a time limit.
PRIM_DEVICE void mbar_wait(u64* bar, u32 parity) {
  while (!mbar_try_wait(bar, parity)) {
  }
}
PRIM_DEVICE void mbar_wait_cluster(u64* bar, u32 parity) {
  while (!mbar_try_wait_cluster(bar, parity)) {
  }
}

PRIM_DEVICE void cp_async_mbar_arrive(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_u32(bar)) : "memory");
}
PRIM_DEVICE void cp_async_mbar_arrive_noinc(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_u32(bar))
               : "memory");
}

PRIM_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
PRIM_DEVICE void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Tensor copies -------------------------------------------------------------------------------------------------------

// The coordinates are the asm operands %0 .. (TEXT), O0 .. number those behind them.
#define PRIM_TMA(DIM, COORDINATES, TEXT, O0, O1, O2, O3, ...)                                     \
  PRIM_DEVICE void tma_load_##DIM(void* dst, const TensorMap& map, COORDINATES, u64* bar) {       \
    asm volatile("cp.async.bulk.tensor." #DIM                                                     \
                 ".shared::cluster.global.mbarrier::complete_tx::bytes [" O0 "], [" O1 ", {" TEXT \
                 "}], [" O2 "];" ::__VA_ARGS__,                                                   \
                 "r"(shared_u32(dst)), "l"(&map), "r"(shared_u32(bar))                            \
                 : "memory");                                                                     \
  }                                                                                               \
  PRIM_DEVICE void tma_load_##DIM##_multicast(void* dst, const TensorMap& map, COORDINATES,       \
                                              u64* bar, u16 mask) {                               \
    asm volatile("cp.async.bulk.tensor." #DIM                                                     \
                 ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [" O0   \
                 "], [" O1 ", {" TEXT "}], [" O2 "], " O3 ";" ::__VA_ARGS__,                      \
                 "r"(shared_u32(dst)), "l"(&map), "r"(shared_u32(bar)), "h"(mask)                 \
                 : "memory");                                                                     \
  }                                                                                               \
  PRIM_DEVICE void tma_store_##DIM(const TensorMap& map, const void* src, COORDINATES) {          \
    asm volatile("cp.async.bulk.tensor." #DIM ".global.shared::cta.bulk_group [" O1 ", {" TEXT    \
                 "}], [" O0 "];" ::__VA_ARGS__,                                                   \
                 "r"(shared_u32(src)), "l"(&map)                                                  \
                 : "memory");                                                                     \
  }
#define PRIM_COORDINATES(...) __VA_ARGS__
PRIM_TMA(2d, PRIM_COORDINATES(int c0, int c1), "%0, %1", "%2", "%3", "%4", "%5", "r"(c0), "r"(c1))
PRIM_TMA(3d, PRIM_COORDINATES(int c0, int c1, int c2), "%0, %1, %2", "%3", "%4", "%5", "%6",
         "r"(c0), "r"(c1), "r"(c2))
PRIM_TMA(4d, PRIM_COORDINATES(int c0, int c1, int c2, int c3), "%0, %1, %2, %3", "%4", "%5", "%6",
         "%7", "r"(c0), "r"(c1), "r"(c2), "r"(c3))
#undef PRIM_COORDINATES
#undef PRIM_TMA

PRIM_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <u32 kPending>
PRIM_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <u32 kPending>
PRIM_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
PRIM_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

PRIM_DEVICE void bulk_load(void* dst, const void* src, u32 bytes, u64* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_u32(dst)),
      "l"(src), "r"(bytes), "r"(shared_u32(bar))
      : "memory");
}

// Asynchronous stores to other blocks of the cluster ------------------------------------------------------------------

PRIM_DEVICE void bulk_copy_remote(void* own, u32 rank, const void* src, u32 bytes, u64* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(remote_address(own, rank)),
      "r"(shared_u32(src)), "r"(bytes), "r"(remote_address(bar, rank))
      : "memory");
}
PRIM_DEVICE void st_async(u32* own, u32 rank, u32 value, u64* bar) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
          remote_address(own, rank)),
      "r"(value), "r"(remote_address(bar, rank))
      : "memory");
}
PRIM_DEVICE void st_async_x4(u32* own, u32 rank, const u32 (&v)[4], u64* bar) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], "
      "{%1, %2, %3, %4}, [%5];" ::"r"(remote_address(own, rank)),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(remote_address(bar, rank))
      : "memory");
}
PRIM_DEVICE void remote_store_x4(u32* own, u32 rank, const u32 (&v)[4]) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote_address(own, rank)),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

PRIM_DEVICE bool elect_one() {
  u32 chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(chosen)::"memory");
  return chosen != 0;
}

}  // namespace prim
