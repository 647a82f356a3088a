#pragma once
// Text that arrives token by token, turned into whole UTF-8 characters.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/data/tokenizer.h"

namespace xlstm::train {

/// Passes valid UTF-8 on, holds an unfinished character back until its bytes are there, and replaces what can never
/// become one by U+FFFD.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  /// What is held back at the end, as U+FFFD.
  std::string finish();

 private:
  std::string held_;
};

/// Decodes generated ids as they come. A tokenizer may need the neighbouring ids to place spaces and to finish a
/// character, so each piece is the difference between the text with and without the new ids.
class TextStream {
 public:
  /// `prompt`: the ids before the first generated one.
  TextStream(data::Tokenizer& tokenizer, const std::vector<int64_t>& prompt);
  /// The text that this id completes; may be empty.
  std::string push(int64_t id);
  std::string finish();

 private:
  std::string new_text();
  data::Tokenizer& tokenizer_;
  std::vector<int64_t> ids_;
  size_t shown_ = 0;  ///< ids whose text is out
  Utf8Stream utf8_;
};

}  // namespace xlstm::train
