#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "csrc/data/text_source.h"

namespace xlstm::data {

/// What a file holds, decompressed, in pieces.
class ByteStream {
 public:
  virtual ~ByteStream() = default;
  /// The next piece, valid until the next call; "" behind the last one and where the rest cannot be had.
  virtual std::string_view next() = 0;
  /// Bytes of the file as stored that have been read.
  virtual int64_t position() const = 0;
  /// Why the rest cannot be had; "" where nothing is amiss.
  const std::string& problem() const { return problem_; }

 protected:
  std::string problem_;
};

/// Throws Error(kData) when the file cannot be opened.
std::unique_ptr<ByteStream> open_bytes(const TextFile& file);

}  // namespace xlstm::data
