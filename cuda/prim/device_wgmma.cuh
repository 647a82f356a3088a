#pragma once
// Device bodies of sm_90a alone: wgmma and setmaxnreg. They trap in code for other targets.
#include "cuda/prim/device_sm90.cuh"

namespace prim {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PRIM_SM90A(...) __VA_ARGS__
#else
#define PRIM_SM90A(...) __trap()
#endif

PRIM_DEVICE void wgmma_fence() {
  PRIM_SM90A(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"));
}
PRIM_DEVICE void wgmma_commit() {
  PRIM_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"));
}
template <u32 kPending>
PRIM_DEVICE void wgmma_wait() {
  PRIM_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"));
}
// Keeps the compiler from moving accesses to the registers of a product across this point: after wgmma_wait.
template <int kCount>
PRIM_DEVICE void fence_registers(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int kCount>
PRIM_DEVICE void fence_registers(u32 (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

template <u32 kRegisters>
PRIM_DEVICE void set_max_registers_up() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24, 32 .. 256");
  PRIM_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}
template <u32 kRegisters>
PRIM_DEVICE void set_max_registers_down() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24, 32 .. 256");
  PRIM_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

// The accumulators are asm operands 0 .. N/2-1, then come A, B, the scale-d flag and the transposition bits.
// clang-format off
#define PRIM_TEXT_4 "%0, %1, %2, %3"
#define PRIM_DATA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PRIM_TEXT_8 PRIM_TEXT_4 ", " \
  "%4, %5, %6, %7"
#define PRIM_DATA_8(d, i) PRIM_DATA_4(d, i), PRIM_DATA_4(d, i + 4)
#define PRIM_TEXT_16 PRIM_TEXT_8 ", " \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define PRIM_DATA_16(d, i) PRIM_DATA_8(d, i), PRIM_DATA_8(d, i + 8)
#define PRIM_TEXT_32 PRIM_TEXT_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PRIM_DATA_32(d, i) PRIM_DATA_16(d, i), PRIM_DATA_16(d, i + 16)
#define PRIM_TEXT_64 PRIM_TEXT_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRIM_DATA_64(d, i) PRIM_DATA_32(d, i), PRIM_DATA_32(d, i + 32)
#define PRIM_TEXT_96 PRIM_TEXT_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PRIM_DATA_96(d, i) PRIM_DATA_64(d, i), PRIM_DATA_32(d, i + 64)
#define PRIM_TEXT_128 PRIM_TEXT_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PRIM_DATA_128(d, i) PRIM_DATA_96(d, i), PRIM_DATA_32(d, i + 96)
// clang-format on

// COUNT = N/2; O0.. number the operands behind the accumulators.
#define PRIM_WGMMA_SS(TYPE, N, COUNT, O0, O1, O2, O3, O4)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O2                                          \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
               " {" PRIM_TEXT_##COUNT "}, " O0 ", " O1 ", p, 1, 1, " O3 ", " O4 ";\n}"         \
               : PRIM_DATA_##COUNT(d, 0)                                                       \
               : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)), "n"(kTransA), "n"(kTransB) \
               : "memory")
#define PRIM_WGMMA_RS(TYPE, N, COUNT, O0, O1, O2, O3, O4, O5, O6)                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O5                                             \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                    \
               " {" PRIM_TEXT_##COUNT "}, {" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", p, 1, 1, " O6 \
                                      ";\n}"                                                      \
               : PRIM_DATA_##COUNT(d, 0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                              \
                 "r"(static_cast<u32>(accumulate)), "n"(kTransB)                                  \
               : "memory")

#define PRIM_WGMMA(NAME, TYPE)                                                                    \
  template <int N, bool kTransA, bool kTransB>                                                    \
  PRIM_DEVICE void NAME(float(&d)[N / 2], u64 a, u64 b, bool accumulate) {                        \
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 192 || N == 256,    \
                  "N");                                                                           \
    if constexpr (N == 8) PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 8, 4, "%4", "%5", "%6", "%7", "%8"));    \
    if constexpr (N == 16)                                                                        \
      PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 16, 8, "%8", "%9", "%10", "%11", "%12"));                    \
    if constexpr (N == 32)                                                                        \
      PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 32, 16, "%16", "%17", "%18", "%19", "%20"));                 \
    if constexpr (N == 64)                                                                        \
      PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36"));                 \
    if constexpr (N == 128)                                                                       \
      PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68"));                \
    if constexpr (N == 192)                                                                       \
      PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 192, 96, "%96", "%97", "%98", "%99", "%100"));               \
    if constexpr (N == 256)                                                                       \
      PRIM_SM90A(PRIM_WGMMA_SS(TYPE, 256, 128, "%128", "%129", "%130", "%131", "%132"));          \
  }                                                                                               \
  template <int N, bool kTransB>                                                                  \
  PRIM_DEVICE void NAME##_rs(float(&d)[N / 2], const u32(&a)[4], u64 b, bool accumulate) {        \
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 192 || N == 256,    \
                  "N");                                                                           \
    if constexpr (N == 8)                                                                         \
      PRIM_SM90A(PRIM_WGMMA_RS(TYPE, 8, 4, "%4", "%5", "%6", "%7", "%8", "%9", "%10"));           \
    if constexpr (N == 16)                                                                        \
      PRIM_SM90A(PRIM_WGMMA_RS(TYPE, 16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14"));      \
    if constexpr (N == 32)                                                                        \
      PRIM_SM90A(PRIM_WGMMA_RS(TYPE, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22"));   \
    if constexpr (N == 64)                                                                        \
      PRIM_SM90A(PRIM_WGMMA_RS(TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38"));   \
    if constexpr (N == 128)                                                                       \
      PRIM_SM90A(PRIM_WGMMA_RS(TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70"));  \
    if constexpr (N == 192)                                                                       \
      PRIM_SM90A(                                                                                 \
          PRIM_WGMMA_RS(TYPE, 192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102"));      \
    if constexpr (N == 256)                                                                       \
      PRIM_SM90A(                                                                                 \
          PRIM_WGMMA_RS(TYPE, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")); \
  }
PRIM_WGMMA(wgmma_bf16, "bf16")
PRIM_WGMMA(wgmma_f16, "f16")
#undef PRIM_WGMMA
#undef PRIM_WGMMA_RS
#undef PRIM_WGMMA_SS
#undef PRIM_SM90A

}  // namespace prim
