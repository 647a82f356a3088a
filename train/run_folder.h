#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "csrc/config/config.h"
#include "train/checkpoint.h"

namespace xlstm::train {

struct TrainingData;

/// out_dir/name.
std::string run_path(const config::RunConfig& run);

/// Whether a start finds a run in the folder that it has to go on with; creates nothing. fresh: it does not look for one.
/// Throws Error: kConfig where `fresh` and a named checkpoint exclude each other; kCheckpoint where the folder is a file,
/// its ckpt is none, or it holds files of something else.
bool finds_run(const config::RunConfig& run, bool fresh);

/// The folder of a run, run_path, owned by this process for as long as the object lives:
///   run.json  config.yaml  run.log  metrics.jsonl  samples.jsonl
///   tensorboard/  loss.png  ckpt/step-.../  ckpt/best  lock
class RunFolder {
 public:
  /// Creates the folder, proves that it can be written, and locks it. fresh: start_over() follows, once everything else
  /// that can fail has not. Throws what finds_run() does, and Error(kCheckpoint) when it cannot be written, or when another
  /// process trains there (with its pid).
  RunFolder(const config::RunConfig& run, bool fresh);
  /// Moves what the folder holds, if anything, aside to <name>.old-N, which is returned, and owns an empty one.
  std::string start_over();

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  /// True when the folder held a run already.
  bool held_run() const { return held_run_; }

 private:
  void create_and_lock();
  void probe() const;
  bool lock_is_in_place() const;
  std::string path_;
  bool held_run_ = false;
  struct Lock {
    Lock() = default;
    Lock(Lock&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
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
/// nothing: start at step 0. held_run: what the run's folder held before this start. "auto" falls back past bad
/// checkpoints with a warning that names the bad file, and so does "step-N" where the last start had these very settings:
/// this one repeats it, to go on with what that made. Throws Error(kCheckpoint) when every checkpoint is bad, the named one
/// is missing or bad, or "never" meets a run.
std::optional<CheckpointFolder> choose_checkpoint(const config::Config& config, bool held_run);

/// Moves checkpoints beyond `step` to <run>/ckpt/old-N: the run is about to write those steps anew. Within ckpt/, which may
/// be a link to another disk. What was never committed stays for prune_checkpoints. Throws Error(kCheckpoint) where that fails.
void set_aside_later_checkpoints(const RunFolder& folder, int64_t step);

/// Throws Error(kConfig) naming the first setting that must not change when a run goes on, which the
/// schema says (config::Field::identity). `saved_in`: the checkpoint, for the message.
void check_same_run(const config::Config& now, const config::Config& saved,
                    const std::string& saved_in);

/// The counters of a checkpoint to go on from, where settings and training data are those of its run; data.train takes over
/// the order of its samples. The run's metrics tell of an evaluation of this step after it was saved. Says on the log where
/// the held-out set is another one: then the lowest loss is looked for anew, as with other eval.batches. Throws Error: kConfig naming what
/// differs, kCheckpoint where it is a model alone.
TrainerState state_to_go_on(const CheckpointFolder& checkpoint, const config::Config& config,
                            TrainingData& data);

/// Whether nothing is left to train: its last step is done, or eval.patience is at its end.
bool is_finished(const config::Config& config, const TrainerState& state);

/// The settings that are not what they were when step `step` was saved, and the learning rates of that step and the next one,
/// for people; "" where none is. Of a run's name, its machine and its logs nothing is said.
std::string changed_settings(const config::Config& now, const config::Config& saved, int64_t step);

/// What the processes of a run must agree on and this one does not: "" or the first setting with its two values. What
/// config::Field::per_machine says is each process's own. leader: the settings of process 0.
std::string differing_setting(const config::Config& own, const config::Config& leader);

}  // namespace xlstm::train
