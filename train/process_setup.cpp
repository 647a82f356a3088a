#include "train/process_setup.h"

#include <malloc.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace xlstm::train {
namespace {

// Measured on 2 cores with steps of 50 ms, some 400 parallel regions each. On an idle machine no
// waiting at all is 25 % slower than this, and libgomp's own 300,000 rounds are no faster. Beside
// other busy processes those make a step 3 to 10 times longer, because a waiting thread holds the
// core that the other one needs.
constexpr const char* kSpinRounds = "4000";

constexpr int kKeptBytes = 1 << 30;

}  // namespace

void prepare_long_process(char** argv) {
#ifdef __GLIBC__
  ::mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that glibc takes
  ::mallopt(M_TRIM_THRESHOLD, kKeptBytes);
  ::mallopt(M_TOP_PAD, 64 << 20);
#endif
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  ::setenv("GOMP_SPINCOUNT", kSpinRounds, 1);
  // By its real name, which process lists show. Returns only where it failed: then the runtime's
  // own setting stays.
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) ::execv(program.c_str(), argv);
}

}  // namespace xlstm::train
