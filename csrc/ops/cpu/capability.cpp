#include "csrc/ops/cpu/capability.h"

#include <ATen/Version.h>

#include <string>

namespace xlstm::cpu {

Capability cpu_capability() {
  static const Capability capability = [] {
    const std::string name = at::get_cpu_capability();
    if (name.rfind("AVX512", 0) == 0) return Capability::kAvx512;
    if (name == "AVX2") return Capability::kAvx2;
    return Capability::kDefault;
  }();
  return capability;
}

}  // namespace xlstm::cpu
