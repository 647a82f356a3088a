#include "csrc/data/file_format.h"

#include <algorithm>

#include "csrc/core/shell.h"
#include "csrc/core/utf8.h"

namespace xlstm::data {
namespace {

using namespace std::string_view_literals;

struct Format {
  std::string_view magic;
  size_t offset;
  std::string_view name;
  std::string_view remedy;
};

/// FILE stands for the file. Commands can be typed as they are, but for PREFIX and FOLDER.
constexpr Format kFormats[] = {
    {"\x1f\x8b\x08"sv, 0, "gzip data", "rename the file so that it ends in .gz"},
    {"\x28\xb5\x2f\xfd"sv, 0, "zstd data", "rename the file so that it ends in .zst"},
    {"BZh"sv, 0, "bzip2 data", "pipe it: bzcat FILE | xlstm-data prepare - --output PREFIX"},
    {"\xfd"
     "7zXZ\0"sv,
     0, "xz data", "pipe it: xzcat FILE | xlstm-data prepare - --output PREFIX"},
    {"PAR1"sv, 0, "a Parquet file",
     "pipe it as JSONL: python -c \"import pandas, sys; "
     "[pandas.read_parquet(f).to_json(sys.stdout, orient='records', lines=True) "
     "for f in sys.argv[1:]]\" FILE | xlstm-data prepare - --output PREFIX"},
    {"ARROW1"sv, 0, "an Arrow file",
     "pipe it as JSONL: python -c \"import pandas, sys; "
     "[pandas.read_feather(f).to_json(sys.stdout, orient='records', lines=True) "
     "for f in sys.argv[1:]]\" FILE | xlstm-data prepare - --output PREFIX"},
    {"\xff\xff\xff\xff"sv, 0, "an Arrow stream (as datasets writes it)",
     "pipe it as JSONL: python -c \"import datasets, sys; "
     "[datasets.Dataset.from_file(f).to_json(sys.stdout.buffer) for f in sys.argv[1:]]\" FILE | "
     "xlstm-data prepare - --output PREFIX (ids of tokens: libxlstm.TokenWriter in Python)"},
    {"\x89HDF\r\n\x1a\n"sv, 0, "an HDF5 file", "read its texts by h5py and write them as JSONL"},
    {"PK\x03\x04"sv, 0, "a zip archive", "unpack it (unzip FILE -d FOLDER) and give the folder"},
    {"ustar"sv, 257, "a tar archive", "unpack it (tar -xf FILE -C FOLDER) and give the folder"},
    {"%PDF-"sv, 0, "a PDF document", "extract its text: pdftotext FILE"},
    {"\x88\xd8\x34\x01"sv, 0, "ids of tokens (llm.c)", kIdsRemedy},
    {"\x93NUMPY"sv, 0, "an array of numpy",
     "write its texts as JSONL; ids of tokens go in by libxlstm.TokenWriter in Python"},
    {"MMIDIDX\0"sv, 0, "the index of a token file", "it is prepared already: data.train reads it"},
    {"\xff\xfe"sv, 0, "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"},
    {"\xfe\xff"sv, 0, "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"},
};

/// Some magic numbers are words: a text may begin with them, but has no zero bytes and is UTF-8 (the last character may be
/// cut).
bool is_binary(std::string_view head) {
  constexpr size_t kLongestCharacter = 4;
  return head.find('\0') != std::string_view::npos ||
         find_invalid_utf8(head) + kLongestCharacter <= head.size();
}

/// The remedy with the file's path.
std::string with_path(std::string_view remedy, const std::string& path) {
  std::string text(remedy);
  constexpr std::string_view kPlace = "FILE";
  for (size_t at = 0; (at = text.find(kPlace, at)) != std::string::npos;) {
    const std::string quoted = shell_quoted(path);
    text.replace(at, kPlace.size(), quoted);
    at += quoted.size();
  }
  return text;
}

}  // namespace

std::string what_instead_of_text(std::string_view head, const std::string& path) {
  head = head.substr(0, kFormatBytes);
  if (!is_binary(head)) return "";
  for (const Format& format : kFormats)
    if (head.substr(std::min(format.offset, head.size())).starts_with(format.magic))
      return std::string(format.name) + ", not text; " + with_path(format.remedy, path);
  // nanoGPT's and Megatron's have no mark of their own.
  if (path.ends_with(".bin"))
    return std::string("binary data, not text; if these are ids of tokens, ") + kIdsRemedy;
  return "";
}

}  // namespace xlstm::data
