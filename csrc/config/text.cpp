#include "csrc/config/text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <system_error>
#include <utility>

namespace xlstm::config {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

// Length of the run of digits at `position`.
size_t digits_at(std::string_view text, size_t position) {
  size_t end = position;
  while (end < text.size() && is_digit(text[end])) ++end;
  return end - position;
}

// Splits a sign off; std::from_chars knows '-' but not '+'.
std::string_view without_plus(std::string_view text) {
  return !text.empty() && text[0] == '+' ? text.substr(1) : text;
}

bool has_leading_zero(std::string_view digits) {
  return digits.size() > 1 && digits[0] == '0' && is_digit(digits[1]);
}

// [+-] (digits [. digits*] | . digits) [(e|E) [+-] digits]
bool is_decimal_number(std::string_view text) {
  size_t position = !text.empty() && (text[0] == '+' || text[0] == '-') ? 1 : 0;
  if (has_leading_zero(text.substr(position))) return false;
  const size_t whole = digits_at(text, position);
  position += whole;
  size_t fraction = 0;
  if (position < text.size() && text[position] == '.') {
    fraction = digits_at(text, ++position);
    position += fraction;
  }
  if (whole + fraction == 0) return false;
  if (position < text.size() && lower(text[position]) == 'e') {
    ++position;
    if (position < text.size() && (text[position] == '+' || text[position] == '-')) ++position;
    const size_t exponent = digits_at(text, position);
    if (exponent == 0) return false;
    position += exponent;
  }
  return position == text.size();
}

char hex_digit(char c) { return "0123456789abcdef"[static_cast<unsigned char>(c) & 15]; }

// Characters that some YAML reader refuses or takes for a line break, as their escape: C1 controls,
// line and paragraph separator, byte-order mark, U+FFFE, U+FFFF. "" for any other place; the length
// of the UTF-8 sequence goes to `length`.
std::string escape_of_unprintable(std::string_view text, size_t& length) {
  if (text.size() >= 2 && text[0] == '\xc2' && static_cast<unsigned char>(text[1]) < 0xa0) {
    length = 2;
    return static_cast<unsigned char>(text[1]) < 0x90 ? std::string("\\u008") + hex_digit(text[1])
                                                      : std::string("\\u009") + hex_digit(text[1]);
  }
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 5> kOthers = {
      {{"\xe2\x80\xa8", "\\u2028"},
       {"\xe2\x80\xa9", "\\u2029"},
       {"\xef\xbb\xbf", "\\ufeff"},
       {"\xef\xbf\xbe", "\\ufffe"},
       {"\xef\xbf\xbf", "\\uffff"}}};
  length = 3;
  for (const auto& [sequence, escape] : kOthers) {
    if (text.starts_with(sequence)) return std::string(escape);
  }
  return "";
}

std::string escaped(std::string_view text, char quote) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const auto byte = static_cast<unsigned char>(c);
    size_t length = 1;
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '\r') {
      out += "\\r";
    } else if (byte < 0x20 || byte == 0x7f) {
      out += std::string("\\u00") + static_cast<char>('0' + (byte >> 4)) + hex_digit(c);
    } else if (const std::string escape = escape_of_unprintable(text.substr(i), length);
               !escape.empty()) {
      out += escape;
      i += length - 1;
    } else {
      if (quote == '"' && (c == '"' || c == '\\')) out += '\\';
      out += c;
    }
  }
  return out;
}

// Optimal string alignment distance: insertion, deletion, substitution, swap of neighbours.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> before_last, last(b.size() + 1), current(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) last[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    current[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitution = lower(a[i - 1]) == lower(b[j - 1]) ? 0 : 1;
      current[j] = std::min({last[j] + 1, current[j - 1] + 1, last[j - 1] + substitution});
      const bool swapped = i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) &&
                           lower(a[i - 2]) == lower(b[j - 1]);
      if (swapped) current[j] = std::min(current[j], before_last[j - 2] + 1);
    }
    before_last = last;
    last = current;
  }
  return last[b.size()];
}

}  // namespace

std::optional<int64_t> parse_int(std::string_view text) {
  const std::string_view body = without_plus(text);
  const std::string_view magnitude =
      !body.empty() && body[0] == '-' && body.size() == text.size() ? body.substr(1) : body;
  if (magnitude.empty() || !is_digit(magnitude[0]) || has_leading_zero(magnitude)) return {};
  int64_t value = 0;
  const auto [end, error] = std::from_chars(body.data(), body.data() + body.size(), value);
  if (error != std::errc() || end != body.data() + body.size()) return {};
  return value;
}

std::optional<double> parse_double(std::string_view text) {
  if (!is_decimal_number(text)) return {};
  const std::string_view body = without_plus(text);
  double value = 0;
  const auto [end, error] = std::from_chars(body.data(), body.data() + body.size(), value);
  if (error != std::errc() || end != body.data() + body.size()) return {};
  return value;
}

std::string format_double(double value) {
  std::array<char, 64> buffer;
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  std::string text(buffer.data(), result.ptr);
  if (!std::isfinite(value) || text.find('.') != std::string::npos) return text;
  const size_t exponent = text.find('e');
  return exponent == std::string::npos ? text + ".0" : text.insert(exponent, ".0");
}

std::string in_quotes(std::string_view text) {
  constexpr size_t kMax = 60;
  if (text.size() <= kMax) return "'" + escaped(text, '\'') + "'";
  size_t cut = kMax;  // not inside a UTF-8 sequence
  while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xc0) == 0x80) --cut;
  return "'" + escaped(text.substr(0, cut), '\'') + "...'";
}

std::string double_quoted(std::string_view text) { return '"' + escaped(text, '"') + '"'; }

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string join(const std::vector<std::string>& items, std::string_view separator) {
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += separator;
    out += items[i];
  }
  return out;
}

std::string closest_match(std::string_view word, const std::vector<std::string>& candidates) {
  constexpr size_t kLongestName = 100;
  std::string best;
  if (word.size() > kLongestName) return best;
  size_t best_distance = std::max<size_t>(1, word.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t distance = edit_distance(word, candidate);
    // A short word is not "close" when most of it would have to change.
    if (distance < best_distance && 2 * distance < std::max(word.size(), candidate.size())) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace xlstm::config
