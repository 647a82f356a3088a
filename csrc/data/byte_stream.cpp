#include "csrc/data/byte_stream.h"

#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "csrc/core/file.h"

namespace xlstm::data {
namespace {

constexpr size_t kPieceBytes = size_t{1} << 20;

std::string damaged(const std::string& format, const char* why) {
  return "damaged " + format + " data (" + (why != nullptr ? why : "no reason given") +
         "); the rest of the file is lost: copy it again, or rename it if it is not compressed";
}

std::string truncated(const std::string& format) {
  return "the " + format + " data ends early: the file is truncated; copy it again";
}

class PlainFile final : public ByteStream {
 public:
  explicit PlainFile(const std::string& path) : map_(path) {}
  std::string_view next() override {
    const size_t size = std::min(kPieceBytes, map_.size() - read_);
    const std::string_view piece(reinterpret_cast<const char*>(map_.data()) + read_, size);
    read_ += size;
    return piece;
  }
  int64_t position() const override { return static_cast<int64_t>(read_); }

 private:
  MappedFile map_;
  size_t read_ = 0;
};

class StandardInput final : public ByteStream {
 public:
  std::string_view next() override {
    size_t size = 0;
    while (size < piece_.size()) {  // a pipe gives as little as it has
      const ssize_t got = ::read(STDIN_FILENO, piece_.data() + size, piece_.size() - size);
      if (got == 0) break;
      if (got > 0) {
        size += static_cast<size_t>(got);
      } else if (errno != EINTR) {
        problem_ = std::string("cannot read: ") + std::strerror(errno) + "; pipe a text into it";
        break;
      }
    }
    read_ += static_cast<int64_t>(size);
    return std::string_view(piece_).substr(0, size);
  }
  int64_t position() const override { return read_; }

 private:
  std::string piece_ = std::string(kPieceBytes, '\0');
  int64_t read_ = 0;
};

class ZstdFile final : public ByteStream {
 public:
  explicit ZstdFile(const std::string& path)
      : map_(path),
        stream_(ZSTD_createDStream(), ZSTD_freeDStream),
        input_{map_.data(), map_.size(), 0},
        piece_(ZSTD_DStreamOutSize(), '\0') {
    ZSTD_DCtx_setParameter(stream_.get(), ZSTD_d_windowLogMax, 31);  // files written with --long
  }
  std::string_view next() override {
    while (problem_.empty() && (input_.pos < input_.size || more_output_)) {
      ZSTD_outBuffer output{piece_.data(), piece_.size(), 0};
      expected_ = ZSTD_decompressStream(stream_.get(), &output, &input_);
      if (ZSTD_isError(expected_) != 0) {
        problem_ = damaged("zstd", ZSTD_getErrorName(expected_));
        break;
      }
      more_output_ = expected_ != 0 && output.pos == output.size;  // the decoder may hold more
      if (output.pos > 0) return std::string_view(piece_).substr(0, output.pos);
    }
    if (problem_.empty() && expected_ != 0) problem_ = truncated("zstd");
    return {};
  }
  int64_t position() const override { return static_cast<int64_t>(input_.pos); }

 private:
  MappedFile map_;
  std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream_;
  ZSTD_inBuffer input_;
  std::string piece_;
  size_t expected_ = 0;  ///< bytes still wanted, 0 at the end of a frame
  bool more_output_ = false;
};

class GzipFile final : public ByteStream {
 public:
  explicit GzipFile(const std::string& path) : map_(path), piece_(kPieceBytes, '\0') {
    constexpr int kGzipAlone = 16;
    if (::inflateInit2(&stream_, kGzipAlone + MAX_WBITS) != Z_OK) throw std::bad_alloc();
  }
  ~GzipFile() override { ::inflateEnd(&stream_); }
  GzipFile(const GzipFile&) = delete;
  GzipFile& operator=(const GzipFile&) = delete;

  std::string_view next() override {
    while (problem_.empty() && !(between_members_ && only_padding_is_left())) {
      constexpr size_t kMostInput = size_t{1} << 30;  // zlib counts in 32 bits
      const auto given = static_cast<uInt>(std::min(map_.size() - read_, kMostInput));
      stream_.next_in = const_cast<Bytef*>(map_.data()) + read_;  // which zlib does not write to
      stream_.avail_in = given;
      stream_.next_out = reinterpret_cast<Bytef*>(piece_.data());
      stream_.avail_out = static_cast<uInt>(piece_.size());
      const int result = ::inflate(&stream_, Z_NO_FLUSH);
      read_ += given - stream_.avail_in;
      between_members_ = result == Z_STREAM_END;  // any number of them make one file
      if (between_members_) {
        ::inflateReset(&stream_);
      } else if (result == Z_BUF_ERROR) {
        problem_ = truncated("gzip");
      } else if (result != Z_OK) {
        problem_ = damaged("gzip", stream_.msg);
      }
      const size_t made = piece_.size() - stream_.avail_out;
      if (made > 0) return std::string_view(piece_).substr(0, made);
    }
    return {};
  }
  int64_t position() const override { return static_cast<int64_t>(read_); }

 private:
  bool only_padding_is_left() const {
    return std::all_of(map_.data() + read_, map_.data() + map_.size(),
                       [](unsigned char byte) { return byte == 0; });
  }
  MappedFile map_;
  z_stream stream_{};
  std::string piece_;
  size_t read_ = 0;
  bool between_members_ = true;
};

}  // namespace

std::unique_ptr<ByteStream> open_bytes(const TextFile& file) {
  if (file.is_standard_input) return std::make_unique<StandardInput>();
  switch (file.compression) {
    case TextFile::Compression::kZstd:
      return std::make_unique<ZstdFile>(file.path);
    case TextFile::Compression::kGzip:
      return std::make_unique<GzipFile>(file.path);
    case TextFile::Compression::kNone:
      break;
  }
  return std::make_unique<PlainFile>(file.path);
}

}  // namespace xlstm::data
