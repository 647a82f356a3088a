#include "csrc/data/file_format.h"

#include <algorithm>

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

constexpr Format kFormats[] = {
    {"\x1f\x8b\x08"sv, 0, "gzip data", "rename the file so that it ends in .gz"},
    {"\x28\xb5\x2f\xfd"sv, 0, "zstd data", "rename the file so that it ends in .zst"},
    {"BZh"sv, 0, "bzip2 data", "pipe it: bzcat FILE | xlstm-data prepare - --output PREFIX"},
    {"\xfd"
     "7zXZ\0"sv,
     0, "xz data", "pipe it: xzcat FILE | xlstm-data prepare - --output PREFIX"},
    {"PAR1"sv, 0, "a Parquet file",
     "pipe it as JSONL: python -c 'import json, sys, pyarrow.parquet as p; "
     "[print(json.dumps(r, default=str)) for f in sys.argv[1:] for b in "
     "p.ParquetFile(f).iter_batches() for r in b.to_pylist()]' FILE | xlstm-data prepare - "
     "--output PREFIX --text-key COLUMN"},
    {"ARROW1"sv, 0, "an Arrow file",
     "write it as JSONL: pyarrow.feather.read_table(FILE).to_pandas().to_json(OUT, "
     "orient=\"records\", lines=True)"},
    {"\xff\xff\xff\xff"sv, 0, "an Arrow stream",
     "write it as JSONL: datasets.Dataset.from_file(FILE).to_json(OUT)"},
    {"\x89HDF\r\n\x1a\n"sv, 0, "an HDF5 file", "read its texts by h5py and write them as JSONL"},
    {"PK\x03\x04"sv, 0, "a zip archive", "unpack it (unzip FILE -d FOLDER) and give the folder"},
    {"ustar"sv, 257, "a tar archive", "unpack it (tar -xf FILE -C FOLDER) and give the folder"},
    {"%PDF-"sv, 0, "a PDF document", "extract its text: pdftotext FILE"},
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

}  // namespace

std::string what_instead_of_text(std::string_view head) {
  head = head.substr(0, 1024);
  for (const Format& format : kFormats) {
    if (!head.substr(std::min(format.offset, head.size())).starts_with(format.magic)) continue;
    if (!is_binary(head)) continue;
    return std::string(format.name) + ", not text; " + std::string(format.remedy);
  }
  return "";
}

}  // namespace xlstm::data
