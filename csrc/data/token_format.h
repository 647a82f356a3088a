#pragma once
// The numbers of Megatron's .idx file, shared by reader and writer. All integers are little-endian:
//   9 bytes "MMIDIDX\0\0" | u64 version = 1 | u8 dtype code | u64 sequences S | u64 entries D of the document index
//   | S x i32 length in tokens | S x i64 byte offset into .bin | D x i64 document index
// Document d is the sequences [index[d], index[d+1]); writers put one sequence per document. A document of more than
// 2^31-1 tokens is several sequences of one document.
//
// Where not all tokens count in the loss, libxlstm adds a file .loss, which other tools ignore: the positions of tokens at
// which counting begins and ends, in turn, as i64 in growing order, the last one the number of all tokens. Token t counts
// where the number of positions <= t is odd.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xlstm::data {

static_assert(std::endian::native == std::endian::little, "token files are mapped as they are");

constexpr char kIndexMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr uint64_t kIndexVersion = 1;
constexpr size_t kIndexHeaderBytes = 34;

enum class DtypeCode : int {
  kUint8 = 1,
  kInt8 = 2,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat64 = 6,
  kFloat32 = 7,
  kUint16 = 8,
};

/// Bytes of one token; 0 for codes that cannot hold token ids.
constexpr size_t dtype_bytes(int code) {
  switch (static_cast<DtypeCode>(code)) {
    case DtypeCode::kUint8:
    case DtypeCode::kInt8:
      return 1;
    case DtypeCode::kInt16:
    case DtypeCode::kUint16:
      return 2;
    case DtypeCode::kInt32:
      return 4;
    case DtypeCode::kInt64:
      return 8;
    default:
      return 0;
  }
}

/// A value at any alignment: the arrays of an .idx file start at odd offsets.
template <typename T>
T load_unaligned(const unsigned char* data) {
  T value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

}  // namespace xlstm::data
