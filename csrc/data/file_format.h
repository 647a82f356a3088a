#pragma once
#include <string>
#include <string_view>

namespace xlstm::data {

/// What a file is in place of text by its first bytes (1 kB suffice), and how to make text of it, as "a Parquet file, not
/// text; ..."; "" for text and for what is not known.
std::string what_instead_of_text(std::string_view head);

}  // namespace xlstm::data
