#pragma once
// One store of 16 bytes. The compiler cuts the assignment of a struct in unrolled loops into four.
#include "cuda/prim/prim.h"

namespace prim {

#if defined(__CUDACC__)

/// To global memory, at a multiple of 16 bytes.
PRIM_DEVICE void store16(void* to, const u32 (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

#else

inline void store16(void* to, const u32 (&words)[4]) {
  struct alignas(16) Words {
    u32 words[4];
  };
  *static_cast<Words*>(to) = {{words[0], words[1], words[2], words[3]}};
}

#endif

}  // namespace prim
