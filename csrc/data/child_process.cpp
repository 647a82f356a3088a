#include "csrc/data/child_process.h"

#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>

#include "csrc/core/error.h"

extern char** environ;

namespace xlstm::data {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);

bool is_program(const std::filesystem::path& path) { return ::access(path.c_str(), X_OK) == 0; }

}  // namespace

int start_process(std::vector<std::string> argv, int input, int output, int errors, pid_t& pid) {
  std::vector<char*> pointers;
  for (std::string& argument : argv) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, errors, STDERR_FILENO);
  const int error = ::posix_spawnp(&pid, pointers[0], &actions, nullptr, pointers.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  return error;
}

ChildProcess::ChildProcess(const std::vector<std::string>& argv) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    throw Error(ExitCode::kData, std::string("cannot open a socket pair: ") + std::strerror(errno));
  const int error = start_process(argv, ends[1], ends[1], STDERR_FILENO, pid_);
  ::close(ends[1]);
  socket_ = ends[0];
  if (error != 0) {
    ::close(socket_);
    throw Error(ExitCode::kData, argv[0] + ": cannot run it: " + std::strerror(error) +
                                     "; name a Python that runs by XLSTM_PYTHON");
  }
}

ChildProcess::~ChildProcess() {
  ::close(socket_);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!ended_) {
    const pid_t result = ::waitpid(pid_, &status_, WNOHANG);
    if (result == pid_ || (result < 0 && errno != EINTR)) break;
    if (std::chrono::steady_clock::now() > deadline) ::kill(pid_, SIGKILL);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

bool ChildProcess::send(const void* data, size_t size_bytes) {
  const char* next = static_cast<const char*>(data);
  while (size_bytes > 0) {
    const ssize_t count = ::send(socket_, next, size_bytes, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    next += count;
    size_bytes -= static_cast<size_t>(count);
  }
  return true;
}

bool ChildProcess::receive(void* data, size_t size_bytes) {
  char* next = static_cast<char*>(data);
  while (size_bytes > 0) {
    const ssize_t count = ::recv(socket_, next, size_bytes, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    next += count;
    size_bytes -= static_cast<size_t>(count);
  }
  return true;
}

std::string ChildProcess::receive_all() {
  std::string text;
  char byte = 0;
  while (receive(&byte, 1)) text += byte;
  return text;
}

std::string ChildProcess::wait_for_end() {
  while (!ended_) {
    const pid_t result = ::waitpid(pid_, &status_, 0);
    if (result < 0 && errno == EINTR) continue;
    ended_ = true;
    if (result < 0) return "unknown status";
  }
  if (WIFSIGNALED(status_))
    return "signal " + std::to_string(WTERMSIG(status_)) + " (" + ::strsignal(WTERMSIG(status_)) +
           ")";
  return "exit status " + std::to_string(WEXITSTATUS(status_));
}

std::string program_folder() {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "" : program.parent_path().string();
}

std::string python_interpreter() {
  const char* chosen = std::getenv("XLSTM_PYTHON");
  if (chosen != nullptr && *chosen != '\0') return chosen;
  std::filesystem::path folder = program_folder();
  while (folder.has_relative_path()) {
    if (is_program(folder / ".venv/bin/python")) return folder / ".venv/bin/python";
    if (std::filesystem::exists(folder / "pyvenv.cfg") && is_program(folder / "bin/python"))
      return folder / "bin/python";
    folder = folder.parent_path();
  }
  return "python3";
}

}  // namespace xlstm::data
