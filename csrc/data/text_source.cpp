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
  void add(const fs::path& path, const std::string& name, const std::string& input) {
    const struct stat info = info_of(path);
    if (!S_ISREG(info.st_mode)) return;
    ++matched;
    const FileId id{info.st_dev, info.st_ino};
    if (!seen_.insert(id).second) return;
    files.push_back(
        {path.string(), name, input, kind_of(name), static_cast<int64_t>(info.st_size),
         static_cast<int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec, id});
  }

  void add_folder(const fs::path& folder, const std::string& glob, const std::string& input) {
    std::set<FileId> searched;
    std::vector<std::string> names;
    search(folder, "", glob, searched, names);
    std::sort(names.begin(), names.end());
    for (const auto& name : names) add(folder / name, name, input);
  }

  std::vector<TextFile> files;
  int64_t matched = 0;  ///< with repetitions

 private:
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
