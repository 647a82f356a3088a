#include "csrc/config/schema_fields.h"
#include "csrc/data/tokenizer_spec.h"

namespace xlstm::config {
namespace {

std::vector<std::string> task_choices() {
  std::vector<std::string> choices = data::task_names();
  choices.insert(choices.begin(), "none");
  return choices;
}

}  // namespace

std::vector<Field> data_fields() {
  return {
      per_machine(
          XLSTM_FIELD(data.text, any(),
                      "text to train on, prepared on the fly: file, folder, glob, or python-stdlib "
                      "(the sources of Python's "
                      "standard library); empty: data.train is used")),
      per_machine(XLSTM_FIELD(data.val_text, any(), "held-out text; empty: a part of data.text")),
      XLSTM_FIELD(data.val_fraction, between(0, 1),
                  "held-out share of data.text when val_text is empty"),
      XLSTM_FIELD(data.val_split, one_of({"tail", "file"}),
                  "tail: the end of each file; file: whole files"),
      XLSTM_FIELD(data.text_key, text(), "key of the text in the lines of .jsonl files"),
      XLSTM_FIELD(
          data.prompt_key, any(),
          "key of a prompt in these lines, which stands before the text and does not count in "
          "the loss; empty: there are none"),
      per_machine(
          XLSTM_FIELD(data.cache_dir, any(),
                      "prepared text; empty: $XDG_CACHE_HOME/libxlstm or ~/.cache/libxlstm")),
      per_machine(XLSTM_FIELD(data.train, above(0),
                              "prepared token files (prefixes of .bin/.idx), mixed by weight")),
      per_machine(
          XLSTM_FIELD(data.val, any(), "prepared held-out token file (prefix of .bin/.idx)")),
      per_machine(XLSTM_FIELD(data.tokenizer, text(), data::kTokenizerSpecs)),
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
      per_machine(
          XLSTM_FIELD(data.task.path, any(),
                      "image, rgb_image, retrieval, pathfinder: folder of the data set's files")),
      XLSTM_FIELD(data.task.train_samples, integers(0, kMaxSize),
                  "samples of an epoch; 0: fresh ones for ever, or all of the files"),
      XLSTM_FIELD(data.task.held_out, one_of({"test", "validation"}),
                  "which samples are held out; validation: others than the test's, to choose "
                  "settings by (image, rgb_image: the last tenth of those that train)"),
      XLSTM_FIELD(data.task.eval_samples, integers(1, kMaxSize),
                  "held-out samples; of files at most those there are"),
      XLSTM_FIELD(data.task.eval_min_len, integers(0, kMaxSize),
                  "shortest held-out sample; 0: min_len"),
      XLSTM_FIELD(data.task.eval_len, integers(0, kMaxSize),
                  "longest held-out sample; 0: data.seq_len"),
  };
}

}  // namespace xlstm::config
