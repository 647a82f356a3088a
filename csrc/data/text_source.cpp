#include "csrc/data/text_source.h"

#include <fnmatch.h>
#include <glob.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <set>

#include "csrc/core/error.h"
#include "csrc/data/child_process.h"

namespace xlstm::data {
namespace {

namespace fs = std::filesystem;

/// Kind and compression by the name: a.jsonl.gz.
void classify(const TextOptions& options, TextFile& file) {
  std::string_view name = file.name;
  for (const auto& [ending, compression] : {std::pair(".gz", TextFile::Compression::kGzip),
                                            std::pair(".zst", TextFile::Compression::kZstd)}) {
    if (!name.ends_with(ending)) continue;
    file.compression = compression;
    name.remove_suffix(std::string_view(ending).size());
    break;
  }
  const bool lines = options.format == "auto"
                         ? name.ends_with(".jsonl") || name.ends_with(".ndjson")
                         : options.format == "jsonl";
  file.kind = lines ? TextFile::Kind::kJsonl : TextFile::Kind::kText;
}

TextFile standard_input(const TextOptions& options) {
  TextFile file;
  file.path = file.name = file.input = "standard input";
  file.is_standard_input = true;
  const bool by_content =
      options.format == "auto" && (options.prompt_key.empty() || options.plain_texts_too);
  file.kind = by_content                 ? TextFile::Kind::kByContent
              : options.format == "text" ? TextFile::Kind::kText
                                         : TextFile::Kind::kJsonl;
  return file;
}

bool is_hidden(const fs::path& path) { return path.filename().string().rfind('.', 0) == 0; }

[[noreturn]] void refuse(const fs::path& path, const std::string& why) {
  throw Error(ExitCode::kData,
              path.string() + ": cannot read: " + why + "; check its permissions, or leave it out");
}

struct stat info_of(const fs::path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) refuse(path, std::strerror(errno));
  return info;
}

/// Names of the files below a folder that match, from its root on. Links are followed; `seen` are the folders searched.
void search(const fs::path& root, const fs::path& below, const std::string& glob,
            std::set<FileId>& seen, std::vector<std::string>& names) {
  const fs::path folder = root / below;
  const struct stat info = info_of(folder);
  if (!seen.emplace(info.st_dev, info.st_ino).second) return;
  std::error_code error;
  std::vector<fs::path> entries;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error))
    if (!is_hidden(entry->path())) entries.push_back(entry->path().filename());
  if (error) refuse(folder, error.message());
  std::sort(entries.begin(), entries.end());  // a folder with several names always gets the same
  for (const fs::path& name : entries) {
    std::error_code ignored;
    if (fs::is_directory(folder / name, ignored)) {
      search(root, below / name, glob, seen, names);
    } else if (fs::is_regular_file(folder / name, ignored) &&
               ::fnmatch(glob.c_str(), name.c_str(), 0) == 0) {
      names.push_back(below / name);
    }
  }
}

/// Collects files, each once.
class Collector {
 public:
  explicit Collector(const TextOptions& options) : options_(options) {}

  void add(const fs::path& path, const std::string& name, const std::string& input) {
    const struct stat info = info_of(path);
    if (!S_ISREG(info.st_mode)) return;
    TextFile file;
    file.path = path.string();
    file.name = name;
    file.input = input;
    file.size_bytes = static_cast<int64_t>(info.st_size);
    file.modified_ns =
        static_cast<int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec;
    file.id = {info.st_dev, info.st_ino};
    classify(options_, file);
    add(std::move(file));
  }

  void add(TextFile file) {
    if (file.kind == TextFile::Kind::kText && !options_.prompt_key.empty() &&
        !options_.plain_texts_too)
      throw Error(ExitCode::kConfig,
                  file.path + ": is a plain text, but the prompt key \"" + options_.prompt_key +
                      "\" is for JSONL; leave the key out (data.prompt_key, --prompt-key of "
                      "xlstm-data), or give JSONL alone");
    ++matched;
    if (seen_.insert(file.id).second) files.push_back(std::move(file));
  }

  /// name: what stands before the names of its files.
  void add_folder(const fs::path& folder, const fs::path& name, const std::string& input) {
    std::set<FileId> searched;
    std::vector<std::string> names;
    search(folder, "", options_.glob, searched, names);
    std::sort(names.begin(), names.end());
    for (const auto& below : names) add(folder / below, name / below, input);
  }

  std::vector<TextFile> files;
  int64_t matched = 0;  ///< with repetitions

 private:
  const TextOptions& options_;
  std::set<FileId> seen_;
};

std::vector<std::string> expand_glob(const std::string& pattern) {
  glob_t result{};
  std::vector<std::string> paths;
  if (::glob(pattern.c_str(), 0, nullptr, &result) == 0)
    paths.assign(result.gl_pathv, result.gl_pathv + result.gl_pathc);
  ::globfree(&result);
  std::sort(paths.begin(), paths.end());  // not in the order of the locale
  return paths;
}

