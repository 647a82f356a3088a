#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/data/tokenizer.h"
#include "csrc/models/language_model.h"
#include "train/generation.h"
#include "train/metrics.h"

namespace xlstm::train {

/// Text that the model writes during training: to the console and, one JSON object per sample, to
/// <run>/samples.jsonl.
class SampleWriter {
 public:
  /// Does nothing without sample.prompts. Throws Error(kConfig) for a prompt without a token or with one that the model
  /// does not know. `path` is touched by the first sample.
  SampleWriter(const config::Config& config, std::string path);

  /// Whether the file lacks samples of this step.
  bool lacks(int64_t step) const { return !missing(step).empty(); }
  /// Writes those. A sample that fails costs a warning, never the run. poll: called for every token; when it throws
  /// Stopped or Error(kPeer), what is left stays missing.
  void write(models::LanguageModel& model, int64_t step, const std::function<void()>& poll);

 private:
  std::vector<size_t> missing(int64_t step) const;
  void write_one(models::LanguageModel& model, int64_t step, size_t index,
                 const std::function<void()>& poll);
  SamplingOptions sampling_options(size_t index) const;

  const config::Config& config_;
  std::string path_;
  std::unique_ptr<data::Tokenizer> tokenizer_;
  std::unique_ptr<JsonlWriter> file_;
  std::vector<std::vector<int64_t>> prompts_;
  bool failed_ = false;
};

/// Bytes that are not UTF-8 become U+FFFD.
std::string valid_utf8(const std::string& text);

}  // namespace xlstm::train
