#pragma once
// Checkpoints: a folder <run>/ckpt/step-00001000 with
//   model.safetensors  optim-rank00000.safetensors  trainer.json  config.yaml  [tokenizer files]  MANIFEST.json
// and, of a run with train.carry_state, carried.safetensors: the state of each sequence of a batch.
// The manifest (name, bytes, sha256 of every other file) is written last, by one rename: a folder without a manifest is
// not a checkpoint. With ckpt.keep_best, <run>/ckpt/best is a link to the one of the lowest held-out loss. A model-only
// folder (converted or exported) holds model.safetensors, config.yaml and MANIFEST.json.
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/safetensors.h"
#include "csrc/models/language_model.h"
#include "train/checkpoint_manifest.h"

namespace xlstm::train {

/// The evaluation of a run that gave its lowest held-out loss so far, by which ckpt.keep_best and eval.patience go.
struct BestEvaluation {
  int64_t step = -1;  ///< -1: none yet
  double loss = std::numeric_limits<double>::infinity();
  int64_t evaluations_since = 0;  ///< in a row, none of them lower
  int64_t last_step = -1;         ///< of the last evaluation that counts: each does once
  /// A loss that is not finite is never the lowest.
  void count(int64_t evaluated_step, double held_out_loss);
};

/// What resumes a run besides weights and optimizer tensors.
struct TrainerState {
  int64_t step = 0;              ///< finished optimizer steps
  int64_t tokens = 0;            ///< tokens consumed
  int64_t samples_consumed = 0;  ///< global sample index of the next batch
  int64_t skipped_updates = 0;
  std::string data_fingerprint;
  std::string
      held_out_fingerprint;  ///< "" where nothing is held out, of tasks, and in older checkpoints
  BestEvaluation best;       ///< evaluations after the checkpoint was written do not count yet
  at::Tensor rng_state;      ///< of torch's default CPU generator (uint8)
  at::Tensor device_rng_state;  ///< of the GPU's generator; undefined for a run on the CPU
};

/// Parameters and buffers by dotted name, in registration order.
NamedTensors named_model_tensors(const models::LanguageModel& model);

/// A tokenizer's files as a checkpoint holds them, name and content, and what belongs to it (data::tokenizer_companions). A
/// single file is called tokenizer.json, whatever it was called, so that the folder is a tokenizer too; beside one of another
/// name nothing belongs to it.
using TokenizerFiles = std::vector<std::pair<std::string, std::string>>;
/// spec: as data::make_tokenizer takes it. Throws Error(kData).
TokenizerFiles read_tokenizer(const std::string& spec);

/// Writes a committed checkpoint into <run_dir>/ckpt, which must be there, and returns its folder. On any file-system
/// error everything of it is removed and std::system_error is thrown; earlier checkpoints are untouched. `tokenizer` goes
/// in so that the folder stands alone. `carried`: CarriedState::tensors().
std::string save_checkpoint(const std::string& run_dir, const config::Config& config,
                            const models::LanguageModel& model, const NamedTensors& optimizer,
                            const TrainerState& state, const TokenizerFiles& tokenizer = {},
                            const NamedTensors& carried = {});
/// The same of a model alone, at exactly `folder`. A model that is there is kept until the new one is whole. Throws
/// Error(kCheckpoint) where `folder` is anything else, or a link.
void save_model_folder(const std::string& folder, const config::Config& config,
                       const NamedTensors& model_tensors, const TokenizerFiles& tokenizer = {});

/// Takes a warning.
using Warn = std::function<void(const std::string& message)>;

/// In a run's ckpt folder: the link to the checkpoint of the lowest held-out loss.
constexpr const char* kBestName = "best";

/// Of a folder named "step-00001000", or as people write it, "step-1000"; -1 for other names.
int64_t checkpoint_step(const std::string& folder);
/// Committed checkpoints of a run, oldest first, by step.
std::vector<std::string> list_checkpoints(const std::string& run_dir);
/// Deletes what keep_last and keep_every allow, and folders that were never committed; but neither the step `best` nor what
/// <run>/ckpt/best names. `warn` is told of what cannot be deleted.
void prune_checkpoints(const std::string& run_dir, int64_t keep_last, int64_t keep_every,
                       int64_t best, const Warn& warn);

/// Makes <run>/ckpt/best a relative link to the checkpoint of that step, by one rename, and returns whether it is one. Where
/// there is no such checkpoint, a link that leads nowhere is removed. Throws std::system_error where no link can be made.
bool name_best_checkpoint(const std::string& run_dir, int64_t step);
/// <run>/ckpt/best where that names the checkpoint of `step`, else its own folder, "" where it is not there.
std::string best_checkpoint(const std::string& run_dir, int64_t step);

/// A checkpoint whose files were checked against its manifest: everything that is read of one is read through this.
struct CheckpointFolder {
  std::string path;
  Manifest manifest;
  bool holds(const char* name) const { return manifest.find(name) != nullptr; }
  std::string file(const char* name) const { return path + "/" + name; }
};

/// verify: the sha256 of every file, else sizes alone. Throws Error(kCheckpoint) naming the first bad file and what is
/// wrong.
CheckpointFolder open_checkpoint(const std::string& folder, bool verify);
/// The checkpoint that a folder is, or the newest good one of a run's folder; `warn` is told of each bad one that is
/// passed over. A link to a checkpoint is followed at once: a run that trains may soon let it name another one. Throws
/// Error(kCheckpoint) where there is none.
CheckpointFolder find_checkpoint(const std::string& folder_or_run, bool verify, const Warn& warn);

/// The settings of the run that wrote it.
config::Config checkpoint_config(const CheckpointFolder& checkpoint);
/// Its tokenizer as a spec for data::make_tokenizer: the folder's own copy where it has one.
std::string checkpoint_tokenizer(const CheckpointFolder& checkpoint, const config::Config& config);
/// Nothing for a model-only folder.
std::optional<TrainerState> checkpoint_state(const CheckpointFolder& checkpoint);
/// Copies, by name; none for a model-only folder.
NamedTensors checkpoint_optimizer(const CheckpointFolder& checkpoint);
NamedTensors checkpoint_carried(const CheckpointFolder& checkpoint);

/// Settings of the checkpoint's model that make it another function of its weights than `options` does:
/// "model.num_heads=4 (here 8), ..."; "" where there is none. How it is trained (dropout) is none of them.
std::string other_model_settings(const CheckpointFolder& checkpoint,
                                 const models::ModelOptions& options);
/// Tells `warn` of them, where the tensors fit.
void warn_of_other_settings(const CheckpointFolder& checkpoint, const models::ModelOptions& options,
                            const std::function<void(const std::string&)>& warn);
/// Throws Error(kCheckpoint) unless the checkpoint has exactly the tensors of `model`, which may be on device "meta":
/// how many names, shapes and dtypes differ, and the first of them. float32 takes half precision too, and what
/// model.lora.base keeps in fewer bits takes any.
void check_weights_fit(const models::LanguageModel& model, const CheckpointFolder& checkpoint);
/// Loads weights, each rounded as it is read to what `model` keeps it in; where they do not fit, throws as check_weights_fit
/// does, and `model` keeps what it has.
void load_weights(models::LanguageModel& model, const CheckpointFolder& checkpoint);

/// A model ready to run from a checkpoint folder, or from a run folder (its newest good checkpoint).
struct LoadedModel {
  config::Config config;
  std::shared_ptr<models::LanguageModel> model;  ///< in eval mode
  std::string folder;     ///< of the checkpoint, by its own name where a link was given
  std::string tokenizer;  ///< spec for data::make_tokenizer, resolved to the folder's own copy
};
/// dtype: that of the model's parameters but those that model.lora.base keeps in fewer bits; the checkpoint's are rounded to
/// it, and beside them nothing of their size is held.
/// overrides: settings in place of the checkpoint's, as config::load_config takes them; its tensors must fit still, and a
/// warning on standard error tells where it is another function of them. Adapters that the checkpoint does not have are drawn;
/// nothing else is.
LoadedModel load_model(const std::string& folder_or_run, bool verify = true,
                       at::ScalarType dtype = at::kFloat,
                       const std::vector<std::string>& overrides = {});

}  // namespace xlstm::train
