#pragma once
#include <string>

namespace xlstm::data {

/// Exclusive lock on a file (created when missing) for as long as the object lives; the system drops it when the
/// process dies, so that nothing stays locked after a crash.
class FileLock {
 public:
  /// wait: block until free, telling so on standard error; else Error(kData) at once. `what` names the protected thing.
  FileLock(const std::string& path, bool wait, const std::string& what);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace xlstm::data
