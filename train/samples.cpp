#include "train/samples.h"

#include <nlohmann/json.hpp>

#include "csrc/core/error.h"
#include "train/generation.h"
#include "train/log.h"

namespace xlstm::train {
namespace {

std::string to_json(const nlohmann::ordered_json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

std::string valid_utf8(const std::string& text) {
  return nlohmann::json::parse(to_json(text)).get<std::string>();
}

SampleWriter::SampleWriter(const config::Config& config, const std::string& path)
    : config_(config) {
  if (config.sample.prompts.empty()) return;
  tokenizer_ = data::make_tokenizer(config.data.tokenizer);
  file_ = std::make_unique<JsonlWriter>(path);
  for (const std::string& prompt : config.sample.prompts) {
    std::vector<int64_t> ids = tokenizer_->encode(prompt);
    if (ids.empty() && tokenizer_->eos_id() >= 0) ids.push_back(tokenizer_->eos_id());
    if (ids.empty())
      throw Error(ExitCode::kConfig,
                  "sample.prompts: an empty prompt; give at least one character");
    prompts_.push_back(std::move(ids));
  }
}

void SampleWriter::write(models::LanguageModel& model, int64_t step) {
  for (size_t i = 0; i < prompts_.size(); ++i) {
    SamplingOptions options;
    options.max_new_tokens = config_.sample.max_new_tokens;
    options.temperature = config_.sample.temperature;
    options.top_k = config_.sample.top_k;
    options.top_p = config_.sample.top_p;
    options.seed = static_cast<uint64_t>(config_.run.seed) + i;
    options.stop_token = tokenizer_->eos_id();
    options.vocab_size = tokenizer_->vocab_size();
    std::vector<int64_t> ids = generate(model, prompts_[i], options);
    if (!ids.empty() && ids.back() == options.stop_token) ids.pop_back();
    const std::string text = valid_utf8(tokenizer_->decode(ids));
    log_info("--- sample at step " + std::to_string(step) + " ---\n" + config_.sample.prompts[i] +
             text + "\n---");
    file_->write_line(to_json({{"step", step},
                               {"prompt", config_.sample.prompts[i]},
                               {"text", text},
                               {"temperature", config_.sample.temperature}}));
  }
}

}  // namespace xlstm::train
