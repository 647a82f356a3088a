#include "csrc/data/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "csrc/core/error.h"

namespace xlstm::data {

FileLock::FileLock(const std::string& path, bool wait, const std::string& what)
    : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
  if (fd_ < 0)
    throw Error(ExitCode::kData, path + ": cannot create: " + std::strerror(errno) +
                                     "; choose a folder that can be written");
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  const bool busy = errno == EWOULDBLOCK;
  if (busy && wait) {
    std::fprintf(stderr, "waiting for another process that prepares %s\n", what.c_str());
    while (::flock(fd_, LOCK_EX) != 0) {
      if (errno != EINTR) break;
    }
    if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  }
  const std::string reason = busy ? "another process is writing it" : std::strerror(errno);
  ::close(fd_);
  throw Error(ExitCode::kData, what + ": cannot lock: " + reason + "; wait for it to end");
}

FileLock::~FileLock() { ::close(fd_); }

}  // namespace xlstm::data
