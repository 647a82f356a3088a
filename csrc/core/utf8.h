#pragma once
// UTF-8 by table 3-7 of the Unicode standard (RFC 3629): no surrogates, no overlong forms, at most U+10FFFF.
#include <cstddef>
#include <string_view>

namespace xlstm {

struct Utf8Character {
  size_t bytes;                               ///< what to consume, at least 1
  enum { kValid, kInvalid, kUnfinished } is;  ///< kUnfinished: well-formed as far as it goes
};

/// The character at the front of a text that is not empty; of what is none its longest part that begins one, or one byte.
Utf8Character front_character(std::string_view text);

/// Offset of the first byte that is not part of a well-formed character; text.size() where all of it is.
size_t find_invalid_utf8(std::string_view text);

/// Largest offset <= `offset` where a character of well-formed UTF-8 begins.
size_t utf8_boundary(std::string_view text, size_t offset);

}  // namespace xlstm
