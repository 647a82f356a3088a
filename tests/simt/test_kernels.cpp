// The library's kernels in the emulator: one test case and tag per kernels_<name>.cpp, listed in CMakeLists.txt.
#include "tests/simt/check_cases.h"

namespace {

// Value errors depend on the schedule; the sanitizers see a missing order in any schedule and are slow.
void check(const simt_test::List<simt_test::Case>& list) {
  if (simt::build_kind() == simt::Build::kPlain) {
    simt_test::all_correct(list, 0, 3);
  } else {
    simt_test::all_correct(list, 1, 2);
  }
}

}  // namespace

#define KERNEL_LIST(name)                         \
  namespace simt_test {                           \
  List<Case> name##_cases();                      \
  }                                               \
  TEST_CASE(#name, "[" #name "]") {               \
    REQUIRE(simt_test::name##_cases().count > 0); \
    check(simt_test::name##_cases());             \
  }
#include "kernel_lists.inc"
