// Reading checkpoints back: everything is checked against the manifest first.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "csrc/config/schema.h"
#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "csrc/nn/layers.h"
#include "csrc/ops/linear_int8.h"
#include "train/checkpoint.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

at::Tensor from_hex(const std::string& hex, const std::string& file) {
  static const std::string digits = "0123456789abcdef";
  at::Tensor bytes = at::empty({static_cast<int64_t>(hex.size() / 2)}, at::kByte);
  auto* data = static_cast<unsigned char*>(bytes.data_ptr());
  if (hex.size() % 2 != 0 || hex.find_first_not_of(digits) != std::string::npos)
    throw Error(ExitCode::kCheckpoint, file + ": rng_state is not hexadecimal");
  for (size_t i = 0; i < hex.size() / 2; ++i)
    data[i] =
        static_cast<unsigned char>(digits.find(hex[2 * i]) << 4 | digits.find(hex[2 * i + 1]));
  return bytes;
}

BestEvaluation parse_best(const Json& json) {
  BestEvaluation best;
  best.step = json.at("step").get<int64_t>();
  if (best.step >= 0) best.loss = json.at("loss").get<double>();
  best.evaluations_since = json.at("evaluations_since").get<int64_t>();
  best.last_step = json.at("last_step").get<int64_t>();
  return best;
}

TrainerState parse_state(const std::string& path) {
  TrainerState state;
  try {
    const Json json = Json::parse(read_file(path));
    state.step = json.at("step").get<int64_t>();
    state.tokens = json.at("tokens").get<int64_t>();
    state.samples_consumed = json.at("samples_consumed").get<int64_t>();
    state.skipped_updates = json.at("skipped_updates").get<int64_t>();
    state.data_fingerprint = json.at("data_fingerprint").get<std::string>();
    state.held_out_fingerprint = json.value("held_out_fingerprint", "");  // absent in older ones
    if (json.contains("best_evaluation")) state.best = parse_best(json["best_evaluation"]);
    const auto bytes = [&](const std::string& hex) {
      return hex.empty() ? at::Tensor() : from_hex(hex, path);
    };
    state.rng_state = bytes(json.at("rng_state").get<std::string>());
    state.device_rng_state = bytes(json.value("device_rng_state", ""));  // absent in older ones
  } catch (const Json::exception& error) {
    throw Error(ExitCode::kCheckpoint, path + ": not a trainer state: " + error.what());
  }
  return state;
}

/// What of a checkpoint's tensors is not as the model has it.
struct Mismatch {
  static constexpr int64_t kTold = 3;
  int64_t missing = 0, unexpected = 0, shape = 0, dtype = 0, noted = 0;
  std::string first;  ///< the first few, in words
  void note(int64_t& counter, const std::string& what) {
    ++counter;
    if (++noted <= kTold) first += (first.empty() ? "" : ", ") + what;
  }
  std::string text() const {
    return first + (noted > kTold ? " and " + std::to_string(noted - kTold) + " more" : "");
  }
};

std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? "," : "") + std::to_string(size);
  return text + ")";
}

/// Imported and rounded weights may be of half precision: the model's float32 holds each of their values. What model.lora.base
/// keeps in fewer bits is rounded.
bool converts(at::ScalarType from, at::ScalarType to) {
  const bool fewer_bits = at::isReducedFloatingType(to) || to == at::kChar;
  return from == at::kFloat ? fewer_bits
                            : at::isReducedFloatingType(from) && (fewer_bits || to == at::kFloat);
}

/// in_features of the maps whose weights the model keeps in 8 bits, by the weight's name.
std::map<std::string, int64_t> int8_maps(const models::LanguageModel& model) {
  std::map<std::string, int64_t> maps;
  for (const auto& module : model.named_modules("", /*include_self=*/false))
    if (const auto* linear = module.value()->as<nn::Linear>();
        linear != nullptr && linear->weight.scalar_type() == at::kChar)
      maps.emplace(module.key() + ".weight", linear->in_features());
  return maps;
}

