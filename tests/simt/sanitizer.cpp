#include "tests/simt/sanitizer.h"

#include "tests/simt/runtime.h"

namespace {
int reports = 0;
}

extern "C" {
#if defined(SIMT_TSAN)
void __tsan_on_report(void*) { ++reports; }
const char* __tsan_default_options() {
  return "suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0:halt_on_error=0:history_"
         "size=4:"
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
