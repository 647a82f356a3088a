#include "csrc/data/utf8.h"

#include <cstdint>
#include <cstring>

namespace xlstm::data {
namespace {

/// Length of the well-formed character at `p`, 0 when there is none (Unicode, table 3-7).
size_t character_length(const unsigned char* p, const unsigned char* end) {
  const unsigned char lead = *p;
  if (lead < 0x80) return 1;
  if (lead < 0xc2 || lead > 0xf4) return 0;
  const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  if (static_cast<size_t>(end - p) < length) return 0;
  const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (p[1] < low || p[1] > high) return 0;
  for (size_t i = 2; i < length; ++i)
    if ((p[i] & 0xc0) != 0x80) return 0;
  return length;
}

}  // namespace

size_t find_invalid_utf8(std::string_view text) {
  const auto* const begin = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const end = begin + text.size();
  const unsigned char* p = begin;
  while (p < end) {
    uint64_t words[2];
    while (static_cast<size_t>(end - p) >= sizeof words) {  // runs of ASCII, 16 bytes at a time
      std::memcpy(words, p, sizeof words);
      if (((words[0] | words[1]) & 0x8080808080808080u) != 0) break;
      p += sizeof words;
    }
    if (p == end) break;
    const size_t length = character_length(p, end);
    if (length == 0) break;
    p += length;
  }
  return static_cast<size_t>(p - begin);
}

size_t utf8_boundary(std::string_view text, size_t offset) {
  if (offset >= text.size()) return text.size();
  while (offset > 0 && (static_cast<unsigned char>(text[offset]) & 0xc0) == 0x80) --offset;
  return offset;
}

}  // namespace xlstm::data
