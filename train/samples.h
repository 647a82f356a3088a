#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/data/tokenizer.h"
#include "csrc/models/language_model.h"
#include "train/metrics.h"

namespace xlstm::train {

/// Text that the model writes during training: to the console and, one JSON object per sample, to
/// <run>/samples.jsonl.
class SampleWriter {
 public:
  /// Does nothing without sample.prompts. Throws Error(kConfig) for a prompt without a token.
  SampleWriter(const config::Config& config, const std::string& path);
  void write(models::LanguageModel& model, int64_t step);

 private:
  const config::Config& config_;
  std::unique_ptr<data::Tokenizer> tokenizer_;
  std::unique_ptr<JsonlWriter> file_;
  std::vector<std::vector<int64_t>> prompts_;
};

/// Bytes that are not UTF-8 become U+FFFD.
std::string valid_utf8(const std::string& text);

}  // namespace xlstm::train
