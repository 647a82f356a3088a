#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "csrc/config/config.h"
#include "train/checkpoint.h"

namespace xlstm::train {

/// out_dir/name.
std::string run_path(const config::RunConfig& run);

/// The folder of a run, run_path, owned by this process for as long as the object lives:
///   run.json  config.yaml  run.log  metrics.jsonl  samples.jsonl
///   tensorboard/  loss.png  ckpt/step-.../  lock
class RunFolder {
 public:
  /// Creates the folder, proves that it can be written, and locks it. fresh: what it holds is moved
  /// aside to <name>.old-N first. Throws Error(kCheckpoint) when it cannot be written, when another
  /// process trains there (with its pid), or when it holds files of something else than a run.
  RunFolder(const config::RunConfig& run, bool fresh);

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  /// True when the folder held a run already.
  bool held_run() const { return held_run_; }
  /// Where --fresh moved the old contents; "" where nothing was moved.
  const std::string& moved_to() const { return moved_to_; }

 private:
  void create_and_lock();
  void probe() const;
  std::string path_, moved_to_;
  bool held_run_ = false;
  struct Lock {
    Lock() = default;
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    ~Lock() { release(); }
    void release();
    int fd = -1;
  } lock_;
};

/// Free bytes for this user on the file system that holds `path`; -1 when unknown.
int64_t free_disk_bytes(const std::string& path);

/// Writes <run>/run.json (command, folder, versions, host, threads, time, first weights, configuration) and
/// <run>/config.yaml. first_weights: the checkpoint whose weights the run began with; "": its own.
void write_run_header(const RunFolder& folder, const config::Config& config,
                      const std::string& command, int64_t num_parameters,
                      const std::string& first_weights);
/// What the run's header says of them; "" where there is none.
std::string recorded_first_weights(const RunFolder& folder);
/// The folder in which the run of a checkpoint was started, where the relative paths of its settings begin; "" where that
/// is not known or not there any more.
std::string recorded_start_folder(const std::string& checkpoint);

/// The checkpoint to go on from by config.run.resume, its hashes verified where ckpt.verify_on_load;
/// nothing: start at step 0. "auto" falls back past bad checkpoints with a warning that names the bad file.
/// Throws Error(kCheckpoint) when every checkpoint is bad, the named one is missing or bad, or
/// "never" meets a run.
std::optional<CheckpointFolder> choose_checkpoint(const RunFolder& folder,
                                                  const config::Config& config);

/// Step of a checkpoint folder named "step-00001000"; -1 for other names.
int64_t checkpoint_step(const std::string& folder);

/// Moves checkpoints beyond `step` to <run>/ckpt-old-N: the run is about to write those steps anew.
void set_aside_later_checkpoints(const RunFolder& folder, int64_t step);

/// Throws Error(kConfig) naming the first setting that must not change when a run goes on, which the
/// schema says (config::Field::identity). `saved_in`: the checkpoint, for the message.
void check_same_run(const config::Config& now, const config::Config& saved,
                    const std::string& saved_in);

}  // namespace xlstm::train
