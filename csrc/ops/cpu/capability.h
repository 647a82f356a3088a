#pragma once
// Run-time choice of the instruction set. A CPU kernel is a plain function of a plain params struct, compiled once per
// instruction set into the namespace of its name (XLSTM_CPU_CAPABILITY); a params header declares it with
//
//   XLSTM_CPU_KERNEL(mlstm_chunkwise_forward, MlstmChunkwiseForwardParams)
//
// and callers call xlstm::cpu::mlstm_chunkwise_forward(params). Kernel sources include no torch header but
// ATen/cpu/vec and ATen/Parallel.h, and no inline function of the standard library that is also used elsewhere with
// weight: the linker keeps one copy of an inline function, and it could keep the AVX-512 one.

namespace xlstm::cpu {

enum class Capability { kDefault, kAvx2, kAvx512 };

/// What this machine runs, as torch sees it (the ATEN_CPU_CAPABILITY environment variable lowers it).
Capability cpu_capability();

}  // namespace xlstm::cpu

#ifdef XLSTM_X86_VARIANTS
#define XLSTM_CPU_KERNEL(name, Params) \
  namespace xlstm::cpu {               \
  namespace DEFAULT {                  \
  void name(const Params& p);          \
  }                                    \
  namespace AVX2 {                     \
  void name(const Params& p);          \
  }                                    \
  namespace AVX512 {                   \
  void name(const Params& p);          \
  }                                    \
  inline void name(const Params& p) {  \
    switch (cpu_capability()) {        \
      case Capability::kAvx512:        \
        return AVX512::name(p);        \
      case Capability::kAvx2:          \
        return AVX2::name(p);          \
      case Capability::kDefault:       \
        return DEFAULT::name(p);       \
    }                                  \
  }                                    \
  }
#elif defined(XLSTM_CPU_CAPABILITY)
#define XLSTM_CPU_KERNEL(name, Params)         \
  namespace xlstm::cpu::XLSTM_CPU_CAPABILITY { \
  void name(const Params& p);                  \
  }
#else  // one instruction set: XLSTM_CPU_ONLY
#define XLSTM_CPU_KERNEL(name, Params)                           \
  namespace xlstm::cpu {                                         \
  namespace XLSTM_CPU_ONLY {                                     \
  void name(const Params& p);                                    \
  }                                                              \
  inline void name(const Params& p) { XLSTM_CPU_ONLY::name(p); } \
  }
#endif
