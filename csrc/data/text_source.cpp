#include "csrc/data/text_source.h"

#include <fnmatch.h>
#include <glob.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "csrc/core/error.h"

namespace xlstm::data {
namespace {

namespace fs = std::filesystem;

bool ends_with(const std::string& name, const std::string& suffix) {
  return name.size() >= suffix.size() &&
         name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

TextFile::Kind kind_of(const std::string& name) {
  if (ends_with(name, ".jsonl")) return TextFile::Kind::kJsonl;
  if (ends_with(name, ".jsonl.zst")) return TextFile::Kind::kJsonlZst;
  return TextFile::Kind::kText;
}

bool is_hidden(const fs::path& path) { return path.filename().string().rfind('.', 0) == 0; }

/// Collects files, each once.
class Collector {
 public:
  void add(const fs::path& path, const std::string& name, const std::string& input) {
    struct stat info {};
    if (::stat(path.c_str(), &info) != 0)
      throw Error(ExitCode::kData, path.string() + ": cannot read: " + std::strerror(errno) +
                                       "; check its permissions, or leave it out");
    if (!S_ISREG(info.st_mode)) return;
    ++matched;
    if (!seen_.emplace(info.st_dev, info.st_ino).second) return;
    files.push_back(
        {path.string(), name, input, kind_of(name), static_cast<int64_t>(info.st_size),
         static_cast<int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec});
  }

  void add_folder(const fs::path& folder, const std::string& glob, const std::string& input) {
    std::vector<fs::path> found;
    std::error_code error;
    fs::recursive_directory_iterator entry(folder, fs::directory_options::skip_permission_denied,
                                           error),
        end;
    for (; !error && entry != end; entry.increment(error)) {
      std::error_code ignored;
      if (is_hidden(entry->path())) {
        entry.disable_recursion_pending();
      } else if (entry->is_regular_file(ignored) &&
                 ::fnmatch(glob.c_str(), entry->path().filename().c_str(), 0) == 0) {
        found.push_back(entry->path());
      }
    }
    if (error)
      throw Error(ExitCode::kData,
                  folder.string() + ": cannot read the folder: " + error.message());
    std::vector<std::string> names;
    for (const auto& path : found) names.push_back(path.lexically_relative(folder).string());
    std::sort(names.begin(), names.end());
    for (const auto& name : names) add(folder / name, name, input);
  }

  std::vector<TextFile> files;
  int64_t matched = 0;  ///< with repetitions

 private:
  std::set<std::pair<uint64_t, uint64_t>> seen_;  ///< device and inode
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

void add_path(Collector& collector, const std::string& path, const std::string& glob,
              const std::string& input) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    collector.add_folder(path, glob, input);
  } else {
    collector.add(path, path, input);
  }
}

}  // namespace

std::vector<TextFile> find_texts(const std::vector<std::string>& inputs, const std::string& glob) {
  Collector collector;
  for (const auto& input : inputs) {
    const int64_t before = collector.matched;
    std::error_code error;
    if (fs::exists(input, error)) {
      add_path(collector, input, glob, input);
      if (collector.matched == before)
        throw Error(ExitCode::kData,
                    input + ": not a text file, nor a folder with files that match \"" + glob +
                        "\"; give another input or glob");
      continue;
    }
    const auto paths = expand_glob(input);
    if (paths.empty())
      throw Error(ExitCode::kData,
                  input +
                      ": no such file or folder, and no file matches it as a pattern; "
                      "check the path (patterns like 'texts/*.txt' work, in quotes)");
    for (const auto& path : paths) add_path(collector, path, glob, input);
  }
  return std::move(collector.files);
}

}  // namespace xlstm::data
