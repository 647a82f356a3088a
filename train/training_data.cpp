#include "train/training_data.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "csrc/core/error.h"
#include "csrc/data/dataset.h"
#include "csrc/data/task_source.h"
#include "train/log.h"
#include "train/metrics.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kByteValues = 256;

data::Verify verify_mode(const std::string& name) {
  if (name == "none") return data::Verify::kNone;
  return name == "sha256" ? data::Verify::kSha256 : data::Verify::kSizes;
}

bool token_file_exists(const std::string& path) {
  return fs::exists(path) || fs::exists(path + ".bin");
}

/// The tokenizer the file was made with must fit the model, and is the one samples need.
void apply_sidecar(const data::TokenFile& file, config::Config& config) {
  const auto& sidecar = file.sidecar();
  if (!sidecar.has_value()) return;
  if (config.model.vocab_size < sidecar->vocab_size) {
    throw Error(ExitCode::kConfig,
                "model.vocab_size " + std::to_string(config.model.vocab_size) +
                    " is smaller than the " + std::to_string(sidecar->vocab_size) +
                    " tokens of the tokenizer of " + file.prefix() + " (" + sidecar->tokenizer +
                    "); set model.vocab_size=" + std::to_string(sidecar->vocab_size) + " or more");
  }
  if (sidecar->tokenizer.empty()) return;
  if (config.data.tokenizer == "bytes" && sidecar->tokenizer != "bytes") {
    if (!fs::exists(sidecar->tokenizer)) {
      throw Error(ExitCode::kConfig,
                  file.prefix() + " was made with the tokenizer " + sidecar->tokenizer +
                      ", which is not there any more; say where it is with data.tokenizer=PATH");
    }
    config.data.tokenizer = sidecar->tokenizer;
  }
  // Checkpoints and samples would read the tokens as another text.
  if (!data::is_made_with(*sidecar, config.data.tokenizer))
    throw Error(ExitCode::kData, file.prefix() + " was made with the tokenizer " +
                                     sidecar->tokenizer +
                                     ", data.tokenizer is another one: " + config.data.tokenizer +
                                     "; set the first, or prepare the text again with the second");
}

std::shared_ptr<const data::TokenFile> open_file(const std::string& path, config::Config& config) {
  auto file = std::make_shared<const data::TokenFile>(path, verify_mode(config.data.verify));
  apply_sidecar(*file, config);
  file->check_vocab(config.model.vocab_size);
  return file;
}

/// Before a step is made: an evaluation of no token would end the run.
void check_held_out_counts(const data::HeldOutSet& held_out, const config::Config& config) {
  const int64_t all = held_out.num_windows(), batches = config.eval.batches,
                windows =
                    batches > 0 ? std::min(all, batches * config.train.global_batch_size) : all;
  for (int64_t first = 0; first < windows; ++first)
    if (held_out.batch(first, 1).num_targets > 0) return;
  throw Error(ExitCode::kData,
              "held-out data: none of the first " + std::to_string(windows) +
                  " windows of data.seq_len=" + std::to_string(config.data.seq_len) +
                  " has a token that counts; raise data.seq_len" +
                  (windows < all ? " or eval.batches" : "") + ", or give other held-out text");
}

std::string format_tokens(int64_t all, int64_t counted) {
  return format_thousands(all) + " tokens" +
         (counted < all ? ", of which " + format_thousands(counted) + " count" : "");
}

}  // namespace

std::optional<std::string> known_tokenizer(const config::Config& config, const std::string& spec) {
  if (data::is_given(config.data.task)) return std::nullopt;
  if (spec == "bytes" && config.data.text.empty() && config.model.vocab_size != kByteValues)
    return std::nullopt;
  return data::tokenizer_sha256(spec);
}

bool has_data(const config::Config& config) {
  return data::is_given(config.data.task) || !config.data.text.empty() ||
         !config.data.train.empty();
}

