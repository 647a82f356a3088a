// Texts prepared on the fly into a cache: <cache>/<key>/{train,val}.{bin,idx,meta.json}. The key covers everything that
// decides their content: names, sizes and times of the texts, the tokenizer's files, the split.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/child_process.h"
#include "csrc/data/file_lock.h"
#include "csrc/data/prepare_job.h"
#include "csrc/data/token_file.h"

namespace xlstm::data {
namespace {

namespace fs = std::filesystem;

constexpr int kCacheVersion = 2;  ///< changes whenever the same text gives other tokens
constexpr const char* kStandardLibrary = "python-stdlib";

std::string default_cache_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache != '\0') return fs::path(cache) / "libxlstm";
  const char* home = std::getenv("HOME");
  if (home != nullptr && *home != '\0') return fs::path(home) / ".cache/libxlstm";
  throw Error(
      ExitCode::kData,
      "no place for prepared data: neither XDG_CACHE_HOME nor HOME is set; set data.cache_dir");
}

std::string standard_library_folder() {
  const std::string python = python_interpreter();
  ChildProcess child(
      {python, "-I", "-c", "import sysconfig; print(sysconfig.get_paths()['stdlib'])"});
  std::string folder = child.receive_all();
  const std::string end = child.wait_for_end();
  while (!folder.empty() && folder.back() == '\n') folder.pop_back();
  if (!child.ended_well() || folder.empty())
    throw Error(ExitCode::kData,
                "python-stdlib: " + python + " does not tell its standard library (" + end +
                    "); set XLSTM_PYTHON to a Python, or data.text to another text");
  return folder;
}

/// The library's own sources: no installed packages.
std::vector<TextFile> standard_library_files() {
  const std::string folder = standard_library_folder();
  std::vector<TextFile> files = find_texts({folder}, "*.py");
  const auto is_installed = [](const TextFile& file) {
    return file.name.rfind("site-packages/", 0) == 0 || file.name.rfind("dist-packages/", 0) == 0;
  };
  files.erase(std::remove_if(files.begin(), files.end(), is_installed), files.end());
  return files;
}

std::vector<TextFile> find_named_texts(const std::string& text) {
  return text == kStandardLibrary ? standard_library_files() : find_texts({text}, "*");
}

nlohmann::json describe(const std::vector<TextFile>& files) {
  auto list = nlohmann::json::array();
  for (const auto& file : files)
    list.push_back(
        {sha256_hex(file.path), sha256_hex(file.name), file.size_bytes, file.modified_ns});
  return list;
}

/// The jobs that fill the cache: which files, or which part of each, go where.
struct Split {
  PrepareJob train;
  std::optional<PrepareJob> val;
};

/// Whole files by a hash of their names; at least one on either side.
void split_by_file(const std::string& text, double val_fraction, Split& split) {
  std::vector<TextFile> files = std::move(split.train.files);
  if (files.size() < 2)
    throw Error(
        ExitCode::kData,
        text + ": one file cannot be split by file; set data.val_split=tail or data.val_text");
  const auto fraction = [](const TextFile& file) { return hash_fraction(file.name); };
  const auto [lowest, highest] =
      std::minmax_element(files.begin(), files.end(),
                          [&](const auto& a, const auto& b) { return fraction(a) < fraction(b); });
  split.train.files.clear();
  split.val->files.clear();
  for (auto file = files.begin(); file != files.end(); ++file) {
    const bool held_out = (fraction(*file) < val_fraction || file == lowest) && file != highest;
    (held_out ? split.val->files : split.train.files).push_back(*file);
  }
}

void check_apart(const Split& split) {
  std::set<FileId> train;
  for (const auto& file : split.train.files) train.insert(file.id);
  for (const auto& file : split.val->files)
    if (train.count(file.id) != 0)
      throw Error(ExitCode::kConfig, "data.val_text: " + file.path + " is a part of data.text (" +
                                         split.train.what +
                                         "), too: the model would be judged by what it was "
                                         "trained on; keep the two in folders of their own");
}

Split make_split(const std::string& text, const std::string& val_text, double val_fraction,
                 const std::string& val_split, const std::string& tokenizer) {
  Split split;
  split.train.files = find_named_texts(text);
  split.train.what = text;
  split.train.label = "prepare " + text;
  split.train.tokenizer = tokenizer;
  split.train.command = "data.text=" + text;
  split.train.max_warnings = text == kStandardLibrary ? 0 : 3;  // it tests odd encodings
  split.train.val_fraction = val_fraction;
  if (val_text.empty() && val_fraction <= 0) return split;
  split.val = split.train;
  split.val->label += " (held out)";
  if (!val_text.empty()) {
    split.val->files = find_named_texts(val_text);
    split.val->what = val_text;
    split.val->command = "data.val_text=" + val_text;
    check_apart(split);
  } else if (val_split == "file") {
    split_by_file(text, val_fraction, split);
  } else {
    split.train.part = Part::kTrain;
    split.val->part = Part::kHeldOut;
    split.val->what = "the held-out " + std::to_string(val_fraction) + " of " + text;
  }
  return split;
}

std::string cache_key(const Split& split) {
  nlohmann::json key = {kCacheVersion, tokenizer_sha256(split.train.tokenizer),
                        split.train.val_fraction, static_cast<int>(split.train.part),
                        describe(split.train.files)};
  if (split.val) key.push_back(describe(split.val->files));
  return sha256_hex(key.dump()).substr(0, 24);
}

bool is_ready(const std::string& prefix) {
  if (prefix.empty()) return true;
  std::error_code error;
  if (!fs::exists(prefix + ".meta.json", error)) return false;
  try {
    return TokenFile(prefix).num_tokens() > 0;
  } catch (const Error&) {
    return false;  // damaged: it is prepared again
  }
}

}  // namespace

CachedText prepare_cached(const std::string& text, const std::string& val_text, double val_fraction,
                          const std::string& val_split, const std::string& tokenizer,
                          const std::string& cache_dir, const std::function<void()>& poll) {
  if (val_text.empty() && !(val_fraction >= 0 && val_fraction < 1))
    throw Error(ExitCode::kConfig,
                "data.val_fraction is " + std::to_string(val_fraction) + ", expected 0 to below 1");
  if (val_split != "tail" && val_split != "file")
    throw Error(ExitCode::kConfig,
                "data.val_split is \"" + val_split + "\", expected tail or file");
  Split split = make_split(text, val_text, val_fraction, val_split, tokenizer);
  const fs::path cache = cache_dir.empty() ? default_cache_folder() : cache_dir;
  const fs::path folder = cache / cache_key(split);
  const CachedText result{folder / "train", split.val ? (folder / "val").string() : ""};
  const auto ready = [&] { return is_ready(result.train_prefix) && is_ready(result.val_prefix); };
  if (ready()) return result;
  std::error_code error;
  fs::create_directories(folder, error);
  if (error)
    throw Error(ExitCode::kData, folder.string() + ": cannot create: " + error.message() +
                                     "; set data.cache_dir to a folder that can be written");
  const FileLock lock(folder / "lock", text, poll);
  if (ready()) return result;  // another process was faster
  const auto encoder = make_tokenizer(tokenizer);
  split.train.output_prefix = result.train_prefix;
  split.train.poll = poll;
  run_prepare(split.train, *encoder);
  if (split.val) {
    split.val->output_prefix = result.val_prefix;
    split.val->poll = poll;
    run_prepare(*split.val, *encoder);
  }
  return result;
}

}  // namespace xlstm::data
