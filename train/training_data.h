#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "csrc/config/config.h"
#include "csrc/data/batch.h"
#include "csrc/data/dataset.h"
#include "csrc/data/prepare.h"
#include "csrc/data/tokenizer.h"

namespace xlstm::train {

/// What a run trains on and is judged by.
struct TrainingData {
  std::unique_ptr<data::SampleSource> train;
  std::unique_ptr<data::HeldOutSet> held_out;                     ///< null without data.val
  int64_t train_tokens = 0, held_out_tokens = 0;                  ///< of files; 0 with a task
  int64_t counted_train_tokens = 0, counted_held_out_tokens = 0;  ///< of them, as targets
};

bool has_data(const config::Config& config);
/// What of data.train, data.val or data.task.path is not there, and how to get it; "" where all is.
std::string missing_data(const config::Config& config);

/// The sha256 of the tokenizer that a model was, or is to be, trained with ("" for bytes); nothing where that is not
/// known: a task has none, and "bytes" is also what stands where none was given. spec: data.tokenizer, or a copy of it.
std::optional<std::string> known_tokenizer(const config::Config& config, const std::string& spec);

/// One line for logs and --dry-run: how much there is of what, and how many epochs `steps` are.
std::string describe_data(const config::Config& config, const TrainingData& data, int64_t steps);

/// How token files are cut into the samples of a run.
data::DatasetOptions dataset_options(const config::Config& config);

/// The token files of data.text, as data::prepare_cached makes them with this tokenizer.
data::CachedText prepare_text(
    const config::DataConfig& data, const std::string& tokenizer,
    const std::function<void()>& poll = [] {});

/// Makes data.task, or prepares data.text into the cache, or opens data.train and data.val, and checks that every token
/// fits the model. Takes data.tokenizer over from the files where they name another one than the
/// default, so that samples and checkpoints know it. Throws Error(kConfig) without data and where
/// model.vocab_size is too small, Error(kData) for bad files.
/// poll: as data::prepare_cached takes it.
TrainingData open_training_data(
    config::Config& config, const std::function<void()>& poll = [] {});

}  // namespace xlstm::train
