#include "train/plot.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <vector>

#include "csrc/data/child_process.h"
#include "train/log.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;
constexpr int kTimeLimitMs = 120'000;

/// The folder that holds the Python package: two levels above the program, both in a source tree
/// (build/bin) and in an installed package (site-packages/libxlstm/bin). "" where it is elsewhere,
/// that is, where Python finds it by itself.
std::string package_parent() {
  const fs::path parent = fs::path(data::program_folder()).parent_path().parent_path();
  return fs::exists(parent / "libxlstm" / "plot.py") ? parent.string() : "";
}

/// Runs a command with its output in `log_path`. Returns its exit status; -1 where it did not start
/// or took too long.
int run_command(const std::vector<std::string>& arguments, const std::string& log_path) {
  const int log = ::open(log_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (log < 0) return -1;
  pid_t child = -1;
  const int error = data::start_process(arguments, STDIN_FILENO, log, log, child);
  ::close(log);
  if (error != 0) return -1;
  for (int waited_ms = 0; waited_ms < kTimeLimitMs; waited_ms += 20) {
    int status = 0;
    if (::waitpid(child, &status, WNOHANG) == child)
      return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    ::usleep(20'000);
  }
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  return -1;
}

std::string last_line(const std::string& path) {
  std::ifstream file(path);
  std::string line, last;
  while (std::getline(file, line)) {
    if (!line.empty()) last = line;
  }
  return last;
}

}  // namespace

void draw_loss_plot(const std::string& run_dir) {
  const std::string python = data::python_interpreter();
  // As a file where it is known: `-m` imports the package and with it torch, which takes seconds.
  const std::string parent = package_parent();
  std::vector<std::string> command = {python, "-m", "libxlstm.plot", run_dir};
  if (!parent.empty()) command = {python, parent + "/libxlstm/plot.py", run_dir};
  const std::string log_path = run_dir + "/plot.log";
  const int status = run_command(command, log_path);
  std::error_code ignored;
  if (status == 0) {
    fs::remove(log_path, ignored);
    log_info("loss curve: " + run_dir + "/loss.png");
    return;
  }
  const std::string reason = last_line(log_path);
  std::string by_hand;
  for (const std::string& argument : command) by_hand += " " + argument;
  log_warning("no loss.png" + (reason.empty() ? "" : " (" + reason + ")") +
              "; draw it with:" + by_hand);
}

}  // namespace xlstm::train
