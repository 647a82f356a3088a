#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <string>

#include "csrc/config/config.h"
#include "csrc/models/language_model.h"
#include "train/carried_state.h"
#include "train/checkpoint.h"
#include "train/distributed.h"
#include "train/optimizer.h"
#include "train/recorder.h"

namespace xlstm::train {

/// Saves a run as checkpoints of its folder, and decides what is worth keeping:
///   before  weights that are not finite, or that have come apart between the processes, are never saved
///   after   ckpt/best names the best one, with ckpt.keep_best; then those that ckpt.keep_last and ckpt.keep_every do not
///           name either are deleted
/// A full disk or a lost file system is survived until it happened ckpt.max_failed_saves times in a row; the checkpoint
/// of the run's last step must succeed. What it refers to must outlive it.
class Saver {
 public:
  /// carried: null without train.carry_state. run_dir: of the process that leads, which alone writes; "" in the others. The tokenizer's files are read here: what
  /// becomes of them later does not reach the checkpoints.
  Saver(const config::Config& config, std::string run_dir, const models::LanguageModel& model,
        const AdamW& optimizer, const CarriedState* carried, at::Device device, ProcessGroup& group,
        Recorder& recorder);

  /// A warning where the disk has no room for a single checkpoint, of the process that leads.
  void check_free_disk() const;

  /// Saves the step that `counters` name, with the random streams as they stand, unless it is saved already: then it may
  /// have become the best one since. Called by all processes. last: the run ends here. Throws Error: kNonFinite and kPeer for weights as above, kCheckpoint where
  /// the run cannot go on without this checkpoint.
  void save(const TrainerState& counters, bool last);

  /// The run goes on from the checkpoint of this step: puts ckpt/best right, which a crash or a fall back to an earlier
  /// checkpoint has left behind. Of the process that leads.
  void go_on_from(const TrainerState& state);

  /// The step of the last checkpoint; -1: none. A run that resumes has that of the step it starts from.
  int64_t saved_step() const { return saved_step_; }

 private:
  void check_weights(int64_t step);
  void write(TrainerState state, const NamedTensors& optimizer, const NamedTensors& carried,
             bool last);
  void tidy(int64_t best_step);
  bool name_best(int64_t step);
  void survive(int64_t step, const std::string& problem, bool last);
  int64_t checkpoint_bytes() const;

  const config::Config& config_;
  std::string run_dir_;
  TokenizerFiles tokenizer_;
  const models::LanguageModel& model_;
  const AdamW& optimizer_;
  const CarriedState* carried_;
  at::Device device_;
  ProcessGroup& group_;
  Recorder& recorder_;
  int64_t saved_step_ = -1, failed_saves_ = 0, failed_saves_in_a_row_ = 0, failed_step_ = -1;
  bool told_of_no_link_ = false;
};

}  // namespace xlstm::train
