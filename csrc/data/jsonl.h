#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/data/text_source.h"

namespace xlstm::data {

/// Reads lines of the form {"text": str, "meta": {"redpajama_set_name": str, ...}, ...}, buffers reused. In place of a
/// string the text may be a list of segments, {"text": str, "loss": bool}; loss is true where it is left out.
class JsonlParser {
 public:
  /// text_key: what stands in place of "text". prompt_key: of a string that comes before the text and does not count; ""
  /// for none.
  explicit JsonlParser(std::string text_key = "text", std::string prompt_key = "")
      : text_key_(std::move(text_key)), prompt_key_(std::move(prompt_key)) {}
  /// One line: strict JSON (RFC 8259) with well-formed UTF-8. False when it cannot be used; error() then says why.
  bool parse(std::string_view line);
  /// Of the last line; valid until the next one.
  const std::vector<Segment>& segments() const { return segments_; }
  /// The set's name, "" where the line has none.
  std::string_view set_name() const { return set_name_; }
  const std::string& error() const { return error_; }

 private:
  enum class Object { kLine, kMeta, kSegment, kOther };
  /// Where a segment ends in text_.
  struct Part {
    size_t end = 0;
    bool loss = true;
  };
  bool parse_value(int depth);
  bool parse_object(int depth, Object object);
  bool parse_array(int depth, bool of_segments);
  bool parse_number();
  bool parse_literal(std::string_view word);
  bool parse_member(int depth, Object object, std::string_view key);
  bool parse_text();
  bool parse_segment();
  bool parse_member_of_segment(std::string_view key);
  /// Parses a string at the quote into `out`, or only past it when `out` is null.
  bool parse_string(std::string* out);
  bool parse_escape(std::string* out);
  bool parse_code_unit(uint32_t* unit);
  void skip_space();
  bool at(char c) const { return next_ != end_ && *next_ == c; }
  bool fail(const std::string& what);
  bool refuse(const std::string& what);
  bool refuse_segment(const std::string& what);
  bool refuse_without(const std::string& key, const char* holds, const char* setting);
  void set_segments();

  const char *begin_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  const std::string text_key_, prompt_key_;
  std::string text_, prompt_, set_name_, key_, error_;
  std::vector<Part> parts_;
  std::vector<Segment> segments_;
  std::string found_keys_;  ///< of the object itself, as they stand there; not all of very many
  bool has_text_ = false, has_prompt_ = false;
  bool segment_has_text_ = false, segment_has_loss_ = false, segment_loss_ = true;
};

}  // namespace xlstm::data
