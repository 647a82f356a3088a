#include "csrc/data/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "csrc/core/error.h"

namespace xlstm::data {
namespace {

constexpr auto kPause = std::chrono::milliseconds(50);

}  // namespace

FileLock::FileLock(const std::string& path, const std::string& what,
                   const std::function<void()>& while_waiting)
    : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
  if (fd_ < 0)
    throw Error(ExitCode::kData, path + ": cannot create: " + std::strerror(errno) +
                                     "; choose a folder that can be written");
  try {
    for (bool told = false; ::flock(fd_, LOCK_EX | LOCK_NB) != 0; told = true) {
      const bool busy = errno == EWOULDBLOCK;
      const std::string reason = busy ? "another process is writing it" : std::strerror(errno);
      if (!busy || !while_waiting)
        throw Error(ExitCode::kData, what + ": cannot lock: " + reason + "; wait for it to end");
      if (!told)
        std::fprintf(stderr, "waiting for another process that prepares %s\n", what.c_str());
      while_waiting();
      std::this_thread::sleep_for(kPause);
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

FileLock::~FileLock() { ::close(fd_); }

}  // namespace xlstm::data
