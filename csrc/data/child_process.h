#pragma once
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::data {

/// Starts argv[0], which is looked up in PATH, with these descriptors as its standard streams. Returns an error number, or 0
/// and the process.
int start_process(std::vector<std::string> argv, int input, int output, int errors, pid_t& pid);

/// A child process whose standard input and output are one socket to this program; its standard error is ours.
class ChildProcess {
 public:
  /// argv[0] is looked up in PATH. Throws Error(kData) when it cannot be started.
  explicit ChildProcess(const std::vector<std::string>& argv);
  /// Closes the socket (a well-behaved child ends then) and waits; after 5 seconds the child is killed.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  /// False when the child is gone; no signal is raised.
  bool send(const void* data, size_t size_bytes);
  /// Exactly size_bytes; false when the child ended before.
  bool receive(void* data, size_t size_bytes);
  /// Everything until the child closes its output.
  std::string receive_all();
  /// Waits for the end: "exit status 1", "signal 9 (Killed)".
  std::string wait_for_end();
  bool ended_well() const { return ended_ && status_ == 0; }

 private:
  pid_t pid_ = -1;
  int socket_ = -1;
  bool ended_ = false;
  int status_ = 0;
};

/// The Python to run: $XLSTM_PYTHON, else that of the virtual environment this program lies in or beside, else
/// "python3".
std::string python_interpreter();
/// Folder of the running program; "" when unknown.
std::string program_folder();

}  // namespace xlstm::data
