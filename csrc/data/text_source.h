#pragma once
// Finds text files and reads their documents one after the other.
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace xlstm::data {

using FileId = std::pair<uint64_t, uint64_t>;  ///< device and inode: the same by whatever name

struct TextFile {
  enum class Kind { kText, kJsonl, kJsonlZst };
  std::string path;
  std::string
      name;  ///< below the folder it was found through, else the path: the same on every machine
  std::string input;  ///< the file, folder or glob that led to it
  Kind kind = Kind::kText;
  int64_t size_bytes = 0;
  int64_t modified_ns = 0;
  FileId id;
};

/// Files of the inputs in a fixed order: inputs as given, below a folder sorted by name. Hidden files and folders are
/// passed over, and a file that several inputs lead to counts once. Folders, linked ones included, are searched for names
/// that match `glob` (*, ?, [set]); an input that does not exist is taken as a glob itself. Throws Error(kData) for an
/// input that leads to nothing, and for what cannot be read.
std::vector<TextFile> find_texts(const std::vector<std::string>& inputs, const std::string& glob);

struct Document {
  std::string_view text;    ///< valid during the call
  std::string_view source;  ///< meta.redpajama_set_name, else TextFile::input
  int64_t line = 1;         ///< of a JSONL file
};

/// What a reader of documents is told. Positions are bytes of the file as stored, for progress.
struct DocumentSink {
  std::function<void(const Document&)> document;
  std::function<void(int64_t line, const std::string& what)>
      bad;  ///< a document that cannot be used
  std::function<void(int64_t position)> progress;
};

/// Reads a file: a text is one document; each line of .jsonl (or .jsonl.zst, streamed) is one, blank lines aside.
/// Texts are well-formed UTF-8, without a byte-order mark at a file's beginning. Throws Error(kData) when the file cannot
/// be opened.
void read_documents(const TextFile& file, const DocumentSink& sink);

}  // namespace xlstm::data
