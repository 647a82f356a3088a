#include <zstd.h>

#include <algorithm>
#include <cstdio>
#include <memory>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "csrc/data/jsonl.h"
#include "csrc/data/text_source.h"
#include "csrc/data/utf8.h"

namespace xlstm::data {
namespace {

/// A longer line is taken as damage (a compressed file may hold any amount of it).
constexpr size_t kMaxLineBytes = size_t{1} << 30;

/// The text of a file without the byte-order mark that some programs put before it.
std::string_view without_mark(std::string_view text) {
  constexpr std::string_view kMark = "\xef\xbb\xbf";
  return text.starts_with(kMark) ? text.substr(kMark.size()) : text;
}

void read_text(const TextFile& file, const DocumentSink& sink) {
  const MappedFile map(file.path);
  const std::string_view text(reinterpret_cast<const char*>(map.data()), map.size());
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.size()) {
    const auto line =
        1 + std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(invalid), '\n');
    sink.bad(line, "invalid UTF-8 at byte " + std::to_string(invalid + 1) + " of the file");
  } else {
    sink.document({without_mark(text), file.input, 1});
  }
  sink.progress(file.size_bytes);
}

/// Turns lines into documents and problems.
class LineReader {
 public:
  LineReader(const TextFile& file, const DocumentSink& sink) : file_(file), sink_(sink) {}

  void line(std::string_view line) {
    if (++number_ == 1) line = without_mark(line);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) return;
    if (parser_.parse(line)) {
      const std::string_view source = parser_.set_name().empty() ? file_.input : parser_.set_name();
      sink_.document({parser_.text(), source, number_});
    } else {
      sink_.bad(number_, parser_.error());
    }
  }
  /// A problem at the line behind the last one.
  void problem(const std::string& what) { sink_.bad(number_ + 1, what); }
  void skip_line() { ++number_; }

 private:
  const TextFile& file_;
  const DocumentSink& sink_;
  JsonlParser parser_;
  int64_t number_ = 0;
};

void read_jsonl(const TextFile& file, const DocumentSink& sink) {
  const MappedFile map(file.path);
  const std::string_view text(reinterpret_cast<const char*>(map.data()), map.size());
  LineReader reader(file, sink);
  for (size_t first = 0; first < text.size();) {
    const size_t end = std::min(text.find('\n', first), text.size());
    reader.line(text.substr(first, end - first));
    first = end + 1;
    sink.progress(static_cast<int64_t>(std::min(first, text.size())));
  }
}

/// Splits a stream of pieces into lines; a line inside one piece is not copied.
class LineSplitter {
 public:
  explicit LineSplitter(LineReader& reader) : reader_(reader) {}

  void feed(std::string_view piece) {
    for (size_t end = 0; (end = piece.find('\n')) != std::string_view::npos;
         piece.remove_prefix(end + 1))
      end_line(piece.substr(0, end));
    if (carry_.size() + piece.size() > kMaxLineBytes && !too_long_) {
      reader_.problem("line of more than 1 GiB");
      too_long_ = true;
      carry_.clear();
    }
    if (!too_long_) carry_ += piece;
  }
  /// The last line may lack its newline.
  void finish() {
    if (!carry_.empty()) end_line("");
  }

 private:
  void end_line(std::string_view rest) {
    if (too_long_) {
      reader_.skip_line();
    } else if (carry_.empty()) {
      reader_.line(rest);
    } else {
      carry_ += rest;
      reader_.line(carry_);
    }
    carry_.clear();
    too_long_ = false;
  }
  LineReader& reader_;
  std::string carry_;
  bool too_long_ = false;
};

void read_jsonl_zst(const TextFile& file, const DocumentSink& sink) {
  const MappedFile map(file.path);
  const std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream(ZSTD_createDStream(),
                                                                        ZSTD_freeDStream);
  ZSTD_DCtx_setParameter(stream.get(), ZSTD_d_windowLogMax, 31);  // files written with --long
  std::string piece(ZSTD_DStreamOutSize(), '\0');
  ZSTD_inBuffer input{map.data(), map.size(), 0};
  LineReader reader(file, sink);
  LineSplitter splitter(reader);
  size_t result = 0;
  bool more_output = false;
  while (input.pos < input.size || more_output) {
    ZSTD_outBuffer output{piece.data(), piece.size(), 0};
    result = ZSTD_decompressStream(stream.get(), &output, &input);
    if (ZSTD_isError(result) != 0) {
      reader.problem(std::string("damaged zstd data (") + ZSTD_getErrorName(result) +
                     "); the rest of the file is lost");
      return;
    }
    splitter.feed(std::string_view(piece).substr(0, output.pos));
    more_output = result != 0 && output.pos == output.size;  // the decoder may hold more
    sink.progress(static_cast<int64_t>(input.pos));
  }
  if (result != 0) {
    reader.problem("the zstd data ends early: the file is truncated; copy it again");
    return;
  }
  splitter.finish();
}

}  // namespace

void read_documents(const TextFile& file, const DocumentSink& sink) {
  switch (file.kind) {
    case TextFile::Kind::kText:
      return read_text(file, sink);
    case TextFile::Kind::kJsonl:
      return read_jsonl(file, sink);
    case TextFile::Kind::kJsonlZst:
      return read_jsonl_zst(file, sink);
  }
}

}  // namespace xlstm::data
