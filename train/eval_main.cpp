// xlstm-eval: loss, perplexity and bits per byte of a saved model at any context length, or its accuracy in its task.
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/error.h"
#include "csrc/data/dataset.h"
#include "csrc/data/prepare.h"
#include "csrc/data/task_source.h"
#include "csrc/data/tokenizer.h"
#include "train/checkpoint.h"
#include "train/command_line.h"
#include "train/device.h"
#include "train/eval_report.h"
#include "train/evaluation.h"
#include "train/run_folder.h"
#include "train/schedule.h"
#include "train/token_frequency.h"
#include "train/training_data.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

const std::vector<OptionSpec> kOptions{
    {"--data", "PREFIX|FOLDER",
     "prepared token file, or a folder of such, one for each source, which are judged apart and "
     "together (default: the run's own held-out set, if it is still what it was)"},
    {"--text", "FILE", "text file, folder, glob, or - (standard input), tokenised on the spot"},
    {"--seq-len", "N", "context length; may exceed the trained one (data.seq_len)"},
    {"--min-len", "N", "of a data.task: tokens of its shortest sample (data.task.eval_min_len)"},
    {"--held-out", "NAME", "of a data.task: test or validation (data.task.held_out)"},
    {"--batch-size", "N", "windows per forward pass (as in training, fewer for longer windows)"},
    {"--batches", "N",
     "stop after so many batches of --batch-size windows of every set; 0: the whole set (0)"},
    {"--fill-last", "",
     "every document is judged alone: its windows begin with it, and the last of a longer one "
     "begins earlier, so that it is as long as the others; what has been judged before does not "
     "count again"},
    {"--frequency-buckets", "N,...",
     "also the perplexity of tokens by how often they occur in the training text: 10,100 judges "
     "those that occur 0 to 9 times, 10 to 99 times, and more often"},
    {"--counts", "PREFIX", "token file to count them in (the run's training data)"},
    {"--json", "FILE", "also write the numbers there"},
    {"--device", "NAME", "cpu, cuda or auto: a GPU where there is one (auto)"},
    {"--dtype", "NAME",
     "float32; bfloat16: autocast, as in training; bfloat16_weights: the weights are rounded too, "
     "which halves their memory (train.dtype)"},
    {"--threads", "N", "CPU threads; 0: all cores (0)"},
    {"--no-verify", "", "skip the checksums of the checkpoint"},
    {"--help", "", "show this"}};

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

/// For as long as it lives, relative paths are those of a run's settings.
class InStartFolder {
 public:
  explicit InStartFolder(const LoadedModel& loaded) {
    const std::string folder = recorded_start_folder(loaded.folder);
    if (!folder.empty()) fs::current_path(folder);
  }
  ~InStartFolder() {
    std::error_code ignored;
    fs::current_path(before_, ignored);
  }
  InStartFolder(const InStartFolder&) = delete;
  InStartFolder& operator=(const InStartFolder&) = delete;

 private:
  const fs::path before_ = fs::current_path();
};

std::string held_out_prefix(const LoadedModel& loaded) {
  const config::DataConfig& data = loaded.config.data;
  if (!data.val.empty()) return data.val;
  if (data.text.empty())
    throw Error(ExitCode::kData,
                loaded.folder + ": its run has no held-out set (data.val); give --data or --text");
  return prepare_text(data, loaded.tokenizer).val_prefix;
}

/// Throws Error(kData) where the set is not the one that the model was judged by when it was saved.
void check_same_held_out(const LoadedModel& loaded, const data::HeldOutSet& set) {
  const auto state = checkpoint_state(open_checkpoint(loaded.folder, /*verify=*/false));
  if (!state || state->held_out_fingerprint.empty() ||
      state->held_out_fingerprint == set.fingerprint())
    return;
  throw Error(ExitCode::kData,
              loaded.folder + ": its run was judged by another held-out set than " + set.name() +
                  ", which its settings lead to now: the text has changed, or is in another "
                  "folder; put it back, or say with --text or --data what to judge by");
}

