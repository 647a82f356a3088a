#pragma once
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>

namespace xlstm::testing {

/// The most bytes at any time that the CPU allocator has given out on this thread since `action` began.
template <class Action>
int64_t peak_bytes(const Action& action) {
  struct Memory : c10::MemoryReportingInfoBase {
    bool memoryProfilingEnabled() const override { return true; }
    void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
      held += bytes;
      peak = std::max(peak, held);
    }
    int64_t held = 0, peak = 0;
  };
  const auto memory = std::make_shared<Memory>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, memory);
  action();
  return memory->peak;
}

}  // namespace xlstm::testing