/// Weights without adapters are taken by a model with fresh ones: it computes the same.
Mismatch compare(const models::LanguageModel& model,
                 const std::map<std::string, at::Tensor>& found) {
  const auto to_round = int8_maps(model);
  Mismatch bad;
  std::set<std::string> known;
  const bool adapted = std::any_of(found.begin(), found.end(),
                                   [](const auto& entry) { return nn::is_adapter(entry.first); });
  for (const auto& [name, tensor] : named_model_tensors(model)) {
    known.insert(name);
    const auto it = found.find(name);
    std::vector<int64_t> sizes = tensor.sizes().vec();
    if (it != found.end() && it->second.is_floating_point() && to_round.contains(name))
      sizes.back() = to_round.at(name);
    if (it == found.end()) {
      if (adapted || !nn::is_adapter(name)) bad.note(bad.missing, name + " is missing");
    } else if (it->second.scalar_type() == at::kChar && tensor.is_floating_point()) {
      bad.note(bad.dtype,
               name +
                   " has 8 bits, which nothing trains but adapters beside it (model.lora.rank with "
                   "model.lora.base=int8): set these, or name the folder that it was rounded from");
    } else if (it->second.sizes() != sizes) {
      bad.note(bad.shape, name + " has shape " + shape_text(it->second.sizes()) +
                              ", the model's is " + shape_text(sizes));
    } else if (it->second.scalar_type() != tensor.scalar_type() &&
               !converts(it->second.scalar_type(), tensor.scalar_type())) {
      bad.note(bad.dtype, name + " is " + c10::toString(it->second.scalar_type()) +
                              ", the model's is " + c10::toString(tensor.scalar_type()));
    }
  }
  for (const auto& entry : found)
    if (known.count(entry.first) == 0)
      bad.note(bad.unexpected,
               entry.first + " is not in the model" +
                   (nn::is_adapter(entry.first)
                        ? " (Model.merge_lora() in Python makes it part of the weight)"
                        : ""));
  return bad;
}

/// Throws unless the tensors are those of the model.
void check_fit(const models::LanguageModel& model, const SafetensorsFile& weights,
               const CheckpointFolder& checkpoint) {
  const std::string path = checkpoint.file(kModelName);
  const Mismatch bad = compare(model, weights.tensors);
  if (bad.noted == 0) return;
  const std::string others = other_model_settings(checkpoint, model.options());
  throw Error(ExitCode::kCheckpoint,
              path + ": does not fit the model (" + std::to_string(bad.missing) + " missing, " +
                  std::to_string(bad.unexpected) + " unexpected, " + std::to_string(bad.shape) +
                  " of another shape, " + std::to_string(bad.dtype) +
                  " of another dtype): " + bad.text() + "; use the model settings of its " +
                  kConfigName + (others.empty() ? "" : ": " + others));
}

/// The tensors of a model to train.
SafetensorsFile read_weights(const models::LanguageModel& model,
                             const CheckpointFolder& checkpoint) {
  SafetensorsFile weights = load_safetensors(checkpoint.file(kModelName));
  check_fit(model, weights, checkpoint);
  return weights;
}

/// All but adapters that the file does not have, one tensor after the other rounded to what the model keeps it in.
void copy_weights(models::LanguageModel& model, const SafetensorsFile& weights,
                  const CheckpointFolder& checkpoint) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : named_model_tensors(model)) {
    const auto stored = weights.tensors.find(name);
    if (stored == weights.tensors.end()) continue;
    if (tensor.is_floating_point() || !stored->second.is_floating_point()) {
      tensor.copy_(stored->second);
      continue;
    }
    try {
      tensor.copy_(ops::quantize_int8(stored->second));
    } catch (const c10::Error& error) {
      throw Error(ExitCode::kCheckpoint, checkpoint.file(kModelName) + ": " + name + ": " +
                                             error.what_without_backtrace());
    }
  }
}

/// The matrices of linear maps that the file keeps in 8 bits, with `all` those that may be kept so, too, are so in the model:
/// memory for them, as of all its weights.
void keep_int8(models::LanguageModel& model, const SafetensorsFile& weights, bool all) {
  for (const auto& module : model.named_modules("", /*include_self=*/false)) {
    auto* linear = module.value()->as<nn::Linear>();
    const auto stored = weights.tensors.find(module.key() + ".weight");
    if (linear == nullptr || stored == weights.tensors.end() || !linear->weight.is_floating_point())
      continue;
    if (linear->fits_int8(stored->second) || (all && linear->is_large()))
      linear->keep_in(at::kChar);
  }
}

