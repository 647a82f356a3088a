#pragma once
#include <functional>
#include <string>

namespace xlstm::data {

/// Exclusive lock on a file (created when missing) for as long as the object lives; the system drops it when the
/// process dies, so that nothing stays locked after a crash.
class FileLock {
 public:
  /// Throws Error(kData) where another process holds the lock; with `while_waiting` it waits until that is over, telling
  /// so on standard error, and calls the function several times a second: what it throws ends the wait. `what` names
  /// the protected thing.
  FileLock(const std::string& path, const std::string& what,
           const std::function<void()>& while_waiting = {});
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace xlstm::data
