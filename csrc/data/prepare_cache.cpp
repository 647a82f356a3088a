// Texts prepared on the fly into a cache: <cache>/<key>/{train,val}.{bin,idx,meta.json}. The key covers everything that
// decides their content: names, sizes and times of the texts, how they are read, the tokenizer's files, the split.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "csrc/data/file_lock.h"
#include "csrc/data/prepare_job.h"
#include "csrc/data/token_file.h"

namespace xlstm::data {
namespace {

namespace fs = std::filesystem;

constexpr int kCacheVersion = 4;  ///< changes whenever the same text gives other tokens

std::string default_cache_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache != '\0') return fs::path(cache) / "libxlstm";
  const char* home = std::getenv("HOME");
  if (home != nullptr && *home != '\0') return fs::path(home) / ".cache/libxlstm";
  throw Error(
      ExitCode::kData,
      "no place for prepared data: neither XDG_CACHE_HOME nor HOME is set; set data.cache_dir");
}

std::vector<TextFile> find_named_texts(const std::string& text, const TextOptions& options) {
  if (text == kStandardInput)
    throw Error(
        ExitCode::kConfig,
        "data.text: standard input (-) can be read only once, but every run reads its text; "
        "give a file, or prepare it (xlstm-data prepare - --output PREFIX) for data.train");
  return find_texts({text}, options);
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

Split make_split(const CacheOptions& options) {
  const std::string& text = options.text;
  Split split;
  split.train.texts.text_key = options.text_key;
  split.train.texts.prompt_key = options.prompt_key;
  split.train.files = find_named_texts(text, split.train.texts);
  split.train.what = text;
  split.train.label = "prepare " + text;
  split.train.tokenizer = options.tokenizer;
  split.train.command = "data.text=" + text;
  split.train.max_warnings = text == kStandardLibrary ? 0 : 3;  // it tests odd encodings
  split.train.val_fraction = options.val_fraction;
  if (options.val_text.empty() && options.val_fraction <= 0) return split;
  split.val = split.train;
  split.val->label += " (held out)";
  if (!options.val_text.empty()) {
    split.val->files = find_named_texts(options.val_text, split.train.texts);
    split.val->what = options.val_text;
    split.val->command = "data.val_text=" + options.val_text;
    check_apart(split);
  } else if (options.val_split == "file") {
    split_by_file(text, options.val_fraction, split);
  } else {
    split.train.part = Part::kTrain;
    split.val->part = Part::kHeldOut;
    split.val->what = "the held-out " + std::to_string(options.val_fraction) + " of " + text;
  }
  return split;
}

std::string cache_key(const Split& split) {
  nlohmann::json key = {kCacheVersion,
                        tokenizer_sha256(split.train.tokenizer),
                        split.train.texts.text_key,
                        split.train.val_fraction,
                        static_cast<int>(split.train.part),
                        traits_of(split.train.files)};
  if (split.val) key.push_back(traits_of(split.val->files));
  if (!split.train.texts.prompt_key.empty()) key.push_back(split.train.texts.prompt_key);
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

CachedText prepare_cached(const CacheOptions& options, const std::function<void()>& poll) {
  if (options.val_text.empty() && !(options.val_fraction >= 0 && options.val_fraction < 1))
    throw Error(ExitCode::kConfig, "data.val_fraction is " + std::to_string(options.val_fraction) +
                                       ", expected 0 to below 1");
  if (options.val_split != "tail" && options.val_split != "file")
    throw Error(ExitCode::kConfig,
                "data.val_split is \"" + options.val_split + "\", expected tail or file");
  Split split = make_split(options);
  const fs::path cache = options.cache_dir.empty() ? default_cache_folder() : options.cache_dir;
  const fs::path folder = cache / cache_key(split);
  const CachedText result{folder / "train", split.val ? (folder / "val").string() : ""};
  const auto ready = [&] { return is_ready(result.train_prefix) && is_ready(result.val_prefix); };
  if (ready()) return result;
  std::error_code error;
  fs::create_directories(folder, error);
  if (error)
    throw Error(ExitCode::kData, folder.string() + ": cannot create: " + error.message() +
                                     "; set data.cache_dir to a folder that can be written");
  const FileLock lock(folder / "lock", options.text, poll);
  if (ready()) return result;  // another process was faster
  const auto encoder = make_tokenizer(options.tokenizer);
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