std::shared_ptr<const data::TokenFile> open_data(const LoadedModel& loaded,
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

struct NamedSet {
  std::string name;
  std::unique_ptr<data::HeldOutSet> set;
};

struct EvalData {
  std::string name;               ///< as the user knows it
  std::vector<NamedSet> sources;  ///< one, or those of a folder
  bool by_source = false;
  std::unique_ptr<TemporaryFolder> folder;  ///< of a set that was prepared for this call
};

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

std::unique_ptr<data::HeldOutSet> task_set(const CommandLine& line, const config::Config& config,
                                           int64_t seq_len) {
  data::TaskOptions task = config.data.task;
  task.eval_len = seq_len;
  task.eval_min_len = line.get_int("--min-len", task.eval_min_len, 0);
  task.held_out = line.get("--held-out", task.held_out);
  if (task.held_out != "test" && task.held_out != "validation")
    throw Error(ExitCode::kConfig,
                "--held-out is " + task.held_out + ", expected test or validation");
  return data::make_task_data(task, config.data.seq_len,
                              static_cast<uint64_t>(config.data.shuffle_seed), config.data.shuffle,
                              config.model.vocab_size, config.model.input_features)
      .held_out;
}

std::vector<std::shared_ptr<const data::TokenFile>> training_files(const CommandLine& line,
                                                                   const LoadedModel& loaded) {
  const config::DataConfig& data = loaded.config.data;
  if (line.has("--counts")) return {open_data(loaded, line.get("--counts", ""))};
  const InStartFolder relative_paths(loaded);
  if (!data.text.empty())
    return {open_data(loaded, prepare_text(data, loaded.tokenizer).train_prefix)};
  std::vector<std::shared_ptr<const data::TokenFile>> files;
  for (const config::DataSource& source : data.train)
    files.push_back(open_data(loaded, source.path));
  if (files.empty())
    throw Error(ExitCode::kData, loaded.folder +
                                     ": its run has no training text to count tokens "
                                     "in; give --counts");
  return files;
}

/// What --frequency-buckets asks for.
struct Buckets {
  std::vector<int64_t> edges;
  TokenGroups groups;
};

std::optional<Buckets> choose_buckets(const CommandLine& line, const LoadedModel& loaded) {
  if (!line.has("--frequency-buckets")) {
    if (line.has("--counts"))
      throw Error(ExitCode::kConfig, "--counts is for --frequency-buckets; give both");
    return {};
  }
  Buckets buckets{line.get_growing("--frequency-buckets"), {}};
  buckets.edges.insert(buckets.edges.begin(), 0);
  buckets.groups = frequency_buckets(
      count_tokens(training_files(line, loaded), loaded.config.model.vocab_size), buckets.edges);
  return buckets;
}

EvalData choose_data(const CommandLine& line, const LoadedModel& loaded, int64_t seq_len) {
  const config::Config& config = loaded.config;
  EvalData choice;
  if (data::is_given(config.data.task) && !line.has("--text") && !line.has("--data")) {
    if (line.has("--fill-last"))
      throw Error(ExitCode::kConfig, "--fill-last is for texts, not for a data.task");
    if (line.has("--min-len") && data::reads_files(config.data.task))
      throw Error(ExitCode::kConfig,
                  "--min-len is for a data.task whose samples are drawn; those of " +
                      config.data.task.name + " are read from files");
    choice.sources.push_back({"", task_set(line, config, seq_len)});
    choice.name = choice.sources[0].set->name();
    return choice;
  }
  if (line.has("--min-len"))
    throw Error(ExitCode::kConfig, "--min-len is for models that were trained on a data.task");
  if (line.has("--held-out"))
    throw Error(ExitCode::kConfig, "--held-out is for models that were trained on a data.task");
  data::DatasetOptions options;
  options.seq_len = seq_len;
  options.reset_state_at_document = config.data.reset_state_at_document;
  options.mask_loss_across_documents = config.data.mask_loss_across_documents;
  options.fill_last_window = line.has("--fill-last");
  const auto add = [&](const std::string& prefix) {
    choice.sources.push_back({fs::path(prefix).filename().string(),
                              std::make_unique<data::EvalSet>(open_data(loaded, prefix), options)});
  };
  if (line.has("--text")) {
    choice.folder = std::make_unique<TemporaryFolder>();
    choice.name = line.get("--text", "");
    data::PrepareOptions text;
    text.inputs = {choice.name};
    text.texts.text_key = config.data.text_key;
    text.output_prefix = (choice.folder->path() / "text").string();
    text.tokenizer = loaded.tokenizer;
    data::prepare(text);
    add(text.output_prefix);
  } else if (line.has("--data")) {
    choice.name = line.get("--data", "");
    // A folder of the prefix's own name may stand beside it: what is named is the prefix.
    choice.by_source = fs::is_directory(choice.name) && !fs::exists(choice.name + ".idx");
    for (const auto& prefix :
         choice.by_source ? prefixes_in(choice.name) : std::vector{choice.name})
      add(prefix);
  } else {
    {
      const InStartFolder relative_paths(loaded);
      choice.name = held_out_prefix(loaded);
      add(choice.name);
    }
    check_same_held_out(loaded, *choice.sources[0].set);
  }
  return choice;
}

EvalReport judge(const LoadedModel& loaded, const EvalData& data, int64_t seq_len,
                 int64_t batch_size, int64_t batches, bool autocast,
                 const std::optional<Buckets>& buckets) {
  EvalReport report;
  report.checkpoint = loaded.folder;
  report.data = data.name;
  report.seq_len = seq_len;
  report.trained_seq_len = loaded.config.data.seq_len;
  if (buckets) report.bucket_edges = buckets->edges;
  const auto start = std::chrono::steady_clock::now();
  for (const auto& [name, set] : data.sources)
    report.sources.push_back(
        {name, evaluate(*loaded.model, *set, batch_size, batches * batch_size, autocast, true,
                        buckets ? &buckets->groups : nullptr)});
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (data.by_source) {
    report.result = combined(report.sources);
  } else {
    report.result = std::move(report.sources[0].result);
    report.sources.clear();
  }
  return report;
}

int body(int argc, char** argv) {
  const CommandLine line = parse_command_line(argc, argv, kOptions, false);
  if (line.has("--help")) {
    std::cout
        << "usage: xlstm-eval CHECKPOINT|RUN_FOLDER [options]\n\nLoss, perplexity and bits "
           "per byte of a trained model. The first token of a document is not judged, and its "
           "bytes do\nnot count; where tokens are of several bytes, each counts with the "
           "mean of the data's.\n\n"
        << format_options(kOptions);
    return 0;
  }
  if (line.positional.size() != 1)
    throw Error(ExitCode::kConfig, "expected one checkpoint or run folder; see xlstm-eval --help");
  if (line.has("--data") && line.has("--text"))
    throw Error(ExitCode::kConfig, "--data and --text exclude each other; give one");
  if (const int64_t threads = line.get_threads(); threads > 0)
    at::set_num_threads(static_cast<int>(threads));

  const at::Device device = choose_device(line.get("--device", "auto"), "--device");
  use_own_stream(device);
  const std::string given = line.get("--dtype", "");
  if (!given.empty() && given != "float32" && given != "bfloat16" && given != "bfloat16_weights")
    throw Error(ExitCode::kConfig,
                "--dtype: expected float32, bfloat16 or bfloat16_weights, got " + given);
  LoadedModel loaded = load_model(line.positional[0], !line.has("--no-verify"),
                                  given == "bfloat16_weights" ? at::kBFloat16 : at::kFloat);
  // Its data may be looked for in another folder.
  if (loaded.tokenizer != "bytes") loaded.tokenizer = fs::absolute(loaded.tokenizer);
  loaded.model->to(device);
  const config::Config& config = loaded.config;
  const int64_t held_out_len = data::is_given(config.data.task) ? config.data.task.eval_len : 0;
  const int64_t seq_len =
      line.get_int("--seq-len", held_out_len > 0 ? held_out_len : config.data.seq_len, 1);
  const int64_t batch_size = line.get_int(
      "--batch-size", std::max<int64_t>(1, micro_batch(config) * config.data.seq_len / seq_len), 1);
  const int64_t batches = line.get_int("--batches", 0, 0);

  const EvalData data = choose_data(line, loaded, seq_len);
  const std::optional<Buckets> buckets = choose_buckets(line, loaded);
  const EvalReport report =
      judge(loaded, data, seq_len, batch_size, batches,
            (given.empty() ? config.train.dtype : given) == "bfloat16", buckets);
  print_report(report);
  if (line.has("--json")) write_report(line.get("--json", ""), report);
  return 0;
}

}  // namespace
}  // namespace xlstm::train

int main(int argc, char** argv) {
  return xlstm::train::run_main("xlstm-eval",
                                "lower --batch-size or --seq-len, or give --dtype bfloat16_weights",
                                [&] { return xlstm::train::body(argc, argv); });
}
