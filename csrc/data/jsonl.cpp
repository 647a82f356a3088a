#include "csrc/data/jsonl.h"

#include <cctype>
#include <cstring>

#include "csrc/core/utf8.h"
#include "csrc/data/file_format.h"

namespace xlstm::data {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kMaxKeyBytes = 200;  ///< of the keys that are named in an error, about

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// First quote, backslash or control character at or behind `p`: eight characters at a time, by the carry-free tests
/// for zero bytes and bytes below 0x20.
const char* find_special(const char* p, const char* end) {
  constexpr uint64_t ones = 0x0101010101010101u, highs = 0x8080808080808080u;
  for (; end - p >= 8; p += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p, 8);
    const uint64_t quote = word ^ ones * '"', backslash = word ^ ones * '\\';
    const uint64_t hits = ((quote - ones) & ~quote) | ((backslash - ones) & ~backslash) |
                          ((word - ones * 0x20) & ~word);
    if ((hits & highs) != 0) break;
  }
  while (p < end && *p != '"' && *p != '\\' && static_cast<unsigned char>(*p) >= 0x20) ++p;
  return p;
}

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

}  // namespace

bool JsonlParser::fail(const std::string& what) {
  error_ = "not valid JSON at byte " + std::to_string(next_ - begin_ + 1) + ": " + what;
  return false;
}

bool JsonlParser::refuse(const std::string& what) {
  error_ = what;
  return false;
}

bool JsonlParser::refuse_segment(const std::string& what) {
  return refuse("segment " + std::to_string(parts_.size() + 1) + " of \"" + text_key_ + "\" " +
                what + "; write each as {\"text\": \"...\", \"loss\": true or false}");
}

bool JsonlParser::refuse_without(const std::string& key, const char* holds, const char* setting) {
  return refuse("no \"" + key + "\", but " +
                (found_keys_.empty() ? "an empty object" : found_keys_) +
                "; say which key has the " + holds + " (--" + holds +
                "-key KEY of xlstm-data, or " + setting + ")");
}

void JsonlParser::skip_space() {
  while (next_ != end_ && (*next_ == ' ' || *next_ == '\t' || *next_ == '\r' || *next_ == '\n'))
    ++next_;
}

bool JsonlParser::parse(std::string_view line) {
  begin_ = next_ = line.data();
  end_ = begin_ + line.size();
  text_.clear();
  prompt_.clear();
  set_name_.clear();
  error_.clear();
  found_keys_.clear();
  parts_.clear();
  has_text_ = has_prompt_ = false;
  const size_t invalid = find_invalid_utf8(line);
  if (invalid != line.size()) return refuse("invalid UTF-8 at byte " + std::to_string(invalid + 1));
  skip_space();
  if (!at('{')) return refuse("not a JSON object");
  if (!parse_object(0, Object::kLine)) return false;
  skip_space();
  if (next_ != end_) return fail("text behind the object");
  if (!has_text_) return refuse_without(text_key_, "text", "data.text_key");
  if (!prompt_key_.empty() && !has_prompt_)
    return refuse_without(prompt_key_, "prompt", "data.prompt_key");
  set_segments();
  return true;
}

void JsonlParser::set_segments() {
  segments_.clear();
  if (has_prompt_) segments_.push_back({prompt_, false});
  size_t begin = 0;
  for (const Part& part : parts_) {
    segments_.push_back({std::string_view(text_).substr(begin, part.end - begin), part.loss});
    begin = part.end;
  }
}

bool JsonlParser::parse_object(int depth, Object object) {
  if (depth > kMaxDepth) return fail("nested too deeply");
  ++next_;
  skip_space();
  if (at('}')) return ++next_, true;
  while (true) {
    if (!at('"')) return fail("expected a name in quotes");
    key_.clear();
    const char* const key = next_;
    if (!parse_string(&key_)) return false;
    if (depth == 0 && found_keys_.size() + static_cast<size_t>(next_ - key) < kMaxKeyBytes)
      found_keys_.append(found_keys_.empty() ? "" : ", ").append(key, next_);
    skip_space();
    if (!at(':')) return fail("expected ':'");
    ++next_;
    skip_space();
    if (!parse_member(depth, object, key_)) return false;
    skip_space();
    if (at('}')) return ++next_, true;
    if (!at(',')) return fail("expected ',' or '}'");
    ++next_;
    skip_space();
  }
}

bool JsonlParser::parse_member(int depth, Object object, std::string_view key) {
  if (object == Object::kSegment) return parse_member_of_segment(key);
  if (object == Object::kLine && key == text_key_) return parse_text();
  if (object == Object::kLine && !prompt_key_.empty() && key == prompt_key_) {
    if (next_ == end_) return fail("ends early");
    if (!at('"')) return refuse("\"" + prompt_key_ + "\" is not a string");
    if (has_prompt_) return fail("a second \"" + prompt_key_ + "\"");
    has_prompt_ = true;
    return parse_string(&prompt_);
  }
  if (object == Object::kLine && key == "meta" && at('{')) return parse_object(1, Object::kMeta);
  if (object == Object::kMeta && key == "redpajama_set_name" && at('"')) {
    set_name_.clear();
    return parse_string(&set_name_);
  }
  return parse_value(depth + 1);
}

bool JsonlParser::parse_text() {
  if (next_ == end_) return fail("ends early");
  if (!at('"') && !at('['))
    return refuse("\"" + text_key_ + "\" is not a string, nor a list of segments");
  if (has_text_) return fail("a second \"" + text_key_ + "\"");
  has_text_ = true;
  if (at('[')) return parse_array(1, true);
  if (!parse_string(&text_)) return false;
  parts_.push_back({text_.size(), true});
  return true;
}

