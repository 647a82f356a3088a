#pragma once
// Calls into the sanitizers. The emulator is compiled without instrumentation: what a kernel's primitive reads and
// writes is declared by touch_read and touch_write, everything else the emulator does is invisible.
#include <cstddef>

#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#define SIMT_TSAN_ONLY(x) x
#else
#define SIMT_TSAN_ONLY(x)
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

inline void ignore_begin() { SIMT_TSAN_ONLY(__tsan_ignore_thread_begin();) }
inline void ignore_end() { SIMT_TSAN_ONLY(__tsan_ignore_thread_end();) }

/// memcpy, malloc and free are intercepted even in code without instrumentation: ignored inside this scope.
struct Quiet {
  Quiet() { ignore_begin(); }
  ~Quiet() { ignore_end(); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

inline void acquire(void* edge) {
  (void)edge;
  SIMT_TSAN_ONLY(__tsan_acquire(edge);)
}
inline void release(void* edge) {
  (void)edge;
  SIMT_TSAN_ONLY(__tsan_release(edge);)
}

/// Inside a Quiet scope only. An access by the calling thread, seen by the sanitizers.
void touch_read(const void* address, std::size_t bytes);
void touch_write(void* address, std::size_t bytes);

}  // namespace simt
