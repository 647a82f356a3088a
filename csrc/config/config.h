#pragma once
// Every setting of a run as plain values with their defaults. The schema (schema.h) gives each one
// its dotted name, type, range and description; YAML files and command-line overrides are checked
// against it.
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "csrc/data/task_options.h"
#include "csrc/models/model_options.h"

namespace xlstm::config {

struct RunConfig {
  std::string name = "run";
  std::string out_dir = "runs";  ///< the run's folder is out_dir/name
  int64_t seed = 42;
  std::string resume = "auto";  ///< "auto": newest good checkpoint | "never" | "step-N"
  std::string device = "auto";  ///< "auto" | "cpu" | "cuda"
  int64_t num_threads = 0;      ///< 0: all cores
};

struct DataSource {
  std::string path;  ///< prefix of .bin/.idx
  double weight = 1.0;
};

struct DataConfig {
  /// File, folder or glob of text to prepare on the fly into the cache, or "python-stdlib": the
  /// sources of Python's standard library; "": none.
  std::string text;
  std::string val_text;            ///< held-out text; "": a split of `text`
  double val_fraction = 0.1;       ///< held-out share of `text` when val_text is empty
  std::string val_split = "tail";  ///< how: "tail": the end of each file | "file": whole files
  std::string text_key = "text";   ///< of JSONL: a line's text stands there
  std::string prompt_key;          ///< of JSONL: what stands before the text, uncounted; "": none
  std::string cache_dir;           ///< "": $XDG_CACHE_HOME/libxlstm or ~/.cache/libxlstm
  std::vector<DataSource> train;   ///< prepared token files, mixed by weight
  std::string val;                 ///< prepared held-out token file
  /// "bytes" | path of tokenizer.json | folder with vocab.json and merges.txt
  std::string tokenizer = "bytes";
  int64_t seq_len = 256;
  bool shuffle = true;
  int64_t shuffle_seed = 1234;
  bool reset_state_at_document = true;
  bool mask_loss_across_documents = true;
  std::string verify = "sizes";  ///< "none" | "sizes" | "sha256"
  data::TaskOptions task;        ///< instead of text and token files
};

struct TrainConfig {
  int64_t global_batch_size = 16;  ///< sequences per optimizer step
  int64_t micro_batch_size = 0;    ///< sequences per forward pass; 0: global_batch_size
  int64_t max_steps = 0;           ///< exactly one of max_steps and max_tokens is positive
  int64_t max_tokens = 0;
  double grad_clip = 1.0;          ///< global norm; 0: off
  std::string dtype = "float32";   ///< "float32" | "bfloat16" (autocast; weights stay float32)
  std::string nonfinite = "stop";  ///< "stop" | "skip": what a non-finite loss or gradient does
  bool cuda_graph = true;          ///< on a GPU: record the step once, then replay it
  /// Each sequence of a batch goes on where that of the batch before ended, with its state.
  bool carry_state = false;
  int64_t sequence_parallel = 1;  ///< processes that have a segment of each sequence
  bool shard_weights = false;     ///< several processes: each holds its part of the blocks' weights
  std::string init_from;          ///< run or checkpoint whose weights a new run has; "": it draws
};

struct OptimConfig {
  double learning_rate = 1e-3;
  double min_lr = 1e-4;
  std::string schedule = "cosine";  ///< "cosine" | "linear" | "constant" | "wsd"
  int64_t warmup_steps = 100;
  int64_t restarts = 0;     ///< cosine: times it starts again at the full rate
  int64_t decay_steps = 0;  ///< wsd: length of the final decay; 0: a tenth of the run
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  bool weight_decay_on_embedding = false;
  bool shard = false;  ///< several processes: each holds its part of the moments alone
};

struct CheckpointConfig {
  int64_t every = 500;  ///< steps; 0: only at the end and on signals
  int64_t keep_last = 3;
  int64_t keep_every = 0;  ///< checkpoints at multiples of this are never deleted; 0: none
  bool keep_best = false;  ///< that of the lowest held-out loss is saved, kept, and named ckpt/best
  bool verify_on_load = true;
  int64_t max_failed_saves = 3;  ///< failed saves in a row before the run stops with exit status 4
};

struct EvalConfig {
  int64_t every = 500;   ///< steps; 0: only at the end
  int64_t batches = 0;   ///< batches of global_batch_size held-out sequences; 0: the whole set
  int64_t patience = 0;  ///< evaluations without a lower loss after which the run ends; 0: off
};

struct SampleConfig {
  int64_t every = 0;                 ///< steps; 0: only at the end
  std::vector<std::string> prompts;  ///< none: no samples
  int64_t max_new_tokens = 256;
  double temperature = 0.8;
  int64_t top_k = 0;
  double top_p = 1.0;
};

struct LogConfig {
  int64_t every = 10;            ///< steps
  std::string console = "auto";  ///< "auto": bar on a terminal | "bar" | "plain" | "off"
  bool tensorboard = true;
  bool plot = true;  ///< loss.png at the end
};

struct Config {
  RunConfig run;
  models::ModelOptions model;
  DataConfig data;
  TrainConfig train;
  OptimConfig optim;
  CheckpointConfig ckpt;
  EvalConfig eval;
  SampleConfig sample;
  LogConfig log;
  /// Where each given setting came from ("file:line", "override 'a.b=1'"), by dotted name; for
  /// messages only.
  std::map<std::string, std::string> origin;
};

/// Optimizer steps of a training run: max_steps, or the least number that consumes max_tokens.
int64_t total_steps(const Config& config);
/// Tokens of a step's whole batch, whatever number of processes shares it.
int64_t tokens_per_step(const Config& config);

/// Reads a YAML file, its `base:` files first (a path or a list, relative to the file), then the
/// overrides ("train.max_steps=100", value in YAML). Throws Error(kConfig) with file:line (or the
/// override) for unknown and duplicate keys (with a suggestion), wrong types, values out of range,
/// and model sizes that do not fit together. What only a training run needs is checked by
/// validate_for_training, so that other programs read incomplete files. An override of a text
/// setting is taken literally unless it is quoted.
Config load_config(const std::string& path, const std::vector<std::string>& overrides = {});
/// The same from a string; `name` stands for the file in messages.
Config parse_config(const std::string& yaml, const std::string& name);
/// Throws Error(kConfig) naming the setting (and its file:line) when a training run is not fully or
/// not consistently described: length, batches, data, schedule. A length given as an override may be
/// shorter than the warm-up of the file.
void validate_for_training(const Config& config);
/// Tells `warn`, at most once, of the settings that are not as they are by default and have no effect in this model.
void warn_of_settings_without_effect(const Config& config,
                                     const std::function<void(const std::string&)>& warn);
/// Every setting with its value, as YAML that load_config reads back to an equal Config.
std::string print_config(const Config& config);
/// Every setting: dotted name, type, default, range or choices, and what it does.
std::string config_help();
/// The schema as JSON Schema, for other languages and for editors.
std::string config_schema_json();

}  // namespace xlstm::config