bool JsonlParser::parse_segment() {
  if (next_ == end_) return fail("ends early");
  if (parts_.empty() && is_digit(*next_))
    return refuse("\"" + text_key_ +
                  "\" is a list of numbers, not text; if they are ids of tokens, " + kIdsRemedy);
  if (!at('{')) return refuse_segment("is not an object");
  segment_has_text_ = segment_has_loss_ = false;
  segment_loss_ = true;
  if (!parse_object(2, Object::kSegment)) return false;
  if (!segment_has_text_) return refuse_segment("has no \"text\"");
  parts_.push_back({text_.size(), segment_loss_});
  return true;
}

/// Other names are refused: a misspelt "loss" would count what is not to count.
bool JsonlParser::parse_member_of_segment(std::string_view key) {
  if (next_ == end_) return fail("ends early");
  if (key == "text") {
    if (!at('"')) return refuse_segment("has a \"text\" that is not a string");
    if (segment_has_text_) return fail("a second \"text\"");
    segment_has_text_ = true;
    return parse_string(&text_);
  }
  if (key != "loss") return refuse_segment("has a \"" + std::string(key) + "\"");
  if (!at('t') && !at('f')) return refuse_segment("has a \"loss\" that is not true or false");
  if (segment_has_loss_) return fail("a second \"loss\"");
  segment_has_loss_ = true;
  segment_loss_ = at('t');
  return parse_literal(segment_loss_ ? "true" : "false");
}

bool JsonlParser::parse_value(int depth) {
  if (next_ == end_) return fail("ends early");
  switch (*next_) {
    case '{':
      return parse_object(depth, Object::kOther);
    case '[':
      return parse_array(depth, false);
    case '"':
      return parse_string(nullptr);
    case 't':
      return parse_literal("true");
    case 'f':
      return parse_literal("false");
    case 'n':
      return parse_literal("null");
    default:
      return parse_number();
  }
}

bool JsonlParser::parse_array(int depth, bool of_segments) {
  if (depth > kMaxDepth) return fail("nested too deeply");
  ++next_;
  skip_space();
  if (at(']')) return ++next_, true;
  while (true) {
    if (!(of_segments ? parse_segment() : parse_value(depth + 1))) return false;
    skip_space();
    if (at(']')) return ++next_, true;
    if (!at(',')) return fail("expected ',' or ']'");
    ++next_;
    skip_space();
  }
}

bool JsonlParser::parse_literal(std::string_view word) {
  if (static_cast<size_t>(end_ - next_) < word.size() ||
      std::string_view(next_, word.size()) != word)
    return fail("unknown word");
  next_ += word.size();
  return true;
}

bool JsonlParser::parse_number() {
  const auto digits = [&] {
    const char* first = next_;
    while (next_ != end_ && is_digit(*next_)) ++next_;
    return next_ != first;
  };
  if (at('-')) ++next_;
  if (at('0')) {
    ++next_;
  } else if (!digits()) {
    return fail("unexpected character");
  }
  if (at('.')) {
    ++next_;
    if (!digits()) return fail("number without digits");
  }
  if (at('e') || at('E')) {
    ++next_;
    if (at('+') || at('-')) ++next_;
    if (!digits()) return fail("number without digits");
  }
  return true;
}

bool JsonlParser::parse_string(std::string* out) {
  ++next_;
  while (true) {
    const char* special = find_special(next_, end_);
    if (out != nullptr) out->append(next_, special);
    next_ = special;
    if (next_ == end_) return fail("string without an end");
    if (*next_ == '"') return ++next_, true;
    if (*next_ != '\\') return fail("control character in a string");
    if (!parse_escape(out)) return false;
  }
}

bool JsonlParser::parse_escape(std::string* out) {
  constexpr const char* kNames = "\"\\/bfnrt";
  constexpr const char* kValues = "\"\\/\b\f\n\r\t";
  ++next_;
  if (next_ == end_) return fail("string without an end");
  if (*next_ != 'u') {
    const char* found = *next_ != '\0' ? std::strchr(kNames, *next_) : nullptr;
    if (found == nullptr) return fail("unknown escape");
    if (out != nullptr) *out += kValues[found - kNames];
    ++next_;
    return true;
  }
  ++next_;
  uint32_t code = 0;
  if (!parse_code_unit(&code)) return false;
  if (code >= 0xdc00 && code < 0xe000) return fail("lone surrogate");
  if (code >= 0xd800 && code < 0xdc00) {
    uint32_t low = 0;
    if (end_ - next_ < 6 || next_[0] != '\\' || next_[1] != 'u') return fail("lone surrogate");
    next_ += 2;
    if (!parse_code_unit(&low)) return false;
    if (low < 0xdc00 || low >= 0xe000) return fail("lone surrogate");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  if (out != nullptr) append_utf8(*out, code);
  return true;
}

bool JsonlParser::parse_code_unit(uint32_t* unit) {
  *unit = 0;
  for (int i = 0; i < 4; ++i, ++next_) {
    if (next_ == end_ || std::isxdigit(static_cast<unsigned char>(*next_)) == 0)
      return fail("bad \\u escape");
    const char c = *next_;
    *unit = *unit * 16 + static_cast<uint32_t>(is_digit(c) ? c - '0' : (c | 0x20) - 'a' + 10);
  }
  return true;
}

}  // namespace xlstm::data
