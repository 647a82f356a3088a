#include "train/eval_data.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/data/dataset.h"
#include "csrc/data/prepare.h"
#include "csrc/data/task_source.h"
#include "csrc/data/tokenizer.h"
#include "train/run_folder.h"
#include "train/training_data.h"

namespace xlstm::train {

namespace fs = std::filesystem;

/// A folder of its own below the system's temporary one, removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (fs::temp_directory_path() / "xlstm-eval-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr)
      throw Error(ExitCode::kData, name + ": cannot create a temporary folder");
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

namespace {

using TokenFiles = std::vector<std::shared_ptr<const data::TokenFile>>;

/// For as long as it lives, relative paths are those of a run's settings. The names of its texts stay what they were: by
/// them they are found in the cache.
class InStartFolder {
 public:
  explicit InStartFolder(const LoadedModel& loaded)
      : folder_(recorded_start_folder(loaded.folder)) {
    if (!folder_.empty()) fs::current_path(folder_);
  }
  ~InStartFolder() {
    std::error_code ignored;
    fs::current_path(before_, ignored);
  }
  InStartFolder(const InStartFolder&) = delete;
  InStartFolder& operator=(const InStartFolder&) = delete;
  /// Where these paths begin, for messages.
  std::string told() const {
    return folder_.empty() ? "relative paths begin in " + before_.string() +
                                 ", as the folder where the run was started is not there any more"
                           : "relative paths begin in " + folder_ + ", where the run was started";
  }