/// The folders at a pattern's beginning in which nothing varies.
fs::path fixed_folder(const std::string& pattern) {
  fs::path folder;
  for (const fs::path& part : fs::path(pattern).parent_path()) {
    if (part.string().find_first_of("*?[\\") != std::string::npos) break;
    folder /= part;
  }
  return folder;
}

/// A file or folder that the user named, or one that matches a pattern.
void add_input(Collector& collector, const std::string& input) {
  std::error_code error;
  if (fs::is_directory(input, error)) return collector.add_folder(input, "", input);
  if (fs::exists(input, error))
    return collector.add(input, fs::path(input).filename().string(), input);
  const auto paths = expand_glob(input);
  if (paths.empty())
    throw Error(ExitCode::kData,
                input +
                    ": no such file or folder, and no file matches it as a pattern; "
                    "check the path (patterns like 'texts/*.txt' work, in quotes)");
  for (const fs::path path : paths) {
    const fs::path name = path.lexically_relative(fixed_folder(input));
    if (fs::is_directory(path, error)) {
      collector.add_folder(path, name, input);
    } else {
      collector.add(path, name.string(), input);
    }
  }
}

/// Why an input that is there leads to no file.
std::string why_no_text(const std::string& input, const TextOptions& options) {
  std::error_code error;
  if (fs::is_fifo(input, error))
    return "a pipe, which is read as standard input alone; give - and pipe it (COMMAND | "
           "xlstm-data prepare - --output PREFIX)";
  return "not a text file, nor a folder with files that match \"" + options.glob +
         "\"; give another input or glob";
}

/// What is named .json is a text by its name, but most such files hold documents.
void warn_of_json(const std::string& input, const TextOptions& options) {
  std::string_view name = input;
  for (const std::string_view ending : {".gz", ".zst"})
    if (name.ends_with(ending)) name.remove_suffix(ending.size());
  if (options.format != "auto" || !name.ends_with(".json")) return;
  std::fprintf(
      stderr,
      "warning: %s: read as text, JSON as it stands; if each line is a JSON object with a "
      "text, let its name end in .jsonl (or give xlstm-data --format jsonl); of an array "
      "make such lines: python -c \"import json, sys; [print(json.dumps(line)) for line in "
      "json.load(open(sys.argv[1]))]\" FILE > FILE.jsonl\n",
      input.c_str());
}

std::string standard_library_folder() {
  const std::string python = python_interpreter();
  ChildProcess child(
      {python, "-I", "-c", "import sysconfig; print(sysconfig.get_paths()['stdlib'])"});
  std::string folder = child.receive_all();
  const std::string end = child.wait_for_end();
  while (!folder.empty() && folder.back() == '\n') folder.pop_back();
  if (!child.ended_well() || folder.empty())
    throw Error(ExitCode::kData, "python-stdlib: " + python +
                                     " does not tell its standard library (" + end +
                                     "); set XLSTM_PYTHON to a Python, or give another text");
  return folder;
}

/// The library's own sources: no installed packages.
void add_standard_library(Collector& collector) {
  const auto is_installed = [](const TextFile& file) {
    return file.name.starts_with("site-packages/") || file.name.starts_with("dist-packages/");
  };
  for (TextFile& file : find_texts({standard_library_folder()}, {.glob = "*.py"}))
    if (!is_installed(file)) collector.add(std::move(file));
}

}  // namespace

size_t text_bytes(std::span<const Segment> segments) {
  size_t bytes = 0;
  for (const Segment& segment : segments) bytes += segment.text.size();
  return bytes;
}

std::vector<TextFile> find_texts(const std::vector<std::string>& inputs,
                                 const TextOptions& options) {
  if (options.format != "auto" && options.format != "text" && options.format != "jsonl")
    throw Error(ExitCode::kConfig,
                "the format of texts is \"" + options.format + "\", expected auto, text or jsonl");
  if (!options.prompt_key.empty() && options.prompt_key == options.text_key)
    throw Error(ExitCode::kConfig, "prompt and text have the same key, \"" + options.text_key +
                                       "\"; give them one each (data.prompt_key and data.text_key, "
                                       "--prompt-key and --text-key of xlstm-data)");
  Collector collector(options);
  for (const auto& input : inputs) {
    if (input == kStandardLibrary) {
      add_standard_library(collector);
      continue;
    }
    if (input == kStandardInput) {
      collector.add(standard_input(options));
      continue;
    }
    const int64_t before = collector.matched;
    add_input(collector, input);
    if (collector.matched == before)
      throw Error(ExitCode::kData, input + ": " + why_no_text(input, options));
    warn_of_json(input, options);
  }
  return std::move(collector.files);
}

}  // namespace xlstm::data
