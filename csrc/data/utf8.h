#pragma once
#include <cstddef>
#include <string_view>

namespace xlstm::data {

/// Offset of the first byte that is not part of well-formed UTF-8 (RFC 3629: no surrogates, no overlong forms, at most
/// U+10FFFF); text.size() when all of it is.
size_t find_invalid_utf8(std::string_view text);

/// Largest offset <= `offset` where a character of well-formed UTF-8 begins.
size_t utf8_boundary(std::string_view text, size_t offset);

}  // namespace xlstm::data
