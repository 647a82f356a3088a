#include "train/text_stream.h"

#include <algorithm>

namespace xlstm::train {
namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";
constexpr size_t kContextIds = 6;

struct Character {
  size_t bytes;  ///< what to consume
  bool valid;
  bool unfinished;  ///< valid so far, more bytes needed
};

/// The character at the front of `text` by table 3-7 of the Unicode standard (no surrogates, no overlong forms).
Character front_character(std::string_view text) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {1, false, false};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {i, false, true};
    unsigned char low = 0x80, high = 0xBF;
    if (i == 1 && lead == 0xE0) low = 0xA0;
    if (i == 1 && lead == 0xED) high = 0x9F;
    if (i == 1 && lead == 0xF0) low = 0x90;
    if (i == 1 && lead == 0xF4) high = 0x8F;
    if (at(i) < low || at(i) > high) return {i, false, false};
  }
  return {length, true, false};
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

std::string Utf8Stream::push(std::string_view bytes) {
  held_ += bytes;
  std::string text;
  size_t next = 0;
  while (next < held_.size()) {
    const std::string_view rest = std::string_view(held_).substr(next);
    const Character character = front_character(rest);
    if (character.unfinished) break;
    if (character.valid) {
      text += rest.substr(0, character.bytes);
    } else {
      text += kReplacement;
    }
    next += character.bytes;
  }
  held_.erase(0, next);
  return text;
}

std::string Utf8Stream::finish() {
  const bool any = !held_.empty();
  held_.clear();
  return any ? kReplacement : "";
}

TextStream::TextStream(data::Tokenizer& tokenizer, const std::vector<int64_t>& prompt)
    : tokenizer_(tokenizer),
      ids_(prompt.end() - static_cast<std::ptrdiff_t>(std::min(kContextIds, prompt.size())),
           prompt.end()),
      shown_(ids_.size()) {}

std::string TextStream::new_text() {
  const std::vector<int64_t> context(ids_.begin(),
                                     ids_.begin() + static_cast<std::ptrdiff_t>(shown_));
  const std::string before = tokenizer_.decode(context);
  const std::string all = tokenizer_.decode(ids_);
  return all.size() > before.size() ? all.substr(before.size()) : "";
}

std::string TextStream::push(int64_t id) {
  ids_.push_back(id);
  const std::string text = new_text();
  // A tokenizer that answers in text shows an unfinished character as U+FFFD: wait, but not for ever.
  if (ends_with(text, kReplacement) && ids_.size() - shown_ < 4) return "";
  if (shown_ > kContextIds) {
    const size_t surplus = shown_ - kContextIds;
    ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(surplus));
  }
  shown_ = ids_.size();
  return utf8_.push(text);
}

std::string TextStream::finish() {
  const std::string text = shown_ < ids_.size() ? new_text() : "";
  shown_ = ids_.size();
  return utf8_.push(text) + utf8_.finish();
}

}  // namespace xlstm::train
