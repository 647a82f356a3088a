#include "csrc/core/utf8.h"

#include <cstdint>
#include <cstring>

namespace xlstm {

Utf8Character front_character(std::string_view text) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {1, Utf8Character::kValid};
  if (lead < 0xC2 || lead > 0xF4) return {1, Utf8Character::kInvalid};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {i, Utf8Character::kUnfinished};
    if (at(i) < low || at(i) > high) return {i, Utf8Character::kInvalid};
    low = 0x80, high = 0xBF;  // only the second byte has bounds of its own
  }
  return {length, Utf8Character::kValid};
}

size_t find_invalid_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    uint64_t words[2];
    while (text.size() - i >= sizeof words) {  // runs of ASCII, 16 bytes at a time
      std::memcpy(words, text.data() + i, sizeof words);
      if (((words[0] | words[1]) & 0x8080808080808080u) != 0) break;
      i += sizeof words;
    }
    if (i == text.size()) break;
    const Utf8Character character = front_character(text.substr(i));
    if (character.is != Utf8Character::kValid) break;
    i += character.bytes;
  }
  return i;
}

size_t utf8_boundary(std::string_view text, size_t offset) {
  if (offset >= text.size()) return text.size();
  while (offset > 0 && (static_cast<unsigned char>(text[offset]) & 0xC0) == 0x80) --offset;
  return offset;
}

}  // namespace xlstm
