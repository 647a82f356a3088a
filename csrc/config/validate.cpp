#include "csrc/config/validate.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string_view>

#include "csrc/config/schema.h"
#include "csrc/config/schema_fields.h"
#include "csrc/config/text.h"
#include "csrc/config/yaml_reader.h"
#include "csrc/models/model_kinds.h"

namespace xlstm::config {
namespace {

using std::to_string;

// Blames the setting `name`: with its place where one was given.
[[noreturn]] void fail(const Config& config, const std::string& name, const std::string& what) {
  const auto place = config.origin.find(name);
  if (place == config.origin.end()) config_error(name + " (default)", "", what);
  config_error(place->second, name, what);
}

void require(bool condition, const Config& config, const std::string& name,
             const std::string& what) {
  if (!condition) fail(config, name, what);
}

// The value as it would be printed.
std::string value_of(const Config& config, const std::string& name) {
  Config copy = config;
  return format_value(find_field(name)->ref(copy));
}

bool is_default(const Config& config, const std::string& name) {
  return value_of(config, name) == value_of({}, name);
}

void require_defaults(const Config& config, const std::vector<std::string>& names,
                      const std::string& kind) {
  for (const std::string& name : names) {
    require(is_default(config, name), config, name,
            "applies to model.kind " + kind + " only, but the kind is " + config.model.kind +
                "; remove it");
  }
}

std::vector<std::string> settings_below(const std::vector<std::string>& sections_of_kind) {
  std::vector<std::string> names;
  for (const Field& field : schema()) {
    const bool below = std::find(sections_of_kind.begin(), sections_of_kind.end(),
                                 parent_of(field.name)) != sections_of_kind.end();
    if (below) names.push_back(field.name);
  }
  return names;
}

/// Settings that other kinds of models alone have.
void validate_own_settings(const Config& config) {
  for (const models::ModelKind& kind : models::kModelKinds) {
    if (kind.name == config.model.kind) continue;
    for (const std::string_view own : kind.own_settings) {
      const std::string name(own);
      if (name.empty()) continue;
      const bool section = find_section(name) != nullptr;
      require_defaults(config, section ? settings_below({name}) : std::vector<std::string>{name},
                       std::string(kind.name));
    }
  }
}

void validate_slstm_at(const Config& config) {
  const auto& model = config.model;
  std::set<int64_t> seen;
  for (const int64_t position : model.slstm_at) {
    require(position < model.num_blocks, config, "model.slstm_at",
            "position " + to_string(position) + " does not exist, expected 0.." +
                to_string(model.num_blocks - 1) + " (model.num_blocks is " +
                to_string(model.num_blocks) + ")");
    require(seen.insert(position).second, config, "model.slstm_at",
            "position " + to_string(position) + " stands twice; remove one");
  }
}

// Widths that heads and blocks must divide: `what` is named in the message beside the setting that
// decides it.
void require_divisible(const Config& config, const std::string& name, const std::string& what,
                       double width, const std::string& divisor_name, int64_t divisor) {
  const bool divisible = width >= 1 && std::fmod(width, static_cast<double>(divisor)) == 0;
  require(divisible, config, name,
          what + " is " +
              (width == std::floor(width) ? to_string(static_cast<int64_t>(width))
                                          : format_double(width)) +
              ", expected a multiple of " + divisor_name + " " + to_string(divisor));
}

void validate_gates(const Config& config) {
  const auto& mlstm = config.model.mlstm;
  require(mlstm.igate != "fixed" || mlstm.igate_bias_init == "zeros", config,
          "model.mlstm.igate_bias_init",
          "is " + mlstm.igate_bias_init + ", expected zeros for model.mlstm.igate fixed");
  require(
      mlstm.fgate == "fixed" || mlstm.fgate_bias_init == "linspace", config,
      "model.mlstm.fgate_bias_init",
      "is " + mlstm.fgate_bias_init + ", expected linspace for model.mlstm.fgate " + mlstm.fgate);
}

void validate_xlstm(const Config& config) {
  const auto& model = config.model;
  validate_slstm_at(config);
  validate_gates(config);
  if (static_cast<int64_t>(model.slstm_at.size()) == model.num_blocks) return;
  if (model.mlstm.up_projection == "post") {
    for (const char* name : {"model.mlstm.proj_factor", "model.mlstm.round_proj_up_to_multiple_of",
                             "model.mlstm.qkv_proj_blocksize"})
      require(is_default(config, name), config, name,
              "applies to model.mlstm.up_projection pre only; remove it");
    return;
  }
  const auto multiple = static_cast<double>(model.mlstm.round_proj_up_to_multiple_of);
  const double width = model.mlstm.proj_factor * static_cast<double>(model.embedding_dim);
  const double inner = std::ceil(width / multiple) * multiple;
  require_divisible(config, "model.mlstm.proj_factor", "the width of the up-projection", inner,
                    "model.num_heads", model.num_heads);
  require_divisible(config, "model.mlstm.qkv_proj_blocksize", "the width of the up-projection",
                    inner, "this block size", model.mlstm.qkv_proj_blocksize);
}

void validate_xlstm_large(const Config& config) {
  const auto& model = config.model;
  const auto& act_fn = model.feed_forward.act_fn;
  require(is_default(config, "model.feed_forward.act_fn") || act_fn == "silu", config,
          "model.feed_forward.act_fn", "is always silu for model.kind xlstm_large; remove it");
  const auto width = static_cast<double>(model.embedding_dim);
  require_divisible(config, "model.qk_dim_factor", "the width of queries and keys",
                    width * model.qk_dim_factor, "model.num_heads", model.num_heads);
  require_divisible(config, "model.v_dim_factor", "the width of values", width * model.v_dim_factor,
                    "model.num_heads", model.num_heads);
}

/// The models that xLSTM is compared with have few settings of their own.
void validate_baseline(const Config& config) {
  const models::ModelKind& kind = models::kind_named(config.model.kind);
  require_defaults(config, {"model.feed_forward.act_fn"}, "xlstm");
  if (!kind.has_feed_forward)
    require_defaults(config, settings_below({"model.feed_forward"}),
                     "xlstm, xlstm_large, lstm_block, llama, gpt and the linear-attention models");
  const int64_t width = config.model.embedding_dim / config.model.num_heads;
  require(kind.even_heads.empty() || width % 2 == 0, config, "model.num_heads",
          "leaves heads of width " + to_string(width) +
              ", expected an even one: " + std::string(kind.even_heads));
}

void validate_length(const Config& config) {
  const auto& train = config.train;
  if (train.max_steps > 0 && train.max_tokens > 0) {
    fail(config, "train.max_tokens",
         "is " + to_string(train.max_tokens) + " while train.max_steps is " +
             to_string(train.max_steps) + ", expected one of them; set the other to 0");
  }
  if (train.max_steps == 0 && train.max_tokens == 0) {
    fail(config, "train.max_steps",
         "the length of the run is not given; set train.max_steps or train.max_tokens");
  }
  require(train.micro_batch_size == 0 || train.global_batch_size % train.micro_batch_size == 0,
          config, "train.micro_batch_size",
          "is " + to_string(train.micro_batch_size) +
              ", expected a divisor of train.global_batch_size " +
              to_string(train.global_batch_size));
}

/// Samples that are read have the lengths and tokens of their files.
void validate_recorded_task(const Config& config) {
  for (const char* name : {"data.task.vocab_size", "data.task.min_len", "data.task.eval_min_len",
                           "data.task.key_values", "data.task.random_non_queries",
                           "data.task.max_depth", "data.task.max_args"})
    require(is_default(config, name), config, name,
            "applies to tasks whose samples are drawn, but those of data.task.name " +
                config.data.task.name + " are read from files; remove it");
}

/// A state that has one size, and text that goes on.
void validate_carried_state(const Config& config) {
  if (!config.train.carry_state) return;
  require(!xlstm::data::is_given(config.data.task), config, "train.carry_state",
          "expected false with data.task.name " + config.data.task.name +
              ": samples of a task do not go on in one another");
  require(!models::kind_named(config.model.kind).state_grows, config, "train.carry_state",
          "expected false with model.kind " + config.model.kind +
              ", whose state grows with every token");
}

/// Weights come and go with the passes of a block, which are those of a recomputed one.
void validate_sharded_weights(const Config& config) {
  if (!config.train.shard_weights) return;
  require(config.model.activation_checkpointing, config, "train.shard_weights",
          "expected false with model.activation_checkpointing false: a block's weights are there "
          "only while it computes, so that its activations are computed again; set "
          "model.activation_checkpointing=true, or remove it");
  require(config.model.lora.rank == 0, config, "train.shard_weights",
          "expected false with model.lora.rank " + to_string(config.model.lora.rank) +
              ": the weights beside adapters stay whole; model.lora.base=int8 makes them small");
}

/// Segments are as long, and a state of one size goes from one to the next.
void validate_sequence_parallel(const Config& config) {
  const char* const name = "train.sequence_parallel";
  const int64_t segments = config.train.sequence_parallel;
  if (segments == 1) return;
  require(config.data.seq_len % segments == 0, config, name,
          "is " + to_string(segments) + ", expected a divisor of data.seq_len " +
              to_string(config.data.seq_len));
  require(
      !models::kind_named(config.model.kind).state_grows, config, name,
      "expected 1 with model.kind " + config.model.kind + ", whose state grows with every token");
  require(
      !config.train.carry_state, config, name,
      "expected 1 with train.carry_state: the state behind a sequence is in another process than "
      "the one that begins the next");
  require(
      !config.train.shard_weights, config, name,
      "expected 1 with train.shard_weights: processes that are at different blocks cannot collect "
      "the weights of one");
}

void validate_data(const Config& config) {
  const auto& data = config.data;
  const bool text = !data.text.empty(), prepared = !data.train.empty();
  if (xlstm::data::is_given(data.task)) {
    require(!text && !prepared, config, "data.task.name",
            "is given together with " + std::string(text ? "data.text" : "data.train") +
                ", expected one of them");
    require(config.sample.prompts.empty(), config, "sample.prompts",
            "works with text only, but data.task.name is " + data.task.name + "; remove it");
    if (xlstm::data::reads_files(data.task)) validate_recorded_task(config);
    return;
  }
  for (const std::string& name : settings_below({"data.task"})) {
    if (!is_default(config, name))
      fail(config, name, "applies to tasks only; set data.task.name, or remove it");
  }
  require(config.model.input_features == 0, config, "model.input_features",
          "works with a task of real vectors only; remove it");
  if (text && prepared) {
    fail(config, "data.text",
         "is given together with data.train, expected one of them; set data.text=\"\" or "
         "data.train=[]");
  }
  if (!text && !prepared) {
    fail(config, "data.text",
         "nothing to train on; set data.text to a file, folder or glob (or python-stdlib), "
         "data.train to token files, or data.task.name to a task");
  }
  require(text || is_default(config, "data.text_key"), config, "data.text_key",
          "works with data.text; xlstm-data prepare takes --text-key");
  require(text || data.prompt_key.empty(), config, "data.prompt_key",
          "works with data.text; xlstm-data prepare takes --prompt-key");
  require(data.prompt_key.empty() || data.prompt_key != data.text_key, config, "data.prompt_key",
          "is " + data.prompt_key + ", as data.text_key is; expected another key");
  require(text || data.val_text.empty(), config, "data.val_text",
          "works with data.text; with data.train set data.val to a prepared token file");
  require(prepared || data.val.empty(), config, "data.val",
          "works with data.train; with data.text set data.val_text or data.val_fraction");
  require(
      !text || data.tokenizer != "bytes" || config.model.vocab_size >= 256, config,
      "model.vocab_size",
      "is " + to_string(config.model.vocab_size) + ", expected >= 256 for data.tokenizer bytes");
}

// What goes by the held-out loss: there is one, and early enough.
void validate_held_out(const Config& config) {
  const bool judged = config.data.train.empty() || !config.data.val.empty();
  const std::string no_data =
      "goes by the held-out loss, but nothing is held out; set data.val to a prepared token file, "
      "or remove it";
  require(judged || !config.ckpt.keep_best, config, "ckpt.keep_best", no_data);
  require(judged || config.eval.patience == 0, config, "eval.patience", no_data);
  require(config.eval.every > 0 || config.eval.patience == 0, config, "eval.patience",
          "counts evaluations, but eval.every 0 evaluates at the end alone; set eval.every, or "
          "remove it");
}

bool is_override(const Config& config, const std::string& name) {
  const auto place = config.origin.find(name);
  return place != config.origin.end() && place->second.starts_with("override ");
}

// Whether `name` must fit into the run: not where the command line cuts a complete run short
// (train.max_steps=3 to try it), which is no contradiction in the file.
bool must_fit_run(const Config& config, const std::string& name) {
  const bool cut =
      is_override(config, "train.max_steps") || is_override(config, "train.max_tokens");
  return !cut || is_override(config, name);
}

void validate_schedule(const Config& config) {
  const auto& optim = config.optim;
  const int64_t steps = total_steps(config);
  require(optim.schedule == "constant" || optim.min_lr <= optim.learning_rate, config,
          "optim.min_lr",
          "is " + format_double(optim.min_lr) + ", expected at most optim.learning_rate " +
              format_double(optim.learning_rate));
  require(optim.warmup_steps <= steps || !must_fit_run(config, "optim.warmup_steps"), config,
          "optim.warmup_steps",
          "is " + to_string(optim.warmup_steps) + ", expected at most the " + to_string(steps) +
              " steps of the run; one that is cut short has its steps on the command line");
  require(optim.schedule == "cosine" || optim.restarts == 0, config, "optim.restarts",
          "applies to optim.schedule cosine only, but the schedule is " + optim.schedule +
              "; remove it");
  require(optim.restarts < std::max<int64_t>(1, steps - optim.warmup_steps) ||
              !must_fit_run(config, "optim.restarts"),
          config, "optim.restarts",
          "is " + to_string(optim.restarts) + ", expected less than " +
              to_string(steps - optim.warmup_steps) + ", the steps after the warm-up");
  require(
      optim.schedule == "wsd" || optim.decay_steps == 0, config, "optim.decay_steps",
      "applies to optim.schedule wsd only, but the schedule is " + optim.schedule + "; remove it");
  require(
      optim.decay_steps <= steps - optim.warmup_steps || !must_fit_run(config, "optim.decay_steps"),
      config, "optim.decay_steps",
      "is " + to_string(optim.decay_steps) + ", expected at most " +
          to_string(steps - optim.warmup_steps) + ", the steps after the warm-up");
}

}  // namespace

void validate_model(const Config& config) {
  const auto& model = config.model;
  if (models::kind_named(model.kind).has_heads)
    require_divisible(config, "model.embedding_dim", "the width",
                      static_cast<double>(model.embedding_dim), "model.num_heads", model.num_heads);
  require(model.input_features == 0 || !model.tie_weights, config, "model.tie_weights",
          "expected false with model.input_features: there is no embedding");
  require(model.input_features == 0 || model.embedding_init_std == 0, config,
          "model.embedding_init_std",
          "expected 0 with model.input_features: there is no embedding");
  validate_own_settings(config);
  require(model.lora.rank > 0 || model.lora.base == "float32", config, "model.lora.base",
          "is " + model.lora.base +
              ", but model.lora.rank 0 makes no adapters, beside which weights are kept so; set "
              "model.lora.rank, or remove it");
  require(model.state_size % 2 == 0, config, "model.state_size",
          "is " + to_string(model.state_size) + ", expected an even number");
  if (model.kind == "xlstm") {
    validate_xlstm(config);
  } else if (model.kind == "xlstm_large") {
    validate_xlstm_large(config);
  } else {
    validate_baseline(config);
  }
}

void validate_tokens(const Config& config) {
  const int64_t steps = config.train.max_steps, per_step = tokens_per_step(config);
  require(steps == 0 || per_step <= kMaxTokens / steps, config, "train.max_steps",
          "is " + to_string(steps) + ", with " + to_string(per_step) +
              " tokens per step (train.global_batch_size * data.seq_len) more than the " +
              to_string(kMaxTokens) + " tokens that a run may have");
}

void warn_of_settings_without_effect(const Config& config,
                                     const std::function<void(const std::string&)>& warn) {
  std::vector<std::string> found;
  for (const Field& field : schema()) {
    const Condition& has_effect = field.has_effect;
    if (has_effect.holds == nullptr || has_effect.holds(config) || is_default(config, field.name))
      continue;
    found.push_back(field.name + "=" + value_of(config, field.name) + " (" +
                    std::string(has_effect.otherwise) + ")");
  }
  if (!found.empty()) warn("settings without effect: " + join(found, ", "));
}

void validate_for_training(const Config& config) {
  const std::string& name = config.run.name;
  require(name.find('/') == std::string::npos && name != "." && name != "..", config, "run.name",
          "got " + in_quotes(name) + ", expected a folder name; put the path into run.out_dir");
  validate_length(config);
  validate_data(config);
  validate_held_out(config);
  validate_carried_state(config);
  validate_sharded_weights(config);
  validate_sequence_parallel(config);
  validate_schedule(config);
}

}  // namespace xlstm::config