/// Those that the file does not have.
void draw_fresh_adapters(models::LanguageModel& model, const SafetensorsFile& weights) {
  for (const auto& module : model.named_modules("", /*include_self=*/false)) {
    auto* linear = module.value()->as<nn::Linear>();
    if (linear != nullptr && linear->lora_a.defined() &&
        !weights.tensors.contains(module.key() + ".lora_a"))
      linear->draw_adapter();
  }
}

/// Says what a folder is that is neither a checkpoint nor holds any, where that can be told.
void refuse_as_run(const fs::path& folder) {
  if (fs::exists(folder / "run.log"))
    throw Error(ExitCode::kCheckpoint, folder.string() +
                                           ": a run that never came to a checkpoint; its run.log "
                                           "tells how far it came");
  std::string runs;
  for (const auto& entry : fs::directory_iterator(folder))
    if (fs::is_directory(entry.path() / "ckpt"))
      runs += (runs.empty() ? "" : ", ") + entry.path().filename().string();
  if (!runs.empty())
    throw Error(ExitCode::kCheckpoint,
                folder.string() + ": a folder of runs; name one of them: " + runs);
}

void warn_on_standard_error(const std::string& what) {
  std::cerr << "warning: " << what << std::endl;
}

/// Of the tensors of a file; none where there is no such file.
NamedTensors copies_of(const CheckpointFolder& checkpoint, const char* name) {
  NamedTensors tensors;
  if (checkpoint.holds(name))
    for (const auto& [key, tensor] : load_safetensors(checkpoint.file(name)).tensors)
      tensors.emplace_back(key, tensor.clone());
  return tensors;
}

/// What a link to a folder leads to, by its own name; any other folder as it is.
fs::path follow(const fs::path& given) {
  fs::path folder = (given / "").parent_path();  // a name with "/" behind it is that of no link
  if (!fs::is_symlink(folder)) return given;
  while (fs::is_symlink(folder)) folder = folder.parent_path() / fs::read_symlink(folder);
  return folder;
}

}  // namespace

CheckpointFolder open_checkpoint(const std::string& folder, bool verify) {
  CheckpointFolder checkpoint{folder, read_manifest(folder)};
  verify ? check_manifest_hashes(folder, checkpoint.manifest)
         : check_manifest_sizes(folder, checkpoint.manifest);
  for (const char* name : {kModelName, kConfigName})
    if (!checkpoint.holds(name))
      throw Error(ExitCode::kCheckpoint, folder + ": its manifest lists no " + name);
  return checkpoint;
}

CheckpointFolder find_checkpoint(const std::string& folder_or_run, bool verify, const Warn& warn) {
  const fs::path given(folder_or_run);
  if (!fs::is_directory(given))
    throw Error(ExitCode::kCheckpoint,
                folder_or_run + (fs::exists(given)
                                     ? ": a file, expected the folder of a run or a checkpoint"
                                     : ": no such folder"));
  if (!fs::is_directory(given / "ckpt")) {
    if (!fs::exists(given / kManifestName)) refuse_as_run(given);
    return open_checkpoint(follow(given).string(), verify);
  }
  const auto folders = list_checkpoints(folder_or_run);
  if (folders.empty())
    throw Error(ExitCode::kCheckpoint,
                folder_or_run + ": no checkpoint in its ckpt folder yet; train first");
  std::string newest_problem;
  for (auto folder = folders.rbegin(); folder != folders.rend(); ++folder) {
    try {
      return open_checkpoint(*folder, verify);
    } catch (const Error& error) {
      warn(std::string(error.what()) + "; falling back to the checkpoint before it");
      if (newest_problem.empty()) newest_problem = error.what();
    }
  }
  throw Error(ExitCode::kCheckpoint,
              folder_or_run + ": no good checkpoint is left (" + newest_problem + ")");
}

config::Config checkpoint_config(const CheckpointFolder& checkpoint) {
  return config::load_config(checkpoint.file(kConfigName));
}

