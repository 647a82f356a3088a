#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace xlstm::data {

/// Reads lines of the form {"text": str, "meta": {"redpajama_set_name": str, ...}, ...}, buffers reused.
class JsonlParser {
 public:
  /// text_key: what stands in place of "text".
  explicit JsonlParser(std::string text_key = "text") : text_key_(std::move(text_key)) {}
  /// One line: strict JSON (RFC 8259) with well-formed UTF-8. False when it cannot be used; error() then says why.
  bool parse(std::string_view line);
  std::string_view text() const { return text_; }
  /// The set's name, "" where the line has none.
  std::string_view set_name() const { return set_name_; }
  const std::string& error() const { return error_; }

 private:
  bool parse_value(int depth);
  bool parse_object(int depth, bool in_meta);
  bool parse_array(int depth);
  bool parse_number();
  bool parse_literal(std::string_view word);
  bool parse_member(int depth, bool in_meta, std::string_view key);
  /// Parses a string at the quote into `out`, or only past it when `out` is null.
  bool parse_string(std::string* out);
  bool parse_escape(std::string* out);
  bool parse_code_unit(uint32_t* unit);
  void skip_space();
  bool at(char c) const { return next_ != end_ && *next_ == c; }
  bool fail(const std::string& what);
  bool fail_without_text();

  const char *begin_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  const std::string text_key_;
  std::string text_, set_name_, key_, error_;
  std::string found_keys_;  ///< of the object itself, as they stand there; not all of very many
  bool has_text_ = false;
};

}  // namespace xlstm::data
