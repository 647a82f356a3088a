#include "csrc/data/recorded_task.h"

#include <algorithm>
#include <filesystem>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"

namespace xlstm::data {
namespace {

/// Of either end of a file: whole CIFAR-10 batches differ there, and gigabytes of text are not read twice.
constexpr size_t kMarkedBytes = size_t{1} << 20;

std::string mark_of(const MappedFile& file) {
  const size_t count = std::min(file.size(), kMarkedBytes);
  Sha256 hash;
  hash.update(file.data(), count);
  hash.update(file.data() + file.size() - count, count);
  return " " + std::to_string(file.size()) + ":" + hash.hex_digest();
}

}  // namespace

void RecordedTask::refuse(const std::string& path, const std::string& what) const {
  throw Error(ExitCode::kData, path + ": " + what + "; " + how_to_get_);
}

MappedFile RecordedTask::open(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) refuse(path, "no such file");
  MappedFile file(path);
  if (file.size() == 0) refuse(path, "the file is empty");
  mark_ += mark_of(file);
  return file;
}

}  // namespace xlstm::data
