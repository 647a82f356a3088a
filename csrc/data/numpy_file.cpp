#include "csrc/data/numpy_file.h"

#include <algorithm>
#include <cstring>
#include <regex>
#include <stdexcept>

#include "csrc/data/token_format.h"

namespace xlstm::data {
namespace {

// Magic numbers and sizes of the zip format (APPNOTE.TXT of PKWARE, 4.3): the end record, which names the directory, and
// the headers of a member there and before its bytes. All numbers are little-endian.
constexpr uint32_t kEndMagic = 0x06054b50, kDirectoryMagic = 0x02014b50, kLocalMagic = 0x04034b50;
constexpr size_t kEndBytes = 22, kDirectoryBytes = 46, kLocalBytes = 30, kLongestComment = 65535;
/// In place of a number that stands in a record of zip64; Python's zipfile, and so numpy, writes those beyond 2 GiB, not 4.
constexpr uint32_t kInZip64 = 0xffffffff;
constexpr const char* kTooLarge = "larger than 2 GiB; write .npy files (numpy.save)";
/// Of a plain array: one line, padded to a multiple of 64.
constexpr size_t kLongestHeader = 1024;

template <typename T>
size_t number(Bytes bytes, size_t at) {
  if (at > bytes.size || bytes.size - at < sizeof(T))
    throw std::runtime_error("the archive ends in the middle of its directory");
  return load_unaligned<T>(bytes.data + at);
}

size_t end_record(Bytes archive) {
  if (archive.size < kEndBytes) throw std::runtime_error("not an .npz archive");
  const size_t last = archive.size - kEndBytes;
  for (size_t back = 0; back <= std::min(last, kLongestComment); ++back)
    if (number<uint32_t>(archive, last - back) == kEndMagic) return last - back;
  throw std::runtime_error("not an .npz archive");
}

int64_t item_bytes(const std::string& dtype) {
  if (dtype == "|u1" || dtype == "|i1" || dtype == "|b1") return 1;
  if (dtype == "<i4") return 4;
  if (dtype == "<i8") return 8;
  throw std::runtime_error("dtype " + dtype + ", expected uint8, int8, bool, int32 or int64");
}

/// Numbers of "3, 32, 32" or "3,".
std::vector<int64_t> numbers_of(const std::string& text) {
  static const std::regex digits("[0-9]{1,12}");
  std::vector<int64_t> shape;
  for (std::sregex_iterator it(text.begin(), text.end(), digits), end; it != end; ++it)
    shape.push_back(std::stoll(it->str()));
  return shape;
}

}  // namespace

int64_t NumpyArray::size() const {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

int64_t NumpyArray::operator[](int64_t index) const {
  if (dtype == "<i4") return load_unaligned<int32_t>(data + 4 * index);
  if (dtype == "<i8") return load_unaligned<int64_t>(data + 8 * index);
  return dtype == "|i1" ? static_cast<int8_t>(data[index]) : data[index];
}

NumpyArray read_npy(Bytes bytes) {
  constexpr char kMagic[] = "\x93NUMPY";
  constexpr size_t kMagicBytes = 6;
  if (bytes.size < 12 || std::memcmp(bytes.data, kMagic, kMagicBytes) != 0)
    throw std::runtime_error("not a .npy array");
  const bool first_version = bytes.data[kMagicBytes] == 1;
  const size_t start = first_version ? 10 : 12;
  const size_t length = first_version ? load_unaligned<uint16_t>(bytes.data + 8)
                                      : load_unaligned<uint32_t>(bytes.data + 8);
  if (length > bytes.size - start) throw std::runtime_error("the array ends in its header");
  if (length > kLongestHeader) throw std::runtime_error("its header is not one of a plain array");
  const std::string header(reinterpret_cast<const char*>(bytes.data) + start, length);
  static const std::regex fields(
      R"(\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \}\s*)");
  std::smatch match;
  if (!std::regex_match(header, match, fields))
    throw std::runtime_error("its header is not one of a plain array");
  NumpyArray array{match[1], numbers_of(match[3]), bytes.data + start + length};
  if (match[2] == "True" && array.shape.size() > 1)
    throw std::runtime_error("stored in columns (Fortran order), expected rows");
  int64_t left = static_cast<int64_t>(bytes.size - start - length) / item_bytes(array.dtype);
  for (const int64_t extent : array.shape) {
    if (extent == 0) throw std::runtime_error("the array is empty");
    left /= extent;  // not a product of the extents, which may be too large for one
  }
  if (left < 1) throw std::runtime_error("the file ends before the array does");
  return array;
}

Bytes npz_member(Bytes archive, const std::string& name) {
  const size_t end = end_record(archive), members = number<uint16_t>(archive, end + 10);
  size_t at = number<uint32_t>(archive, end + 16);
  if (at == kInZip64) throw std::runtime_error(std::string("the archive is ") + kTooLarge);
  for (size_t i = 0; i < members; ++i) {
    if (number<uint32_t>(archive, at) != kDirectoryMagic)
      throw std::runtime_error("the archive is damaged");
    const size_t name_bytes = number<uint16_t>(archive, at + 28);
    const size_t skipped = number<uint16_t>(archive, at + 30) + number<uint16_t>(archive, at + 32);
    if (archive.size - at < kDirectoryBytes + name_bytes)
      throw std::runtime_error("the archive ends in the middle of its directory");
    const std::string found(reinterpret_cast<const char*>(archive.data) + at + kDirectoryBytes,
                            name_bytes);
    if (found != name + ".npy") {
      at += kDirectoryBytes + name_bytes + skipped;
      continue;
    }
    if (number<uint16_t>(archive, at + 10) != 0)
      throw std::runtime_error(found + " is compressed; write the archive with numpy.savez");
    const size_t size = number<uint32_t>(archive, at + 20);
    const size_t local = number<uint32_t>(archive, at + 42);
    if (size == kInZip64 || local == kInZip64)
      throw std::runtime_error(found + ", or what stands before it, is " + kTooLarge);
    if (number<uint32_t>(archive, local) != kLocalMagic)
      throw std::runtime_error("the archive is damaged");
    const size_t start = local + kLocalBytes + number<uint16_t>(archive, local + 26) +
                         number<uint16_t>(archive, local + 28);
    if (start > archive.size || size > archive.size - start)
      throw std::runtime_error("the archive ends in the middle of " + found);
    return {archive.data + start, size};
  }
  throw std::runtime_error("there is no array " + name + " in the archive");
}

}  // namespace xlstm::data