std::string checkpoint_tokenizer(const CheckpointFolder& checkpoint, const config::Config& config) {
  const std::string& configured = config.data.tokenizer;
  if (configured == "bytes") return configured;
  for (const char* name : {"tokenizer.json", "vocab.json", "encoder.json"})
    if (checkpoint.holds(name)) return checkpoint.path;
  return configured;
}

std::optional<TrainerState> checkpoint_state(const CheckpointFolder& checkpoint) {
  if (!checkpoint.holds(kTrainerName)) return std::nullopt;
  return parse_state(checkpoint.file(kTrainerName));
}

NamedTensors checkpoint_optimizer(const CheckpointFolder& checkpoint) {
  return copies_of(checkpoint, kOptimizerName);
}

NamedTensors checkpoint_carried(const CheckpointFolder& checkpoint) {
  return copies_of(checkpoint, kCarriedName);
}

std::string other_model_settings(const CheckpointFolder& checkpoint,
                                 const models::ModelOptions& options) {
  config::Config theirs = checkpoint_config(checkpoint), ours;
  ours.model = options;
  // First values of what is learnt are not there any more.
  if (options.mlstm.igate != "fixed")
    theirs.model.mlstm.igate_bias_init = options.mlstm.igate_bias_init;
  if (options.mlstm.fgate != "fixed")
    theirs.model.mlstm.fgate_bias_init = options.mlstm.fgate_bias_init;
  std::string others;
  for (const config::Field& field : config::schema()) {
    if (!field.identity || !field.name.starts_with("model.")) continue;
    const bool fresh_adapters = theirs.model.lora.rank == 0 && ours.model.lora.rank > 0;
    if (fresh_adapters && field.name.starts_with("model.lora.")) continue;
    const std::string there = config::format_value(field.ref(theirs)),
                      here = config::format_value(field.ref(ours));
    if (there != here)
      others += (others.empty() ? "" : ", ") + field.name + "=" + there + " (here " + here + ")";
  }
  return others;
}

void warn_of_other_settings(const CheckpointFolder& checkpoint, const models::ModelOptions& options,
                            const std::function<void(const std::string&)>& warn) {
  const std::string others = other_model_settings(checkpoint, options);
  if (!others.empty())
    warn(checkpoint.path + ": trained with " + others +
         "; the tensors fit, but the model computes something else with them");
}

void check_weights_fit(const models::LanguageModel& model, const CheckpointFolder& checkpoint) {
  read_weights(model, checkpoint);
}

void load_weights(models::LanguageModel& model, const CheckpointFolder& checkpoint) {
  const SafetensorsFile weights = read_weights(model, checkpoint);
  copy_weights(model, weights, checkpoint);
  draw_fresh_adapters(model, weights);
}

LoadedModel load_model(const std::string& folder_or_run, bool verify, at::ScalarType dtype,
                       const std::vector<std::string>& overrides) {
  const CheckpointFolder checkpoint =
      find_checkpoint(folder_or_run, verify, warn_on_standard_error);
  LoadedModel loaded;
  loaded.folder = checkpoint.path;
  loaded.config = config::load_config(checkpoint.file(kConfigName), overrides);
  loaded.tokenizer = checkpoint_tokenizer(checkpoint, loaded.config);
  if (!overrides.empty())
    warn_of_other_settings(checkpoint, loaded.config.model, warn_on_standard_error);
  const SafetensorsFile weights = load_safetensors(checkpoint.file(kModelName));
  {
    const nn::SkipDrawing skip_drawing;  // until they are copied the weights may be anything
    loaded.model = models::make_language_model(loaded.config.model);
    keep_int8(*loaded.model, weights, /*all=*/false);
    check_fit(*loaded.model, weights, checkpoint);
    keep_int8(*loaded.model, weights, dtype == at::kChar);
    nn::round_weights(*loaded.model, dtype);  // moves nothing: no page was touched yet
  }
  copy_weights(*loaded.model, weights, checkpoint);
  draw_fresh_adapters(*loaded.model, weights);
  loaded.model->eval();
  return loaded;
}

}  // namespace xlstm::train
