#pragma once
// Helpers of the data tests: files with given bytes, token files, and the message an error carries.
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "csrc/core/error.h"
#include "csrc/data/token_file.h"
#include "csrc/data/token_writer.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"

namespace xlstm::testing {

inline std::string write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::filesystem::remove(path);  // truncating a file in place makes ext4 wait for the disk
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path.string();
}

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// Little-endian bytes of an integer, written out apart from the code under test.
inline std::string little_endian(uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
  return text;
}

/// A token file of the given documents, with a sidecar.
inline std::string write_tokens(const std::filesystem::path& prefix, int64_t vocab_size,
                                const std::vector<std::vector<int64_t>>& documents,
                                int64_t num_bytes = 0) {
  data::TokenWriter writer(prefix.string(), vocab_size);
  for (const auto& document : documents) {
    writer.append(document.data(), static_cast<int64_t>(document.size()));
    writer.end_document();
  }
  data::Sidecar sidecar;
  sidecar.tokenizer = "bytes";
  sidecar.eos_id = 0;
  sidecar.num_bytes = num_bytes;
  writer.finish(sidecar);
  return prefix.string();
}

inline std::shared_ptr<const data::TokenFile> open_tokens(const std::string& prefix) {
  return std::make_shared<const data::TokenFile>(prefix);
}

inline std::vector<int64_t> all_tokens(const data::TokenFile& file) {
  std::vector<int64_t> tokens(static_cast<size_t>(file.num_tokens()));
  file.read(0, file.num_tokens(), tokens.data());
  return tokens;
}

/// Runs the body, expects an Error with this exit status, and returns its message.
template <typename Body>
std::string error_of(Body body, ExitCode code = ExitCode::kData) {
  try {
    body();
  } catch (const Error& error) {
    CHECK(error.code == code);
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
    return error.what();
  }
  FAIL("no error");
  return "";
}

/// XLSTM_PYTHON for the time of a scope.
class PythonIs {
 public:
  explicit PythonIs(const std::string& path)
      : old_(std::getenv("XLSTM_PYTHON") ? std::getenv("XLSTM_PYTHON") : "") {
    ::setenv("XLSTM_PYTHON", path.c_str(), 1);
  }
  ~PythonIs() { ::setenv("XLSTM_PYTHON", old_.c_str(), 1); }
  PythonIs(const PythonIs&) = delete;
  PythonIs& operator=(const PythonIs&) = delete;

 private:
  std::string old_;
};

inline bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) WARN("\"" << part << "\" is not in: " << text);
  return found;
}

}  // namespace xlstm::testing
