#pragma once
// Numbers and names as text, the same under every locale.
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace xlstm::config {

/// A decimal integer: "-3", "+3", "0", "12"; no leading zeros, underscores, base prefixes or
/// exponents.
std::optional<int64_t> parse_int(std::string_view text);
/// A finite decimal number: "3e-4", "-1.5", ".5", "2."; no leading zeros, underscores, hexadecimal,
/// inf or nan.
std::optional<double> parse_double(std::string_view text);
/// Shortest text that reads back as the same number, with a point and a signed exponent
/// ("1.0e-05"), so that YAML 1.1 readers (PyYAML) see a number too.
std::string format_double(double value);

/// 'text' for a message: control characters escaped, cut after 60 characters.
std::string in_quotes(std::string_view text);
/// "text" with YAML and JSON escapes; UTF-8 is kept.
std::string double_quoted(std::string_view text);
/// Without the line break.
std::string first_line(const std::string& text);
/// Joins with a separator.
std::string join(const std::vector<std::string>& items, std::string_view separator);

/// The candidate a typist most likely meant (edit distance with transpositions, case ignored), or
/// "".
std::string closest_match(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace xlstm::config
