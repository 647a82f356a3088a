#include "train/first_weights.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "csrc/core/error.h"
#include "csrc/nn/layers.h"
#include "train/log.h"
#include "train/run_folder.h"
#include "train/training_data.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ExitCode::kConfig, "train.init_from: " + what);
}

bool is_within(const std::string& path, const std::string& folder) {
  const fs::path inner = fs::weakly_canonical(path), outer = fs::weakly_canonical(folder);
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

CheckpointFolder find_first_weights(const config::Config& config, bool verify) {
  const std::string& folder = config.train.init_from;
  if (!fs::is_directory(folder))
    refuse(folder + (fs::exists(folder) ? ": a file" : ": no such folder") +
           "; name the folder of a run or of a checkpoint");
  if (is_within(folder, run_path(config.run)))
    refuse(folder + " belongs to this run itself; give the new run another run.name");
  return find_checkpoint(folder, verify, log_warning);
}

}  // namespace

void check_adapters(const config::Config& config) {
  if (config.model.lora.rank > 0 && config.train.init_from.empty())
    throw Error(ExitCode::kConfig,
                "model.lora.rank is " + std::to_string(config.model.lora.rank) +
                    ": adapters alone are trained, of the weights that train.init_from names; set "
                    "that, or model.lora.rank=0");
}

std::shared_ptr<models::LanguageModel> make_model(const config::Config& config, at::Device device) {
  std::optional<nn::SkipDrawing> skip_drawing;
  if (config.model.lora.rank > 0) skip_drawing.emplace();
  return models::make_language_model(config.model, device);
}

bool takes_first_weights(const config::Config& config, bool fresh) {
  return !config.train.init_from.empty() &&
         (fresh || list_checkpoints(run_path(config.run)).empty());
}

CheckpointFolder check_first_weights(const config::Config& config, bool verify) {
  CheckpointFolder weights = find_first_weights(config, verify);
  check_weights_fit(*models::make_language_model(config.model, at::kMeta), weights);
  return weights;
}

void check_first_tokenizer(const CheckpointFolder& weights, const config::Config& config) {
  const config::Config theirs = checkpoint_config(weights);
  const std::string spec = checkpoint_tokenizer(weights, theirs);
  const auto trained_with = known_tokenizer(theirs, spec),
             trains_with = known_tokenizer(config, config.data.tokenizer);
  if (!trained_with || !trains_with || *trained_with == *trains_with) return;
  refuse(weights.path + " was trained with the tokenizer " + spec + ", data.tokenizer is " +
         config.data.tokenizer +
         ": the same token ids would mean other words; set data.tokenizer=" + spec +
         (config.data.train.empty()
              ? ""
              : ", and prepare the text with xlstm-data prepare --tokenizer " + spec));
}

std::string describe(const CheckpointFolder& weights) {
  const std::optional<TrainerState> state = checkpoint_state(weights);
  return weights.path + (state ? " (step " + std::to_string(state->step) + ")" : "");
}

std::optional<CheckpointFolder> load_first_weights(models::LanguageModel& model,
                                                   const config::Config& config) {
  if (config.train.init_from.empty()) return std::nullopt;
  CheckpointFolder weights = find_first_weights(config, config.ckpt.verify_on_load);
  check_first_tokenizer(weights, config);
  load_weights(model, weights);
  return weights;
}

}  // namespace xlstm::train
