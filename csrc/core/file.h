#pragma once
// Files that survive a crash, written whole, synced, and put in place by one rename; and files read whole.
#include <cstddef>
#include <string>
#include <string_view>

#include "csrc/core/error.h"

namespace xlstm {

/// A file under construction. Every failing call throws std::system_error (the caller knows whether ENOSPC is fatal).
/// The destructor closes; it does not remove.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  void write(const void* data, size_t size_bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  /// fsync and close; errors at close count too.
  void sync_and_close();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
};

void sync_directory(const std::string& path);
/// Writes path.tmp, syncs it, renames it over `path`, syncs the folder: readers see the old file or the new one.
void write_file_atomically(const std::string& path, std::string_view bytes);
/// Lets two paths change places in one step. False where that cannot be done, as by some file systems.
bool exchange_paths(const std::string& a, const std::string& b);
/// A file as a whole, or its first `most` bytes. Throws Error(code) naming it where it cannot be read to there, as a folder
/// cannot.
std::string read_file(const std::string& path, ExitCode code = ExitCode::kCheckpoint,
                      size_t most = std::string::npos);
/// The same of what is left of an open one, which messages call `name`.
std::string read_file(int descriptor, const std::string& name, ExitCode code,
                      size_t most = std::string::npos);

/// Read-only memory map of a whole file. Throws Error(kData) naming the file.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  const unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace xlstm
