#include "csrc/config/schema.h"

#include "csrc/data/tokenizer_spec.h"
#include "csrc/models/model_kinds.h"

namespace xlstm::config {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();  // sizes of tensors' axes

Limits any() { return {}; }
Limits integers(int64_t low, int64_t high = kMaxInt) {
  Limits limits;
  limits.int_low = low;
  limits.int_high = high;
  return limits;
}
Limits zero_or_integers(int64_t low, int64_t high) {
  Limits limits = integers(low, high);
  limits.or_zero = true;
  return limits;
}
Limits at_least(double low) {
  Limits limits;
  limits.low = low;
  return limits;
}
Limits above(double low) {
  Limits limits = at_least(low);
  limits.low_open = true;
  return limits;
}
Limits above_up_to(double low, double high) {
  Limits limits = above(low);
  limits.high = high;
  return limits;
}
Limits at_least_below(double low, double high) {
  Limits limits = at_least(low);
  limits.high = high;
  limits.high_open = true;
  return limits;
}
Limits between(double low, double high) {
  Limits limits = at_least_below(low, high);
  limits.low_open = true;
  return limits;
}
Limits text() {
  Limits limits;
  limits.not_empty = true;
  return limits;
}
Limits one_of(std::vector<std::string> choices) {
  Limits limits;
  limits.choices = std::move(choices);
  return limits;
}

std::vector<std::string> kind_choices() {
  std::vector<std::string> choices;
  for (const models::ModelKind& kind : models::kModelKinds) choices.emplace_back(kind.name);
  return choices;
}

std::vector<std::string> task_choices() {
  std::vector<std::string> choices = data::task_names();
  choices.insert(choices.begin(), "none");
  return choices;
}

/// A run that goes on may have another value: it changes rounding, memory or time alone, or first weights.
Field may_change(Field field) {
  field.identity = false;
  return field;
}
/// What else but the model makes a run what it is.
Field identity(Field field) {
  field.identity = true;
  return field;
}

// The name is the member's own path, so that the two cannot differ.
#define XLSTM_FIELD(member, limits, doc)                                                           \
  Field {                                                                                          \
#member,                                                                                       \
        [](Config &                                                                                \
           config) -> FieldRef { return &config.member; }, limits, doc,                            \
                                                        std::string(#member).starts_with("model.") \
  }

std::vector<Field> run_fields() {
  return {
      XLSTM_FIELD(run.name, text(), "name of the run's folder, which is out_dir/name"),
      XLSTM_FIELD(run.out_dir, text(), "folder of all runs"),
      XLSTM_FIELD(run.seed, integers(0), "seed of initialisation, dropout and sampling"),
      XLSTM_FIELD(run.resume, one_of({"auto", "never", "step-N"}),
                  "auto: go on from the newest good checkpoint of the run's folder"),
      XLSTM_FIELD(run.device, one_of({"auto", "cpu", "cuda"}),
                  "where to compute; auto: a GPU where there is one"),
      XLSTM_FIELD(run.num_threads, integers(0, 4096), "CPU threads; 0: all cores"),
  };
}

/// All of them identities of a run, unless it is said beside one that it may change.
std::vector<Field> model_fields() {
  return {
      XLSTM_FIELD(
          model.kind, one_of(kind_choices()),
          "xlstm: blocks of arXiv 2405.04517; xlstm_large: the 7B block of arXiv 2503.13427; the "
          "others: what they are compared with"),
      XLSTM_FIELD(model.vocab_size, integers(1, kMaxSize), "token ids are 0 .. vocab_size-1"),
      XLSTM_FIELD(model.input_features, integers(0, kMaxSize),
                  "reads real vectors of this width instead of tokens, as the tasks nns and "
                  "rgb_image ask for; predicts one number if vocab_size is 1; 0: tokens"),
      XLSTM_FIELD(model.embedding_dim, integers(1, kMaxSize), "width of the residual stream"),
      XLSTM_FIELD(model.num_blocks, integers(1, 10000), "residual blocks"),
      XLSTM_FIELD(model.num_heads, integers(1, 65536), "heads of every cell"),
      XLSTM_FIELD(model.tie_weights, any(), "the output head shares the embedding's weight"),
      may_change(XLSTM_FIELD(model.embedding_init_std, at_least(0),
                             "standard deviation of the embedding's first weights; 0: "
                             "sqrt(2 / (5 embedding_dim))")),
      XLSTM_FIELD(model.output_logit_soft_cap, at_least(0), "c in c*tanh(logits/c); 0: none"),
      XLSTM_FIELD(model.dropout, at_least_below(0, 1),
                  "probability of dropping a value in training"),
      XLSTM_FIELD(model.add_embedding_dropout, any(), "dropout behind the embedding too"),
      XLSTM_FIELD(model.add_out_norm, any(), "norm after the last block"),
      XLSTM_FIELD(model.norm_eps, above(0), "epsilon of all norms"),
      may_change(XLSTM_FIELD(model.activation_checkpointing, any(),
                             "recompute each block in the backward pass: less memory, more time")),
      may_change(XLSTM_FIELD(
          model.chunk_size, integers(0, 65536),
          "length of an mLSTM chunk; 0: automatic; never changes the result beyond rounding")),
      may_change(XLSTM_FIELD(
          model.fused, any(),
          "false: convolution, SiLU, norm, skip, gate, head and loss one after the other "
          "instead of in fused operators, to compare with; all logits are held; "
          "changes the result by rounding alone")),
      XLSTM_FIELD(model.mlstm_eps, at_least(0), "epsilon of the mLSTM normaliser"),
      XLSTM_FIELD(model.max_positions, integers(1, kMaxSize),
                  "kind gpt: learned positions, the longest sequence"),
      XLSTM_FIELD(model.state_size, integers(2, 65536),
                  "kind h3: states of each SSM, an even number (embedding_dim^2 / num_heads "
                  "sequences go through them)"),
      XLSTM_FIELD(model.filter_length, integers(1, kMaxSize),
                  "kind hyena: the filter's unit of time in tokens, as long as what it is trained "
                  "on; longer sequences work"),
      XLSTM_FIELD(model.slstm_at, integers(0, 9999),
                  "kind xlstm: 0-based positions of the sLSTM blocks"),
      XLSTM_FIELD(model.bias, any(),
                  "kind xlstm: biases of all up- and down-projections and of q, k, v"),
      XLSTM_FIELD(model.qk_dim_factor, above_up_to(0, 1000),
                  "kind xlstm_large: width of queries and keys / embedding_dim"),
      XLSTM_FIELD(model.v_dim_factor, above_up_to(0, 1000),
                  "kind xlstm_large: width of values / embedding_dim"),
      XLSTM_FIELD(model.gate_soft_cap, at_least(0),
                  "kind xlstm_large: soft cap of the gates' pre-activations; 0: none"),
      XLSTM_FIELD(
          model.mlstm.up_projection, one_of({"pre", "post"}),
          "pre: the block widens in front of the cell; post: q, k, v, o at embedding_dim by "
          "full matrices, and a feed-forward layer behind"),
      XLSTM_FIELD(model.mlstm.proj_factor, above_up_to(0, 1000),
                  "width of the up-projection / embedding_dim"),
      XLSTM_FIELD(model.mlstm.round_proj_up_to_multiple_of, integers(1, kMaxSize),
                  "that width is rounded up to this"),
      XLSTM_FIELD(model.mlstm.conv1d_kernel_size, zero_or_integers(2, 8),
                  "window of the causal convolution; 0: no convolution"),
      XLSTM_FIELD(model.mlstm.qkv_proj_blocksize, integers(1, kMaxSize),
                  "block size of the block-diagonal projections to q, k and v"),
      XLSTM_FIELD(model.mlstm.input_gate, one_of({"exp", "sigmoid"}),
                  "activation of the input gate"),
      XLSTM_FIELD(model.mlstm.normalize, any(), "divide by the normaliser state"),
      XLSTM_FIELD(model.mlstm.igate, one_of({"input", "bias", "fixed"}),
                  "input gate before its activation: input: W x + b; bias: b, learned; fixed: b as "
                  "it starts"),
      XLSTM_FIELD(model.mlstm.igate_bias_init, one_of({"normal", "zeros"}),
                  "its b: normal: N(0, 0.1^2); zeros (the one that fixed takes)"),
      XLSTM_FIELD(model.mlstm.fgate, one_of({"input", "bias", "fixed"}),
                  "forget gate before its sigmoid, as igate"),
      XLSTM_FIELD(
          model.mlstm.fgate_bias_init, one_of({"linspace", "open"}),
          "its b: linspace: 3 to 6 over the heads; open: nothing is forgotten (fixed only)"),
      XLSTM_FIELD(model.slstm.conv1d_kernel_size, zero_or_integers(2, 8),
                  "window of the causal convolution; 0: no convolution"),
      XLSTM_FIELD(model.slstm.cell, one_of({"slstm", "slstm_expf", "lstm"}),
                  "slstm; slstm_expf: exponential forget gate; lstm: the classic cell"),
      XLSTM_FIELD(
          model.slstm.gate_proj, one_of({"headwise", "dense"}),
          "matrices from the input to the four gates: headwise: block-diagonal; dense: full"),
      may_change(XLSTM_FIELD(model.slstm.bias_init,
                             one_of({"powerlaw_blockdependent", "small_init", "zeros", "standard"}),
                             "initialisation of the forget gate's bias")),
      may_change(XLSTM_FIELD(model.slstm.recurrent_weight_init, one_of({"zeros", "standard"}),
                             "initialisation of the recurrent weights")),
      may_change(
          XLSTM_FIELD(model.slstm.recompute, any(),
                      "compute the gates again in the backward pass: same values, less memory with "
                      "bfloat16, more time")),
      XLSTM_FIELD(model.slstm.recurrent_clip, at_least(0),
                  "bound of every entry of the gradient that flows back through the recurrent "
                  "weights into the previous output (often 10); 0: none"),
      XLSTM_FIELD(model.slstm.recurrent_cut, any(),
                  "no gradient flows back through the recurrent weights (they still learn)"),
      XLSTM_FIELD(model.feed_forward.proj_factor, above_up_to(0, 1000),
                  "width of the feed-forward layer / embedding_dim"),
      XLSTM_FIELD(model.feed_forward.round_up_to_multiple_of, integers(1, kMaxSize),
                  "that width is rounded up to this"),
      XLSTM_FIELD(model.feed_forward.act_fn, one_of({"gelu", "silu", "relu", "relu2"}),
                  "kind xlstm: activation (the others have a fixed one); relu2: ReLU squared"),
      XLSTM_FIELD(model.feed_forward.gated, any(),
                  "kind xlstm: act(gate) * up in front of the last matrix; false: act(up)"),
  };
}

std::vector<Field> data_fields() {
  return {
      XLSTM_FIELD(data.text, any(),
                  "text to train on, prepared on the fly: file, folder, glob, or python-stdlib "
                  "(the sources of Python's "
                  "standard library); empty: data.train is used"),
      XLSTM_FIELD(data.val_text, any(), "held-out text; empty: a part of data.text"),
      XLSTM_FIELD(data.val_fraction, between(0, 1),
                  "held-out share of data.text when val_text is empty"),
      XLSTM_FIELD(data.val_split, one_of({"tail", "file"}),
                  "tail: the end of each file; file: whole files"),
      XLSTM_FIELD(data.cache_dir, any(),
                  "prepared text; empty: $XDG_CACHE_HOME/libxlstm or ~/.cache/libxlstm"),
      XLSTM_FIELD(data.train, above(0),
                  "prepared token files (prefixes of .bin/.idx), mixed by weight"),
      XLSTM_FIELD(data.val, any(), "prepared held-out token file (prefix of .bin/.idx)"),
      XLSTM_FIELD(data.tokenizer, text(), data::kTokenizerSpecs),
      identity(XLSTM_FIELD(data.seq_len, integers(1, kMaxSize), "tokens per training sequence")),
      identity(XLSTM_FIELD(data.shuffle, any(),
                           "visit the sequences in random order, new in each epoch")),
      identity(XLSTM_FIELD(data.shuffle_seed, integers(0),
                           "seed of that order, and of a task's samples")),
      identity(XLSTM_FIELD(data.reset_state_at_document, any(),
                           "empty the state where a document starts")),
      identity(XLSTM_FIELD(data.mask_loss_across_documents, any(),
                           "never predict the first token of the next document")),
      XLSTM_FIELD(data.verify, one_of({"none", "sizes", "sha256"}),
                  "check of the token files at the start"),
      XLSTM_FIELD(data.task.name, one_of(task_choices()),
                  "task to train on instead of text: synthetic, or read from data.task.path"),
      XLSTM_FIELD(data.task.vocab_size, integers(0, kMaxSize),
                  "tokens of the task, padding included; 0: the paper's"),
      XLSTM_FIELD(
          data.task.min_len, zero_or_integers(2, kMaxSize),
          "formal languages, listops: tokens of the shortest sample, answers included; 0: 3, or "
          "what the task needs (listops 502); the longest has data.seq_len"),
      XLSTM_FIELD(data.task.key_values, integers(1, kMaxSize),
                  "mqar: pairs of key and value before the queries"),
      XLSTM_FIELD(data.task.random_non_queries, any(),
                  "mqar: what stands between the queries; true: random tokens, as Zoology has by "
                  "default; false: token 0, as in the paper"),
      XLSTM_FIELD(data.task.max_depth, integers(2, 1000),
                  "listops: nodes from the root down to the deepest one"),
      XLSTM_FIELD(data.task.max_args, integers(2, 1000),
                  "listops: most arguments of an operator; the fewest are 2"),
      XLSTM_FIELD(data.task.path, any(),
                  "image, rgb_image, retrieval, pathfinder: folder of the data set's files"),
      XLSTM_FIELD(data.task.train_samples, integers(0),
                  "samples of an epoch; 0: fresh ones for ever, or all of the files"),
      XLSTM_FIELD(data.task.held_out, one_of({"test", "validation"}),
                  "which samples are held out; validation: others than the test's, to choose "
                  "settings by (image, rgb_image: the last tenth of those that train)"),
      XLSTM_FIELD(data.task.eval_samples, integers(1),
                  "held-out samples; of files at most those there are"),
      XLSTM_FIELD(data.task.eval_min_len, integers(0, kMaxSize),
                  "shortest held-out sample; 0: min_len"),
      XLSTM_FIELD(data.task.eval_len, integers(0, kMaxSize),
                  "longest held-out sample; 0: data.seq_len"),
  };
}

std::vector<Field> training_fields() {
  return {
      identity(XLSTM_FIELD(train.global_batch_size, integers(1, kMaxSize),
                           "sequences per optimizer step")),
      XLSTM_FIELD(train.micro_batch_size, integers(0, kMaxSize),
                  "sequences per forward pass, a divisor of global_batch_size; 0: all of them"),
      XLSTM_FIELD(train.max_steps, integers(0),
                  "optimizer steps of the run; 0: max_tokens says it"),
      XLSTM_FIELD(train.max_tokens, integers(0), "tokens of the run; 0: max_steps says it"),
      XLSTM_FIELD(train.grad_clip, at_least(0), "largest global norm of the gradient; 0: off"),
      XLSTM_FIELD(train.dtype, one_of({"float32", "bfloat16"}),
                  "bfloat16: autocast, the weights stay float32"),
      XLSTM_FIELD(train.nonfinite, one_of({"stop", "skip"}),
                  "what a loss or gradient that is not finite does"),
      XLSTM_FIELD(train.cuda_graph, any(),
                  "on a GPU: record the training step once as a CUDA graph, then replay it"),
      XLSTM_FIELD(
          train.init_from, any(),
          "folder of a run or checkpoint whose weights a new run starts with; empty: drawn"),
      XLSTM_FIELD(optim.learning_rate, above(0), "peak learning rate of AdamW"),
      XLSTM_FIELD(optim.min_lr, at_least(0), "learning rate at the end of the schedule"),
      XLSTM_FIELD(optim.schedule, one_of({"cosine", "linear", "constant", "wsd"}),
                  "after the warm-up; wsd: constant, then a linear decay over decay_steps"),
      XLSTM_FIELD(optim.warmup_steps, integers(0), "steps of linear warm-up"),
      XLSTM_FIELD(optim.restarts, integers(0, 1000000),
                  "cosine: times it starts again at learning_rate, after equal numbers of steps"),
      XLSTM_FIELD(optim.decay_steps, integers(0),
                  "wsd: length of the final decay; 0: a tenth of the run"),
      XLSTM_FIELD(optim.beta1, at_least_below(0, 1), "decay of the mean of the gradient"),
      XLSTM_FIELD(optim.beta2, at_least_below(0, 1), "decay of the mean of its square"),
      XLSTM_FIELD(optim.eps, above(0), "epsilon of AdamW"),
      XLSTM_FIELD(optim.weight_decay, at_least(0), "decoupled weight decay of matrices"),
      XLSTM_FIELD(optim.weight_decay_on_embedding, any(), "decay the embedding too"),
      XLSTM_FIELD(optim.shard, any(),
                  "several processes: each holds an equal part of the optimizer's state and sends "
                  "what it has updated to the others"),
  };
}

std::vector<Field> output_fields() {
  return {
      XLSTM_FIELD(ckpt.every, integers(0),
                  "steps between checkpoints; 0: only at the end and on signals"),
      XLSTM_FIELD(ckpt.keep_last, integers(1), "newest checkpoints that are kept"),
      XLSTM_FIELD(ckpt.keep_every, integers(0),
                  "checkpoints at multiples of this are never deleted; 0: none"),
      XLSTM_FIELD(ckpt.verify_on_load, any(), "check the sha256 of every file"),
      XLSTM_FIELD(ckpt.max_failed_saves, integers(1),
                  "failed saves in a row before the run stops with status 4"),
      XLSTM_FIELD(eval.every, integers(0), "steps between evaluations; 0: only at the end"),
      XLSTM_FIELD(eval.batches, integers(0),
                  "batches of micro_batch_size held-out sequences; 0: the whole set"),
      XLSTM_FIELD(sample.every, integers(0), "steps between samples; 0: only at the end"),
      XLSTM_FIELD(sample.prompts, text(), "texts to continue; none: no samples"),
      XLSTM_FIELD(sample.max_new_tokens, integers(1, kMaxSize), "tokens per sample"),
      XLSTM_FIELD(sample.temperature, at_least(0), "0: always the likeliest token"),
      XLSTM_FIELD(sample.top_k, integers(0, kMaxSize),
                  "choose among this many likeliest tokens; 0: all"),
      XLSTM_FIELD(sample.top_p, above_up_to(0, 1),
                  "choose among the likeliest tokens of this total probability"),
      XLSTM_FIELD(log.every, integers(1), "steps between lines and records of metrics"),
      XLSTM_FIELD(log.console, one_of({"auto", "bar", "plain", "off"}),
                  "auto: a bar on a terminal, else plain lines"),
      XLSTM_FIELD(log.tensorboard, any(), "write TensorBoard event files"),
      XLSTM_FIELD(log.plot, any(), "draw loss.png at the end"),
  };
}

#undef XLSTM_FIELD

}  // namespace

const std::vector<Field>& schema() {
  static const std::vector<Field> fields = [] {
    std::vector<Field> all;
    for (auto part : {run_fields, model_fields, data_fields, training_fields, output_fields}) {
      for (Field& field : part()) all.push_back(std::move(field));
    }
    return all;
  }();
  return fields;
}

const std::vector<Section>& sections() {
  static const std::vector<Section> all = {
      {"run", "the run and the machine"},
      {"model", "what the model looks like"},
      {"model.mlstm", "mLSTM blocks of kind xlstm"},
      {"model.slstm", "sLSTM blocks of kind xlstm"},
      {"model.feed_forward",
       "feed-forward layer of sLSTM blocks, of post-up-projection mLSTM blocks and of the 7B "
       "block"},
      {"data", "text, prepared token files, or a task"},
      {"data.task", "task: synthetic, or read from files"},
      {"train", "length and batches"},
      {"optim", "AdamW and its learning rate"},
      {"ckpt", "checkpoints"},
      {"eval", "evaluation on held-out text"},
      {"sample", "text written during training"},
      {"log", "console, metrics, plots"},
  };
  return all;
}

const Field* find_field(const std::string& name) {
  for (const Field& field : schema()) {
    if (field.name == name) return &field;
  }
  return nullptr;
}

const Section* find_section(const std::string& name) {
  for (const Section& section : sections()) {
    if (section.name == name) return &section;
  }
  return nullptr;
}

std::string parent_of(const std::string& name) {
  const size_t dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

std::string last_part(const std::string& name) { return name.substr(name.rfind('.') + 1); }

}  // namespace xlstm::config
