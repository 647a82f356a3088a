#pragma once
// Checkpoints: a folder <run>/ckpt/step-00001000 with
//   model.safetensors  optim-rank00000.safetensors  trainer.json  config.yaml  [tokenizer files]  MANIFEST.json
// The manifest (name, bytes, sha256 of every other file) is written last, by one rename: a folder without a manifest is
// not a checkpoint. A model-only folder (converted or exported) holds model.safetensors, config.yaml and MANIFEST.json.
#include <memory>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/safetensors.h"
#include "csrc/models/language_model.h"

namespace xlstm::train {

/// What resumes a run besides weights and optimizer tensors.
struct TrainerState {
  int64_t step = 0;              ///< finished optimizer steps
  int64_t tokens = 0;            ///< tokens consumed
  int64_t samples_consumed = 0;  ///< global sample index of the next batch
  int64_t skipped_updates = 0;
  std::string data_fingerprint;
  at::Tensor rng_state;         ///< of torch's default CPU generator (uint8)
  at::Tensor device_rng_state;  ///< of the GPU's generator; undefined for a run on the CPU
};

struct Checkpoint {
  std::string path;
  TrainerState state;
  NamedTensors optimizer;  ///< empty for a model-only folder
};

/// Parameters and buffers by dotted name, in registration order.
NamedTensors named_model_tensors(const models::LanguageModel& model);

/// Writes a committed checkpoint and returns its folder. On any file-system error everything of it is removed and
/// std::system_error is thrown; earlier checkpoints are untouched. `tokenizer` is copied in so that the folder stands
/// alone. optimizer and state null: a model-only folder at exactly `folder`.
std::string save_checkpoint(const std::string& run_dir, const config::Config& config,
                            const models::LanguageModel& model, const NamedTensors& optimizer,
                            const TrainerState& state);
void save_model_folder(const std::string& folder, const config::Config& config,
                       const NamedTensors& model_tensors);

/// Checks every file against the manifest. Throws Error(kCheckpoint) naming the first bad file and what is wrong.
void verify_checkpoint(const std::string& folder);
/// Committed checkpoints of a run, oldest first, by step.
std::vector<std::string> list_checkpoints(const std::string& run_dir);
/// Deletes what keep_last and keep_every allow, and folders that were never committed. A failed delete is only logged.
void prune_checkpoints(const std::string& run_dir, int64_t keep_last, int64_t keep_every);

/// Loads weights into `model` (names, shapes and dtypes must match, each mismatch named; float32 takes half precision
/// too) and returns the rest.
Checkpoint load_checkpoint(const std::string& folder, models::LanguageModel& model, bool verify);

/// A model ready to run from a checkpoint folder, or from a run folder (its newest good checkpoint).
struct LoadedModel {
  config::Config config;
  std::shared_ptr<models::LanguageModel> model;  ///< in eval mode
  std::string folder;
  std::string tokenizer;  ///< spec for data::make_tokenizer, resolved to the folder's own copy
};
LoadedModel load_model(const std::string& folder_or_run, bool verify = true);

}  // namespace xlstm::train