std::string missing_data(const config::Config& config) {
  const data::TaskOptions& task = config.data.task;
  if (data::is_given(task))
    return data::reads_files(task) && !task.path.empty() && !fs::exists(task.path)
               ? task.path + ", the folder of data.task " + task.name + ", is not there"
               : "";
  if (!config.data.text.empty()) return "";
  std::vector<std::string> files;
  for (const auto& source : config.data.train) files.push_back(source.path);
  if (!config.data.val.empty()) files.push_back(config.data.val);
  for (const std::string& path : files)
    if (!token_file_exists(path)) return path + ".bin is not there (xlstm-data prepare)";
  return "";
}

std::string describe_data(const config::Config& config, const TrainingData& data, int64_t steps) {
  const int64_t epoch = data.train->samples_per_epoch();
  const auto samples = static_cast<double>(steps * config.train.global_batch_size);
  char epochs[64] = "fresh samples for ever";
  if (epoch > 0)
    std::snprintf(epochs, sizeof epochs, "%s windows: %.3g epochs", format_thousands(epoch).c_str(),
                  samples / static_cast<double>(epoch));
  if (data::is_given(config.data.task))
    return "task " + config.data.task.name + ", " + epochs + "; held out " +
           format_thousands(data.held_out->num_windows()) + " samples";
  return format_tokens(data.train_tokens, data.counted_train_tokens) + ", " + epochs + "; " +
         (data.held_out
              ? "held out " + format_tokens(data.held_out_tokens, data.counted_held_out_tokens)
              : "nothing held out");
}

data::DatasetOptions dataset_options(const config::Config& config) {
  return {.seq_len = config.data.seq_len,
          .shuffle = config.data.shuffle,
          .seed = static_cast<uint64_t>(config.data.shuffle_seed),
          .reset_state_at_document = config.data.reset_state_at_document,
          .mask_loss_across_documents = config.data.mask_loss_across_documents,
          .streams = config.train.carry_state ? config.train.global_batch_size : 0};
}

data::CachedText prepare_text(const config::DataConfig& data, const std::string& tokenizer,
                              const std::function<void()>& poll) {
  return data::prepare_cached({.text = data.text,
                               .val_text = data.val_text,
                               .val_fraction = data.val_fraction,
                               .val_split = data.val_split,
                               .text_key = data.text_key,
                               .prompt_key = data.prompt_key,
                               .tokenizer = tokenizer,
                               .cache_dir = data.cache_dir},
                              poll);
}

TrainingData open_training_data(config::Config& config, const std::function<void()>& poll) {
  if (!has_data(config)) {
    throw Error(ExitCode::kConfig,
                "no training data: set data.text=FILE, FOLDER or GLOB, data.train=[{path: "
                "PREFIX}] (xlstm-data prepare), or data.task.name=TASK");
  }
  if (data::is_given(config.data.task)) {
    data::TaskData task = data::make_task_data(
        config.data.task, config.data.seq_len, static_cast<uint64_t>(config.data.shuffle_seed),
        config.data.shuffle, config.model.vocab_size, config.model.input_features);
    return {std::move(task.train), std::move(task.held_out)};
  }
  std::vector<config::DataSource> sources = config.data.train;
  std::string held_out = config.data.val;
  if (!config.data.text.empty()) {
    const data::CachedText cached = prepare_text(config.data, config.data.tokenizer, poll);
    sources = {{cached.train_prefix, 1.0}};
    held_out = cached.val_prefix;
  }
  const data::DatasetOptions options = dataset_options(config);
  TrainingData result;
  std::vector<data::WeightedFile> files;
  for (const auto& source : sources) {
    files.push_back({open_file(source.path, config), source.weight});
    result.train_tokens += files.back().file->num_tokens();
    result.counted_train_tokens += files.back().file->num_counted_tokens();
  }
  result.train = std::make_unique<data::Dataset>(std::move(files), options);
  if (!held_out.empty()) {
    const auto file = open_file(held_out, config);
    result.held_out_tokens = file->num_tokens();
    result.counted_held_out_tokens = file->num_counted_tokens();
    result.held_out = std::make_unique<data::EvalSet>(file, options);
    check_held_out_counts(*result.held_out, config);
  }
  // Every checkpoint gets a copy: a tokenizer that is not there stops the run here.
  data::tokenizer_files(config.data.tokenizer);
  return result;
}

}  // namespace xlstm::train
