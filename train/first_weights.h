#pragma once
// train.init_from: the weights of another run or of an imported model that a new run starts with. Everything else is
// as in any new run: step 0, the first sample, an empty optimizer.
#include <memory>
#include <optional>
#include <string>

#include "csrc/config/config.h"
#include "csrc/models/language_model.h"
#include "train/checkpoint.h"

namespace xlstm::train {

/// Throws Error(kConfig) where adapters of no given weights would be trained.
void check_adapters(const config::Config& config);

/// The model of a run. Where adapters alone are trained the other weights are not drawn: they are to be loaded, by
/// load_first_weights() or from the run's own checkpoint.
std::shared_ptr<models::LanguageModel> make_model(const config::Config& config, at::Device device);

/// Whether the run would start, and with given weights: one that has a checkpoint goes on from that. fresh: it starts
/// whatever its folder holds.
bool takes_first_weights(const config::Config& config, bool fresh);

/// Finds the checkpoint that train.init_from names, and checks that its tensors are those of config.model, of any size.
/// Throws Error: kConfig where there is no such folder or it is this run's own, kCheckpoint where no checkpoint in it is
/// good or a tensor does not fit.
CheckpointFolder check_first_weights(const config::Config& config, bool verify);

/// Throws Error(kConfig) where the weights were trained with another tokenizer than data.tokenizer, which
/// open_training_data may have set. Where one of the two is not known, nothing can be said.
void check_first_tokenizer(const CheckpointFolder& weights, const config::Config& config);

/// "runs/a/ckpt/step-00001000 (step 1000)"; of a model alone its folder.
std::string describe(const CheckpointFolder& weights);

/// Loads what train.init_from names into `model`, checked as above, and returns it; nothing where it is empty.
std::optional<CheckpointFolder> load_first_weights(models::LanguageModel& model,
                                                   const config::Config& config);

}  // namespace xlstm::train
