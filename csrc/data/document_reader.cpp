#include <regex.h>

#include <algorithm>
#include <cstdio>
#include <memory>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "csrc/core/utf8.h"
#include "csrc/data/byte_stream.h"
#include "csrc/data/file_format.h"
#include "csrc/data/jsonl.h"
#include "csrc/data/text_source.h"

namespace xlstm::data {
namespace {

/// A longer line is taken as damage (a compressed file may hold any amount of it).
constexpr size_t kMaxLineBytes = size_t{1} << 30;

/// The text of a file without the byte-order mark that some programs put before it.
std::string_view without_mark(std::string_view text) {
  constexpr std::string_view kMark = "\xef\xbb\xbf";
  return text.starts_with(kMark) ? text.substr(kMark.size()) : text;
}

int64_t count_lines(std::string_view text) { return std::count(text.begin(), text.end(), '\n'); }

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

/// A POSIX extended regular expression that lines are searched for.
class LinePattern {
 public:
  explicit LinePattern(const std::string& pattern) {
    const int result = ::regcomp(&regex_, pattern.c_str(), REG_EXTENDED);
    if (result == 0) return;
    char why[256];
    ::regerror(result, &regex_, why, sizeof why);
    throw Error(ExitCode::kConfig, "--split-at: \"" + pattern + "\" is not a regular expression (" +
                                       why + "); it is one as grep -E takes them");
  }
  ~LinePattern() { ::regfree(&regex_); }
  LinePattern(const LinePattern&) = delete;
  LinePattern& operator=(const LinePattern&) = delete;

  bool matches(std::string_view line) const {
    regmatch_t range{0, static_cast<regoff_t>(std::min(line.size(), kMaxLineBytes))};
    return ::regexec(&regex_, line.data(), 1, &range, REG_STARTEND) == 0;
  }

 private:
  regex_t regex_;
};

/// A document that counts as a whole.
void send(std::string_view text, const TextFile& file, int64_t line, const DocumentSink& sink) {
  const Segment whole{text};
  sink.document({{&whole, 1}, file.input, line});
}

/// Documents of a text that each begin with a line that matches; what stands before the first of them is one, too, unless
/// it is blank: then it goes with the first.
void split_text(std::string_view text, const std::string& split_at, const TextFile& file,
                const DocumentSink& sink) {
  const LinePattern pattern(split_at);
  int64_t line = 1;
  const auto end_document = [&](size_t size) {
    const std::string_view document = text.substr(0, size);
    send(document, file, line, sink);
    line += count_lines(document);
    text.remove_prefix(size);
  };
  for (size_t first = 0; first < text.size();) {
    const size_t end = std::min(text.find('\n', first), text.size());
    if (pattern.matches(text.substr(first, end - first)) && !is_blank(text.substr(0, first))) {
      end_document(first);
      first = 0;
    } else {
      first = end + 1;
    }
  }
  end_document(text.size());
}

/// Of what is no text by its first bytes nothing is skipped as a bad document would be: all that it holds would be missing.
void refuse_other_format(std::string_view head, const TextFile& file) {
  const std::string other = what_instead_of_text(head, file.is_standard_input ? "FILE" : file.path);
  if (other.empty()) return;
  const bool was_found = file.path != file.input;  // the user did not name it
  throw Error(
      ExitCode::kData,
      file.path + ": " + other +
          (was_found ? "; or leave it out: name the texts by a pattern ('FOLDER/*.txt'), or "
                       "give xlstm-data a --glob ('*.txt')"
                     : ""));
}

void read_text(std::string_view text, const TextFile& file, const TextOptions& options,
               const DocumentSink& sink) {
  refuse_other_format(text, file);
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.size()) {
    sink.bad(1 + count_lines(text.substr(0, invalid)),
             "invalid UTF-8 at byte " + std::to_string(invalid + 1) +
                 " of the file; convert it (iconv -f ENCODING -t UTF-8 FILE > NEW)");
  } else if (options.split_at.empty()) {
    send(without_mark(text), file, 1, sink);
  } else {
    split_text(without_mark(text), options.split_at, file, sink);
  }
}

/// Turns lines into documents and problems.
class LineReader {
 public:
  LineReader(const TextFile& file, const TextOptions& options, const DocumentSink& sink)
      : file_(file), sink_(sink), parser_(options.text_key, options.prompt_key) {}

  void line(std::string_view line) {
    if (++number_ == 1) line = without_mark(line);
    if (is_blank(line)) return;
    if (parser_.parse(line)) {
      const std::string_view source = parser_.set_name().empty() ? file_.input : parser_.set_name();
      sink_.document({parser_.segments(), source, number_});
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

/// piece: the first one of the stream.
void read_jsonl(ByteStream& stream, std::string_view piece, const TextFile& file,
                const TextOptions& options, const DocumentSink& sink) {
  LineReader reader(file, options, sink);
  LineSplitter splitter(reader);
  refuse_other_format(piece, file);
  for (; !piece.empty(); piece = stream.next()) {
    splitter.feed(piece);
    sink.progress(stream.position());
  }
  if (stream.problem().empty()) {
    splitter.finish();
  } else {
    reader.problem(stream.problem());
  }
}

bool begins_an_object(std::string_view text) {
  text = without_mark(text);
  const size_t first = text.find_first_not_of(" \t\r\n");
  return first != std::string_view::npos && text[first] == '{';
}

/// piece: the first one of the stream.
void read_streamed_text(ByteStream& stream, std::string_view piece, const TextFile& file,
                        const TextOptions& options, const DocumentSink& sink) {
  std::string text;
  for (; !piece.empty(); piece = stream.next()) {
    text += piece;
    sink.progress(stream.position());
  }
  if (stream.problem().empty()) {
    read_text(text, file, options, sink);
  } else {
    sink.bad(1, stream.problem());
  }
}

}  // namespace

void check_formats(std::span<const TextFile> files) {
  for (const TextFile& file : files)
    if (!file.is_standard_input && file.compression == TextFile::Compression::kNone)
      refuse_other_format(read_file(file.path, ExitCode::kData, kFormatBytes), file);
}

void read_documents(const TextFile& file, const TextOptions& options, const DocumentSink& sink) {
  using Kind = TextFile::Kind;
  const bool is_plain = !file.is_standard_input && file.compression == TextFile::Compression::kNone;
  if (file.kind == Kind::kText && is_plain) {  // not copied
    const MappedFile map(file.path);
    read_text({reinterpret_cast<const char*>(map.data()), map.size()}, file, options, sink);
    return sink.progress(file.size_bytes);
  }
  const auto stream = open_bytes(file);
  const std::string_view first = stream->next();
  if (file.kind == Kind::kJsonl || (file.kind == Kind::kByContent && begins_an_object(first))) {
    read_jsonl(*stream, first, file, options, sink);
  } else {
    read_streamed_text(*stream, first, file, options, sink);
  }
}

}  // namespace xlstm::data
