// Runs the conformance cases and writes what they computed: cuda_conformance on the GPU, host_conformance in the
// emulator.
//
//   cuda_conformance FILE [--only TEXT] [--seed N]
//
// TEXT: part of the names to run. N: schedule of the emulator. Cases run in a child process that is replaced when one
// crashes or hangs, so that the others are still seen. Exit 1 when there was such a case.
#include "tests/cuda/conformance.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

namespace conformance {
namespace {

constexpr unsigned kSeconds = 20;  // of one case; the first one starts the driver as well

#if defined(__CUDACC__)
const char* obstacle(Needs needs) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device 0");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device 0");
  if (needs == Needs::kSm80 || (major == 9 && minor == 0)) return nullptr;
  return "needs sm_90a, compute capability 9.0";
}
void set_seed(u64) {}
#else
const char* obstacle(Needs needs) {
  return needs == Needs::kProbe ? "hardware alone can answer" : nullptr;
}
void set_seed(u64 seed) { simt::launch_seed = seed; }
#endif

constexpr int kFailed = 2;  // exit status of a child that has written why
/// The answer to a probe may be a fault.
const char* fault(const Case& one) { return one.needs == Needs::kProbe ? "INFO" : "ERROR"; }

/// In the child: the cases from `*at` on; `*at` says which one runs.
int run_cases(const Cases& cases, volatile std::size_t* at, std::FILE* file) {
  for (std::size_t i = *at; i < cases.size(); ++i) {
    *at = i;
    const Case& one = cases[i];
    alarm(kSeconds);
    try {
      const char* reason = obstacle(one.needs);
      if (reason == nullptr) {
        Dump dump(file, one.name);
        one.run(dump);
      } else {
        std::fprintf(file, "SKIP %s %s\n", one.name.c_str(), reason);
      }
    } catch (const std::exception& error) {
      std::fprintf(file, "%s %s %s\n", fault(one), one.name.c_str(), error.what());
      std::fflush(file);
      return kFailed;  // a CUDA context does not survive a fault
    }
    std::fflush(file);
  }
  alarm(0);
  return 0;
}

Cases all_cases(const std::string& only) {
  Cases all, chosen;
  add_warp_cases(all);
  add_numeric_cases(all);
  add_memory_cases(all);
  add_cluster_cases(all);
  add_tensor_cases(all);
  add_wgmma_cases(all);
  add_product_cases(all);
  add_probes(all);
  for (Case& one : all)
    if (one.name.find(only) != std::string::npos) chosen.push_back(std::move(one));
  return chosen;
}

/// Number of cases that broke.
int run_all(const Cases& cases, const char* path) {
  void* shared =
      mmap(nullptr, sizeof(std::size_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  check(shared != MAP_FAILED, "mmap");
  auto* at = static_cast<volatile std::size_t*>(shared);
  std::FILE* file = std::fopen(path, "w");
  check(file != nullptr, "the file cannot be written");
  int broken = 0;
  for (*at = 0; *at < cases.size();) {
    std::fflush(file);
    const pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
      std::FILE* appended = std::fopen(path, "a");
      _exit(appended == nullptr ? 1 : run_cases(cases, at, appended));
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
    const Case& one = cases[*at];
    if (!WIFEXITED(status) || WEXITSTATUS(status) != kFailed) {
      const bool hung = WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
      std::FILE* appended = std::fopen(path, "a");
      check(appended != nullptr, "the file cannot be written");
      std::fprintf(appended, "\n%s %s %s\n", fault(one), one.name.c_str(),
                   hung ? "hung" : "the process ended");
      std::fclose(appended);
    }
    if (one.needs != Needs::kProbe) {
      ++broken;
      std::fprintf(stderr, "%s: failed, see %s\n", one.name.c_str(), path);
    }
    *at = *at + 1;
  }
  std::fclose(file);
  file = std::fopen(path, "a");
  check(file != nullptr, "the file cannot be written");
  std::fprintf(file, "END %zu\n", cases.size());
  check(std::fclose(file) == 0, "the file cannot be written");
  return broken;
}

}  // namespace
}  // namespace conformance

int main(int count, char** arguments) {
  try {
    const char* path = nullptr;
    std::string only;
    for (int i = 1; i < count; ++i) {
      const std::string argument = arguments[i];
      if (argument == "--only" && i + 1 < count) {
        only = arguments[++i];
      } else if (argument == "--seed" && i + 1 < count) {
        conformance::set_seed(std::stoull(arguments[++i]));
      } else if (path == nullptr && argument.rfind("--", 0) != 0) {
        path = arguments[i];
      } else {
        throw std::invalid_argument("unknown argument " + argument);
      }
    }
    if (path == nullptr) throw std::invalid_argument("usage: FILE [--only TEXT] [--seed N]");
    const conformance::Cases cases = conformance::all_cases(only);
    const int broken = conformance::run_all(cases, path);
    std::printf("%zu cases, %d failed to run; results in %s\n", cases.size(), broken, path);
    return broken == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
