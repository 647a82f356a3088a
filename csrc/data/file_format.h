#pragma once
#include <string>
#include <string_view>

namespace xlstm::data {

/// What to do with ids in place of text.
inline constexpr const char* kIdsRemedy =
    "libxlstm.TokenWriter makes token files of them in Python: help(libxlstm.TokenWriter)";

/// Bytes at a file's beginning that tell its format.
constexpr size_t kFormatBytes = 1024;

/// What a file is in place of text by its first bytes, and how to make text of it, as "a Parquet file, not text; ..."; "" for
/// text and for what is not known. path: of the file, for the commands.
std::string what_instead_of_text(std::string_view head, const std::string& path);

}  // namespace xlstm::data
