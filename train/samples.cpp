#include "train/samples.h"

#include <exception>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "csrc/core/error.h"
#include "train/log.h"
#include "train/signals.h"

namespace xlstm::train {
namespace {

std::string to_json(const nlohmann::ordered_json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void check_prompt(const std::string& prompt, const std::vector<int64_t>& ids,
                  const config::Config& config) {
  if (ids.empty())
    throw Error(ExitCode::kConfig, "sample.prompts: an empty prompt; give at least one character");
  for (const int64_t id : ids)
    if (id >= config.model.vocab_size)
      throw Error(ExitCode::kConfig,
                  "sample.prompts: \"" + prompt + "\" has token " + std::to_string(id) +
                      " by data.tokenizer=" + config.data.tokenizer + ", but model.vocab_size is " +
                      std::to_string(config.model.vocab_size) +
                      "; set data.tokenizer to the one that the data was made with, or leave out "
                      "sample.prompts");
}

}  // namespace

std::string valid_utf8(const std::string& text) {
  return nlohmann::json::parse(to_json(text)).get<std::string>();
}

SampleWriter::SampleWriter(const config::Config& config, std::string path)
    : config_(config), path_(std::move(path)) {
  if (config.sample.prompts.empty()) return;
  tokenizer_ = data::make_tokenizer(config.data.tokenizer);
  for (const std::string& prompt : config.sample.prompts) {
    std::vector<int64_t> ids = data::encode_prompt(*tokenizer_, prompt);
    if (ids.empty() && tokenizer_->eos_id() >= 0) ids.push_back(tokenizer_->eos_id());
    check_prompt(prompt, ids, config);
    prompts_.push_back(std::move(ids));
  }
}

std::vector<size_t> SampleWriter::missing(int64_t step) const {
  std::multiset<std::string> written;
  if (!prompts_.empty())
    for (const nlohmann::json& line : lines_of_step(path_, step))
      written.insert(line.value("prompt", ""));
  std::vector<size_t> missing;
  for (size_t i = 0; i < prompts_.size(); ++i) {
    const auto found = written.find(valid_utf8(config_.sample.prompts[i]));
    if (found == written.end()) {
      missing.push_back(i);
    } else {
      written.erase(found);
    }
  }
  return missing;
}

void SampleWriter::write(models::LanguageModel& model, int64_t step,
                         const std::function<void()>& poll) {
  try {
    for (const size_t index : missing(step)) write_one(model, step, index, poll);
    failed_ = false;
  } catch (const Stopped&) {
    throw;
  } catch (const std::exception& error) {
    const auto* own = dynamic_cast<const Error*>(&error);
    if (own != nullptr && own->code == ExitCode::kPeer) throw;
    if (!failed_)
      log_warning("samples of step " + std::to_string(step) +
                  " are not written: " + std::string(error.what()) + "; training goes on");
    failed_ = true;
  }
}

SamplingOptions SampleWriter::sampling_options(size_t index) const {
  SamplingOptions options;
  options.max_new_tokens = config_.sample.max_new_tokens;
  options.temperature = config_.sample.temperature;
  options.top_k = config_.sample.top_k;
  options.top_p = config_.sample.top_p;
  options.seed = static_cast<uint64_t>(config_.run.seed) + index;
  options.stop_token = tokenizer_->eos_id();
  options.vocab_size = tokenizer_->vocab_size();
  return options;
}

void SampleWriter::write_one(models::LanguageModel& model, int64_t step, size_t index,
                             const std::function<void()>& poll) {
  const SamplingOptions options = sampling_options(index);
  std::vector<int64_t> ids = generate(model, prompts_[index], options, [&](int64_t) { poll(); });
  if (!ids.empty() && ids.back() == options.stop_token) ids.pop_back();
  const std::string text = valid_utf8(tokenizer_->decode(ids));
  const std::string& prompt = config_.sample.prompts[index];
  log_info("--- sample at step " + std::to_string(step) + " ---\n" + prompt + text + "\n---");
  if (file_ == nullptr) file_ = std::make_unique<JsonlWriter>(path_);
  file_->write_line(to_json({{"step", step},
                             {"prompt", prompt},
                             {"text", text},
                             {"temperature", config_.sample.temperature}}));
}

}  // namespace xlstm::train