 private:
  const std::string folder_;
  const fs::path before_ = fs::current_path();
};

/// What `work` returns for the paths of a run's settings; its errors say where they begin.
template <class Work>
auto in_start_folder(const LoadedModel& loaded, const Work& work) {
  const InStartFolder relative_paths(loaded);
  try {
    return work();
  } catch (const Error& error) {
    throw Error(error.code, std::string(error.what()) + " (" + relative_paths.told() + ")");
  }
}

std::optional<TrainerState> recorded_state(const LoadedModel& loaded) {
  return checkpoint_state(open_checkpoint(loaded.folder, /*verify=*/false));
}

std::shared_ptr<const data::TokenFile> open_file(const LoadedModel& loaded,
                                                 const std::string& prefix) {
  auto file = std::make_shared<const data::TokenFile>(prefix);
  const auto& sidecar = file->sidecar();
  if (sidecar && known_tokenizer(loaded.config, loaded.tokenizer) &&
      !data::is_made_with(*sidecar, loaded.tokenizer))
    throw Error(ExitCode::kData,
                prefix + ": prepared with another tokenizer (" + sidecar->tokenizer +
                    ") than the model's; prepare it again with xlstm-data prepare --tokenizer " +
                    loaded.tokenizer);
  file->check_vocab(loaded.config.model.vocab_size);
  return file;
}

/// The prefixes of a folder's prepared token files, by name.
std::vector<std::string> prefixes_in(const std::string& folder) {
  std::vector<std::string> prefixes;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".idx")
      prefixes.push_back(fs::path(entry.path()).replace_extension().string());
  if (prefixes.empty())
    throw Error(ExitCode::kData, folder +
                                     ": holds no prepared token file (.bin and .idx); write them "
                                     "with xlstm-data prepare --output " +
                                     (fs::path(folder) / "NAME").string());
  std::sort(prefixes.begin(), prefixes.end());
  return prefixes;
}

EvalData task_data(const CommandLine& line, const LoadedModel& loaded, int64_t seq_len) {
  const config::Config& config = loaded.config;
  data::TaskOptions task = config.data.task;
  if (line.has("--fill-last"))
    throw Error(ExitCode::kConfig, "--fill-last is for texts, not for a data.task");
  if (line.has("--min-len") && data::reads_files(task))
    throw Error(ExitCode::kConfig,
                "--min-len is for a data.task whose samples are drawn; those of " + task.name +
                    " are read from files");
  task.eval_len = seq_len;
  task.eval_min_len = line.get_int("--min-len", task.eval_min_len, 0);
  task.held_out = line.get("--held-out", task.held_out);
  if (task.held_out != "test" && task.held_out != "validation")
    throw Error(ExitCode::kConfig,
                "--held-out is " + task.held_out + ", expected test or validation");
  if (!task.path.empty())
    task.path = (fs::path(recorded_start_folder(loaded.folder)) / task.path).string();
  EvalData data;
  data.sources.push_back({"", data::make_task_data(task, config.data.seq_len,
                                                   static_cast<uint64_t>(config.data.shuffle_seed),
                                                   config.data.shuffle, config.model.vocab_size,
                                                   config.model.input_features)
                                  .held_out});
  data.name = data.sources[0].set->name();
  return data;
}

void add_set(const LoadedModel& loaded, const std::string& prefix,
             const data::DatasetOptions& options, EvalData& data) {
  data.sources.push_back({fs::path(prefix).filename().string(),
                          std::make_unique<data::EvalSet>(open_file(loaded, prefix), options)});
}

EvalData text_data(const LoadedModel& loaded, const std::string& text,
                   const data::DatasetOptions& options) {
  const auto folder = std::make_shared<const TemporaryFolder>();
  EvalData data;
  data.name = text;
  data.folder = folder;
  data::PrepareOptions prepare;
  prepare.inputs = {text};
  prepare.texts.text_key = loaded.config.data.text_key;
  prepare.texts.prompt_key = loaded.config.data.prompt_key;
  prepare.texts.plain_texts_too = true;  // they have no prompts
  prepare.output_prefix = (folder->path() / "text").string();
  prepare.tokenizer = loaded.tokenizer;
  data::prepare(prepare);
  add_set(loaded, prepare.output_prefix, options, data);
  return data;
}

EvalData prepared_data(const LoadedModel& loaded, const std::string& name,
                       const data::DatasetOptions& options) {
  EvalData data;
  data.name = name;
  // A folder of the prefix's own name may stand beside it: what is named is the prefix.
  data.by_source = fs::is_directory(name) && !fs::exists(name + ".idx");
  for (const auto& prefix : data.by_source ? prefixes_in(name) : std::vector{name})
    add_set(loaded, prefix, options, data);
  return data;
}

/// The held-out set that the run was judged by when the model was saved.
EvalData own_data(const LoadedModel& loaded, const data::DatasetOptions& options) {
  const config::DataConfig& settings = loaded.config.data;
  const auto state = recorded_state(loaded);
  return in_start_folder(loaded, [&] {
    const std::string prefix = !settings.val.empty() ? settings.val
                               : !settings.text.empty()
                                   ? prepare_text(loaded.config.data, loaded.tokenizer).val_prefix
                                   : "";
    if (prefix.empty())
      throw Error(ExitCode::kData, loaded.folder +
                                       ": its run has no held-out set (data.val); give --data or "
                                       "--text");
    EvalData data;
    data.name = !settings.val.empty()        ? "data.val=" + settings.val
                : !settings.val_text.empty() ? "data.val_text=" + settings.val_text
                                             : "data.text=" + settings.text;
    add_set(loaded, prefix, options, data);
    if (state && !state->held_out_fingerprint.empty() &&
        state->held_out_fingerprint != data.sources[0].set->fingerprint())
      throw Error(ExitCode::kData,
                  loaded.folder + ": its run was judged by another held-out set than " + data.name +
                      " leads to now: the text has changed, or is in another folder; put it back, "
                      "or say with --text or --data what to judge by");
    return data;
  });
}

/// What the run was trained on, when the model was saved.
TokenFiles own_training_files(const LoadedModel& loaded) {
  const config::DataConfig& settings = loaded.config.data;
  const auto state = recorded_state(loaded);
  return in_start_folder(loaded, [&] {
    std::vector<config::DataSource> sources = settings.train;
    if (!settings.text.empty())
      sources = {{prepare_text(loaded.config.data, loaded.tokenizer).train_prefix, 1.0}};
    if (sources.empty())
      throw Error(ExitCode::kData, loaded.folder +
                                       ": its run has no training text to count tokens in; give "
                                       "--counts");
    TokenFiles files;
    std::vector<data::WeightedFile> mixture;
    for (const config::DataSource& source : sources) {
      files.push_back(open_file(loaded, source.path));
      mixture.push_back({files.back(), source.weight});
    }
    data::Dataset dataset(std::move(mixture), dataset_options(loaded.config));
    if (state && !dataset.take_order_of(state->data_fingerprint))
      throw Error(
          ExitCode::kData,
          loaded.folder + ": its run was trained on another text than " +
              (settings.text.empty() ? "data.train" : "data.text=" + settings.text) +
              " leads to now: the text has changed, or is in another folder; put it back, or say "
              "with --counts where to count tokens");
    return files;
  });
}

}  // namespace

EvalData choose_data(const CommandLine& line, const LoadedModel& loaded, int64_t seq_len) {
  const bool given = line.has("--text") || line.has("--data");
  if (line.has("--data") && line.has("--text"))
    throw Error(ExitCode::kConfig, "--data and --text exclude each other; give one");
  if (data::is_given(loaded.config.data.task) && !given) return task_data(line, loaded, seq_len);
  for (const char* option : {"--min-len", "--held-out"})
    if (line.has(option))
      throw Error(ExitCode::kConfig,
                  std::string(option) + " is for models that were trained on a data.task");
  data::DatasetOptions options = dataset_options(loaded.config);
  options.seq_len = seq_len;
  options.fill_last_window = line.has("--fill-last");
  if (line.has("--text")) return text_data(loaded, line.get("--text", ""), options);
  if (line.has("--data")) return prepared_data(loaded, line.get("--data", ""), options);
  return own_data(loaded, options);
}

TokenFiles files_to_count_in(const CommandLine& line, const LoadedModel& loaded) {
  if (line.has("--counts")) return {open_file(loaded, line.get("--counts", ""))};
  return own_training_files(loaded);
}

}  // namespace xlstm::train
