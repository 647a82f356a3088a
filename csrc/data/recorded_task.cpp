#include "csrc/data/recorded_task.h"

#include <filesystem>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"

namespace xlstm::data {
namespace {

/// What is hashed of a file: both ends and blocks evenly spread between them, so that gigabytes of text are not read twice.
constexpr size_t kEndBytes = size_t{1} << 20, kBlockBytes = size_t{1} << 16, kBlocks = 64;

std::string mark_of(const MappedFile& file) {
  const size_t size = file.size();
  Sha256 hash;
  if (size <= 2 * kEndBytes + kBlocks * kBlockBytes) {
    hash.update(file.data(), size);
  } else {
    const size_t step = (size - 2 * kEndBytes - kBlockBytes) / (kBlocks - 1);
    hash.update(file.data(), kEndBytes);
    for (size_t block = 0; block < kBlocks; ++block)
      hash.update(file.data() + kEndBytes + block * step, kBlockBytes);
    hash.update(file.data() + size - kEndBytes, kEndBytes);
  }
  return " " + std::to_string(size) + ":" + hash.hex_digest();
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
