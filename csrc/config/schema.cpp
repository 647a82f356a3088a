#include "csrc/config/schema.h"

#include "csrc/config/schema_fields.h"

namespace xlstm::config {
namespace {

std::vector<Field> run_fields() {
  return {
      XLSTM_FIELD(run.name, text(), "name of the run's folder, which is out_dir/name"),
      per_machine(XLSTM_FIELD(run.out_dir, text(), "folder of all runs")),
      XLSTM_FIELD(run.seed, integers(0), "seed of initialisation, dropout and sampling"),
      XLSTM_FIELD(run.resume, one_of({"auto", "never", "step-N"}),
                  "auto: go on from the newest good checkpoint of the run's folder"),
      XLSTM_FIELD(run.device, one_of({"auto", "cpu", "cuda"}),
                  "where to compute; auto: a GPU where there is one"),
      per_machine(XLSTM_FIELD(run.num_threads, integers(0, 4096), "CPU threads; 0: all cores")),
  };
}

std::vector<Field> training_fields() {
  return {
      identity(XLSTM_FIELD(train.global_batch_size, integers(1, kMaxSize),
                           "sequences per optimizer step")),
      XLSTM_FIELD(train.micro_batch_size, integers(0, kMaxSize),
                  "sequences per forward pass, a divisor of global_batch_size; 0: all of them"),
      XLSTM_FIELD(train.max_steps, integers(0, kMaxSteps),
                  "optimizer steps of the run; 0: max_tokens says it"),
      XLSTM_FIELD(train.max_tokens, integers(0, kMaxTokens),
                  "tokens of the run; 0: max_steps says it"),
      XLSTM_FIELD(train.grad_clip, at_least(0), "largest global norm of the gradient; 0: off"),
      XLSTM_FIELD(train.dtype, one_of({"float32", "bfloat16"}),
                  "bfloat16: autocast, the weights stay float32"),
      XLSTM_FIELD(train.nonfinite, one_of({"stop", "skip"}),
                  "what a loss or gradient that is not finite does"),
      XLSTM_FIELD(train.cuda_graph, any(),
                  "on a GPU: record the training step once as a CUDA graph, then replay it"),
      identity(XLSTM_FIELD(
          train.carry_state, any(),
          "each sequence of a batch goes on in the text where that of the batch before ended, with "
          "the state it left (truncated backpropagation through time); false: sequences from "
          "anywhere, each from an empty state")),
      XLSTM_FIELD(train.sequence_parallel, integers(1, 4096),
                  "processes that compute each sequence together, a segment of data.seq_len / this "
                  "many tokens each: for sequences that are too long for one GPU"),
      XLSTM_FIELD(train.shard_weights, any(),
                  "several processes: each holds an equal part of the blocks' weights, their "
                  "gradients and the optimizer's state (FSDP, ZeRO stage 3), and has those of a "
                  "block whole only while it computes; wants model.activation_checkpointing"),
      per_machine(XLSTM_FIELD(
          train.init_from, any(),
          "folder of a run or checkpoint whose weights a new run starts with; empty: drawn")),
      XLSTM_FIELD(optim.learning_rate, above(0), "peak learning rate of AdamW"),
      XLSTM_FIELD(optim.min_lr, at_least(0), "learning rate at the end of the schedule"),
      XLSTM_FIELD(optim.schedule, one_of({"cosine", "linear", "constant", "wsd"}),
                  "after the warm-up; wsd: constant, then a linear decay over decay_steps"),
      XLSTM_FIELD(optim.warmup_steps, integers(0, kMaxSteps), "steps of linear warm-up"),
      XLSTM_FIELD(optim.restarts, integers(0, 1000000),
                  "cosine: times it starts again at learning_rate, after equal numbers of steps"),
      XLSTM_FIELD(optim.decay_steps, integers(0, kMaxSteps),
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
      XLSTM_FIELD(ckpt.every, integers(0, kMaxSteps),
                  "steps between checkpoints; 0: only at the end and on signals"),
      XLSTM_FIELD(ckpt.keep_last, integers(1, kMaxSteps), "newest checkpoints that are kept"),
      XLSTM_FIELD(ckpt.keep_every, integers(0, kMaxSteps),
                  "checkpoints at multiples of this are never deleted; 0: none"),
      XLSTM_FIELD(ckpt.keep_best, any(),
                  "save where an evaluation gives the lowest held-out loss so far, keep that "
                  "checkpoint until one is lower, and let ckpt/best name it"),
      XLSTM_FIELD(ckpt.verify_on_load, any(), "check the sha256 of every file"),
      XLSTM_FIELD(ckpt.max_failed_saves, integers(1, kMaxSteps),
                  "failed saves in a row before the run stops with status 4"),
      XLSTM_FIELD(eval.every, integers(0, kMaxSteps),
                  "steps between evaluations; 0: only at the end"),
      XLSTM_FIELD(eval.batches, integers(0, kMaxSize),
                  "batches of global_batch_size held-out sequences; 0: the whole set"),
      XLSTM_FIELD(
          eval.patience, integers(0, kMaxSteps),
          "evaluations in a row without a lower held-out loss after which the run ends; the "
          "learning rate stays planned for the whole run; 0: off"),
      XLSTM_FIELD(sample.every, integers(0, kMaxSteps),
                  "steps between samples; 0: only at the end"),
      XLSTM_FIELD(sample.prompts, text(), "texts to continue; none: no samples"),
      XLSTM_FIELD(sample.max_new_tokens, integers(1, kMaxSize), "tokens per sample"),
      XLSTM_FIELD(sample.temperature, at_least(0), "0: always the likeliest token"),
      XLSTM_FIELD(sample.top_k, integers(0, kMaxSize),
                  "choose among this many likeliest tokens; 0: all"),
      XLSTM_FIELD(sample.top_p, above_up_to(0, 1),
                  "choose among the likeliest tokens of this total probability"),
      XLSTM_FIELD(log.every, integers(1, kMaxSteps), "steps between lines and records of metrics"),
      XLSTM_FIELD(log.console, one_of({"auto", "bar", "plain", "off"}),
                  "auto: a bar on a terminal, else plain lines"),
      XLSTM_FIELD(log.tensorboard, any(), "write TensorBoard event files"),
      XLSTM_FIELD(log.plot, any(), "draw loss.png at the end"),
  };
}

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
      {"model.lora", "low-rank adapters"},
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
