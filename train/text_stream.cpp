#include "train/text_stream.h"

#include <algorithm>

#include "csrc/core/utf8.h"

namespace xlstm::train {
namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";
constexpr size_t kContextIds = 6;

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
    const Utf8Character character = front_character(rest);
    if (character.is == Utf8Character::kUnfinished) break;
    if (character.is == Utf8Character::kValid) {
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
