#pragma once

namespace xlstm::data {

/// What a tokenizer may be given as, in the words of every help and message.
inline constexpr const char* kTokenizerSpecs =
    "\"bytes\", a tokenizer.json, or a folder with tokenizer.json, with vocab.json and merges.txt, "
    "or "
    "with encoder.json and vocab.bpe";

}  // namespace xlstm::data
