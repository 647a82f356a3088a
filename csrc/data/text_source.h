#pragma once
// Finds text files and reads their documents one after the other.
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace xlstm::data {

using FileId = std::pair<uint64_t, uint64_t>;  ///< device and inode: the same by whatever name

/// Which texts are read, and how.
struct TextOptions {
  std::string glob = "*";  ///< which files of a folder (matched on the name, e.g. "*.py")
  /// "text": each file is a text | "jsonl": each line a document | "auto": .jsonl and .ndjson are JSONL, and standard
  /// input where it begins with a brace
  std::string format = "auto";
  std::string text_key = "text";  ///< of a line of JSONL: its text stands there
  /// Of a line of JSONL: what stands there comes before the text and does not count; "": nothing does
  std::string prompt_key = "";
  /// Beside a prompt_key: plain texts are read, too, and all of them counts; else they are an error
  bool plain_texts_too = false;
  /// POSIX extended regular expression: a new document begins at each line of a text that it matches; "": a text is one
  std::string split_at = "";
};

struct TextFile {
  enum class Kind { kText, kJsonl, kByContent };
  enum class Compression { kNone, kZstd, kGzip };
  std::string path;
  /// From the folder on that was named, or from where a pattern begins to vary, else without folders: the same wherever the
  /// texts lie
  std::string name;
  std::string input;  ///< the file, folder or glob that led to it
  Kind kind = Kind::kText;
  Compression compression = Compression::kNone;
  bool is_standard_input = false;
  int64_t size_bytes = 0;
  int64_t modified_ns = 0;
  FileId id;
};

/// An input that stands for the sources of Python's standard library.
constexpr const char* kStandardLibrary = "python-stdlib";
/// An input that stands for standard input.
constexpr const char* kStandardInput = "-";

/// Files of the inputs in a fixed order: inputs as given, below a folder sorted by name. Hidden files and folders are
/// passed over, and a file that several inputs lead to counts once. Folders, linked ones included, are searched for names
/// that match `glob` (*, ?, [set]); an input that does not exist is taken as a glob itself. Throws Error(kData) for an
/// input that leads to nothing, and for what cannot be read; Error(kConfig) for an unknown format, and where there is a
/// prompt_key for a plain text, or one that is the text_key.
std::vector<TextFile> find_texts(const std::vector<std::string>& inputs,
                                 const TextOptions& options);

/// A part of a document, tokenized by itself.
struct Segment {
  std::string_view text;
  bool loss = true;  ///< whether its tokens count; else they are read alone
};

/// UTF-8 bytes of them all.
size_t text_bytes(std::span<const Segment> segments);

struct Document {
  std::span<const Segment> segments;  ///< a plain text is one; valid during the call
  std::string_view source;            ///< meta.redpajama_set_name, else TextFile::input
  int64_t line = 1;                   ///< where it begins
};

/// What a reader of documents is told. Positions are bytes of the file as stored, for progress.
struct DocumentSink {
  std::function<void(const Document&)> document;
  std::function<void(int64_t line, const std::string& what)>
      bad;  ///< a document that cannot be used
  std::function<void(int64_t position)> progress;
};

/// Looks into files that are to be read. Throws Error(kData) for one whose first bytes tell that it is no text (a Parquet file,
/// an archive, ...), with what makes text of it; what is compressed and standard input are seen when they are read.
void check_formats(std::span<const TextFile> files);

/// Reads a file: a text is one document, or several (TextOptions::split_at); each line of JSONL is one, blank lines
/// aside. What is compressed is streamed, but a text is held whole. Texts are well-formed UTF-8, without a byte-order mark
/// at a file's beginning. Throws Error(kData) when the file cannot be opened or is no text as check_formats knows it,
/// Error(kConfig) for a bad split_at.
void read_documents(const TextFile& file, const TextOptions& options, const DocumentSink& sink);

}  // namespace xlstm::data
