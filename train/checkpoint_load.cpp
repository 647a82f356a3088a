// Reading checkpoints back: everything is checked against the manifest first.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "train/checkpoint.h"
#include "train/checkpoint_manifest.h"

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

TrainerState parse_state(const std::string& path) {
  TrainerState state;
  try {
    const Json json = Json::parse(read_file(path));
    state.step = json.at("step").get<int64_t>();
    state.tokens = json.at("tokens").get<int64_t>();
    state.samples_consumed = json.at("samples_consumed").get<int64_t>();
    state.skipped_updates = json.at("skipped_updates").get<int64_t>();
    state.data_fingerprint = json.at("data_fingerprint").get<std::string>();
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

struct Mismatch {
  int64_t missing = 0, unexpected = 0, shape = 0, dtype = 0;
  std::string first;
  void note(int64_t& counter, const std::string& what) {
    if (first.empty()) first = what;
    ++counter;
  }
  int64_t total() const { return missing + unexpected + shape + dtype; }
};

std::string shape_text(const at::Tensor& tensor) {
  std::string text = "(";
  for (const int64_t size : tensor.sizes())
    text += (text.size() > 1 ? "," : "") + std::to_string(size);
  return text + ")";
}

/// Imported and rounded weights may be of half precision: the model's float32 holds each of their values.
bool widens(at::ScalarType from, at::ScalarType to) {
  return to == at::kFloat && (from == at::kBFloat16 || from == at::kHalf);
}

void check_fit(const std::string& path, const NamedTensors& expected,
               const std::map<std::string, at::Tensor>& found) {
  Mismatch bad;
  std::map<std::string, bool> known;
  for (const auto& [name, tensor] : expected) {
    known[name] = true;
    const auto it = found.find(name);
    if (it == found.end()) {
      bad.note(bad.missing, name + " is missing");
    } else if (it->second.sizes() != tensor.sizes()) {
      bad.note(bad.shape, name + " has shape " + shape_text(it->second) + ", the model's is " +
                              shape_text(tensor));
    } else if (it->second.scalar_type() != tensor.scalar_type() &&
               !widens(it->second.scalar_type(), tensor.scalar_type())) {
      bad.note(bad.dtype, name + " is " + c10::toString(it->second.scalar_type()) +
                              ", the model's is " + c10::toString(tensor.scalar_type()));
    }
  }
  for (const auto& entry : found)
    if (known.count(entry.first) == 0)
      bad.note(bad.unexpected, entry.first + " is not in the model");
  if (bad.total() == 0) return;
  throw Error(ExitCode::kCheckpoint,
              path + ": does not fit the model: " + bad.first + " (" + std::to_string(bad.missing) +
                  " missing, " + std::to_string(bad.unexpected) + " unexpected, " +
                  std::to_string(bad.shape) + " of another shape, " + std::to_string(bad.dtype) +
                  " of another dtype); use the model settings of its config.yaml");
}

/// The manifest of a folder whose files were checked against it.
Manifest checked_manifest(const std::string& folder, bool verify) {
  const Manifest manifest = read_manifest(folder);
  verify ? check_manifest_hashes(folder, manifest) : check_manifest_sizes(folder, manifest);
  for (const char* name : {kModelName, kConfigName})
    if (manifest.find(name) == nullptr)
      throw Error(ExitCode::kCheckpoint, folder + ": its manifest lists no " + name);
  return manifest;
}

void load_weights(const std::string& folder, models::LanguageModel& model) {
  const std::string path = (fs::path(folder) / kModelName).string();
  const SafetensorsFile weights = load_safetensors(path);
  const NamedTensors targets = named_model_tensors(model);
  check_fit(path, targets, weights.tensors);
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : targets) tensor.copy_(weights.tensors.at(name));
}

/// The folder to load, checked: the argument itself, or the newest good checkpoint of a run folder.
std::pair<std::string, Manifest> resolve_folder(const std::string& folder_or_run, bool verify) {
  const fs::path given(folder_or_run);
  if (!fs::is_directory(given))
    throw Error(ExitCode::kCheckpoint,
                folder_or_run + (fs::exists(given)
                                     ? ": a file, expected the folder of a run or a checkpoint"
                                     : ": no such folder"));
  if (!fs::is_directory(given / "ckpt"))
    return {folder_or_run, checked_manifest(folder_or_run, verify)};
  const auto folders = list_checkpoints(folder_or_run);
  for (size_t i = folders.size(); i-- > 0;) {
    try {
      return {folders[i], checked_manifest(folders[i], verify)};
    } catch (const Error& error) {
      std::cerr << "warning: skipping a bad checkpoint: " << error.what() << std::endl;
    }
  }
  throw Error(ExitCode::kCheckpoint, folder_or_run + ": no good checkpoint among " +
                                         std::to_string(folders.size()) +
                                         " in its ckpt folder; train first");
}

/// The folder's own copy where it has one, so that it can be moved to another machine.
std::string resolve_tokenizer(const std::string& folder, const Manifest& manifest,
                              const std::string& configured) {
  if (configured == "bytes") return configured;
  for (const char* name : {"tokenizer.json", "vocab.json", "encoder.json"})
    if (manifest.find(name) != nullptr) return folder;
  return configured;
}

/// Building a model draws its initial weights; a caller's random stream must not notice.
class KeepRandomState {
 public:
  KeepRandomState() : state_(generator().get_state()) {}
  ~KeepRandomState() { generator().set_state(state_); }
  KeepRandomState(const KeepRandomState&) = delete;
  KeepRandomState& operator=(const KeepRandomState&) = delete;

 private:
  static at::Generator generator() { return at::detail::getDefaultCPUGenerator(); }
  at::Tensor state_;
};

}  // namespace

void verify_checkpoint(const std::string& folder) {
  check_manifest_hashes(folder, read_manifest(folder));
}

Checkpoint load_checkpoint(const std::string& folder, models::LanguageModel& model, bool verify) {
  const Manifest manifest = checked_manifest(folder, verify);
  load_weights(folder, model);
  Checkpoint checkpoint;
  checkpoint.path = folder;
  if (manifest.find(kTrainerName) != nullptr)
    checkpoint.state = parse_state((fs::path(folder) / kTrainerName).string());
  if (manifest.find(kOptimizerName) != nullptr)
    for (const auto& [name, tensor] :
         load_safetensors((fs::path(folder) / kOptimizerName).string()).tensors)
      checkpoint.optimizer.emplace_back(name, tensor.clone());
  return checkpoint;
}

LoadedModel load_model(const std::string& folder_or_run, bool verify) {
  LoadedModel loaded;
  Manifest manifest;
  std::tie(loaded.folder, manifest) = resolve_folder(folder_or_run, verify);
  loaded.config = config::load_config((fs::path(loaded.folder) / kConfigName).string());
  const KeepRandomState keep_random_state;
  loaded.model = models::make_language_model(loaded.config.model);
  load_weights(loaded.folder, *loaded.model);
  loaded.model->eval();
  loaded.tokenizer = resolve_tokenizer(loaded.folder, manifest, loaded.config.data.tokenizer);
  return loaded;
}

}  // namespace xlstm::train
