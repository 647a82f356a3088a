#pragma once
#include <cstddef>
#include <string>

namespace xlstm {

/// SHA-256 as 64 hexadecimal digits, fed piece by piece.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void update(const void* data, size_t size_bytes);
  std::string hex_digest();

 private:
  void* context_;
};

std::string sha256_hex(const std::string& bytes);
/// Throws Error(kCheckpoint) naming the file when it cannot be read.
std::string sha256_file(const std::string& path);

}  // namespace xlstm
