#include "tests/simt/sanitizer.h"

#include "tests/simt/runtime.h"

#if defined(SIMT_TSAN)
#include <sys/personality.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
int reports = 0;

#if defined(SIMT_TSAN)
// The sanitizer dies where the kernel spreads addresses wider than its map allows (vm.mmap_rnd_bits > 28): starts the
// program again without randomisation. Before any constructor and by bare system calls, so before it looks.
void fix_addresses(int, char** arguments, char** environment) {
  const long old = syscall(SYS_personality, 0xffffffffUL);
  if (old < 0 || (old & ADDR_NO_RANDOMIZE) != 0) return;
  if (syscall(SYS_personality, static_cast<unsigned long>(old) | ADDR_NO_RANDOMIZE) < 0) return;
  syscall(SYS_execve, "/proc/self/exe", arguments, environment);
}
[[gnu::section(".preinit_array"), gnu::used]] void (*const before_all)(int, char**,
                                                                       char**) = fix_addresses;
#endif
}  // namespace

extern "C" {
#if defined(SIMT_TSAN)
void __tsan_on_report(void*) { ++reports; }
// Reports are expected, the tests count them: the exit status is the program's own. An early death ends in 66.
int __tsan_on_finalize(int) { return 0; }  // its name in newer libraries than libtsan 2
const char* __tsan_default_options() {
  return "suppress_equal_stacks=0:suppress_equal_addresses=0:halt_on_error=0:history_size=4:"
         "report_signal_unsafe=0:report_thread_leaks=0";
}
#elif defined(SIMT_ASAN)
void __ubsan_on_report() { ++reports; }
// Leaks: a kernel that ends in an error leaves its threads' stacks as they are.
const char* __asan_default_options() {
  return "halt_on_error=0:suppress_equal_pcs=0:detect_leaks=0";
}
#endif
}

#if defined(SIMT_TSAN)
namespace __tsan {
bool OnFinalize(bool);
bool OnFinalize(bool) { return false; }
}  // namespace __tsan
#endif

namespace simt {

#if defined(SIMT_ASAN)
namespace {
const bool installed = [] {
  __asan_set_error_report_callback([](const char*) { ++reports; });
  return true;
}();

void address_check(const void* address, std::size_t bytes) {
  void* bad = __asan_region_is_poisoned(const_cast<void*>(address), bytes);
  if (bad != nullptr) {
    ++reports;
    __asan_describe_address(bad);
  }
}
}  // namespace
#endif

void touch_read(const void* address, std::size_t bytes) {
  (void)address, (void)bytes;
#if defined(SIMT_TSAN)
  ignore_end();
  __tsan_read_range(const_cast<void*>(address), bytes);
  ignore_begin();
#elif defined(SIMT_ASAN)
  address_check(address, bytes);
#endif
}

void touch_write(void* address, std::size_t bytes) {
  (void)address, (void)bytes;
#if defined(SIMT_TSAN)
  ignore_end();
  __tsan_write_range(address, bytes);
  ignore_begin();
#elif defined(SIMT_ASAN)
  address_check(address, bytes);
#endif
}

int sanitizer_reports() { return reports; }

Build build_kind() {
#if defined(SIMT_TSAN)
  return Build::kThread;
#elif defined(SIMT_ASAN)
  return Build::kAddress;
#else
  return Build::kPlain;
#endif
}

}  // namespace simt
