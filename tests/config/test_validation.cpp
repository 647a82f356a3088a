// Settings that contradict each other: of the model when it is read, of a training run when it
// starts.
#include <limits>

#include "tests/config/support.h"
#include "tests/support/catch.h"

namespace xlstm::config {
namespace {

std::string training_message(const std::string& yaml) {
  return message_of([&] { validate_for_training(parse_config(yaml, "f.yaml")); });
}

struct Case {
  std::string yaml, message;
};

}  // namespace

TEST_CASE("model sizes that do not fit together") {
  const std::vector<Case> cases = {
      {"model: {embedding_dim: 130}",
       "f.yaml:1: model.embedding_dim: the width is 130, expected a multiple of model.num_heads 4"},
      {"model:\n  num_heads: 3\n",
       "model.embedding_dim (default): the width is 128, expected a multiple of model.num_heads 3"},
      {"model: {num_heads: 8, embedding_dim: 24, mlstm: {proj_factor: 1.5, "
       "round_proj_up_to_multiple_of: 1}}",
       "f.yaml:1: model.mlstm.proj_factor: the width of the up-projection is 36, expected a "
       "multiple of "
       "model.num_heads 8"},
      {"model: {mlstm: {qkv_proj_blocksize: 7}}",
       "f.yaml:1: model.mlstm.qkv_proj_blocksize: the width of the up-projection is 256, expected "
       "a multiple of this "
       "block size 7"},
      {"model: {slstm_at: [1, 4]}",
       "f.yaml:1: model.slstm_at: position 4 does not exist, expected 0..3 (model.num_blocks is "
       "4)"},
      {"model: {slstm_at: [2, 1, 2]}",
       "f.yaml:1: model.slstm_at: position 2 stands twice; remove one"},
      {"model: {kind: xlstm_large, qk_dim_factor: 0.3}",
       "f.yaml:1: model.qk_dim_factor: the width of queries and keys is 38.4, expected a multiple "
       "of model.num_heads 4"},
      {"model: {kind: xlstm_large, v_dim_factor: 0.001}",
       "f.yaml:1: model.v_dim_factor: the width of values is 0.128, expected a multiple of "
       "model.num_heads 4"},
  };
  for (const Case& each : cases) CHECK(parse_message(each.yaml) == each.message);
  CHECK(parse_message("model: {slstm_at: [3, 0, 1, 2], mlstm: {qkv_proj_blocksize: 7}}") == "");
  for (const std::string kind :
       {"lstm", "lstm_residual", "lstm_block", "mamba", "rwkv4", "hgrn", "hyena"})  // without heads
    CHECK(parse_message("model: {embedding_dim: 66, kind: " + kind + "}") == "");
}

TEST_CASE("gates and the place of the up-projection") {
  for (const std::string setting :
       {"igate: bias", "igate: fixed, igate_bias_init: zeros", "fgate: bias",
        "fgate: fixed, fgate_bias_init: open", "igate_bias_init: zeros", "up_projection: post"})
    CHECK(parse_message("model: {mlstm: {" + setting + "}}") == "");
  const std::vector<Case> cases = {
      {"model: {mlstm: {igate: fixed}}",
       "model.mlstm.igate_bias_init (default): is normal, expected zeros for model.mlstm.igate "
       "fixed"},
      {"model: {mlstm: {fgate: bias, fgate_bias_init: open}}",
       "f.yaml:1: model.mlstm.fgate_bias_init: is open, expected linspace for model.mlstm.fgate "
       "bias"},
      {"model: {mlstm: {up_projection: post, proj_factor: 3}}",
       "f.yaml:1: model.mlstm.proj_factor: applies to model.mlstm.up_projection pre only; remove "
       "it"},
  };
  for (const Case& each : cases) CHECK(parse_message(each.yaml) == each.message);
  // A width that pre would refuse: 256 does not come in blocks of 7.
  CHECK(parse_message("model: {mlstm: {qkv_proj_blocksize: 7}}") != "");
}

TEST_CASE("settings of the other kind of model are refused unless they say what holds anyway") {
  const std::vector<std::string> of_xlstm = {"slstm_at: [1]",
                                             "bias: true",
                                             "mlstm: {proj_factor: 3}",
                                             "mlstm: {normalize: false}",
                                             "slstm: {cell: lstm}",
                                             "mlstm: {fgate: bias}",
                                             "feed_forward: {gated: false}"};
  for (const std::string& setting : of_xlstm) {
    INFO(setting);
    CHECK(parse_message("model: {" + setting + "}") == "");
    CHECK(parse_message("model: {kind: xlstm_large, " + setting + "}")
              .find("applies to model.kind xlstm only, but the kind is xlstm_large; remove it") !=
          std::string::npos);
  }
  for (const std::string setting : {"qk_dim_factor: 1", "v_dim_factor: 2", "gate_soft_cap: 5"}) {
    INFO(setting);
    CHECK(parse_message("model: {kind: xlstm_large, " + setting + "}") == "");
    CHECK(parse_message("model: {" + setting + "}")
              .find("applies to model.kind xlstm_large only, but the kind is xlstm; remove it") !=
          std::string::npos);
  }
  CHECK(parse_message(
            "model: {kind: xlstm_large, bias: false, slstm_at: [], mlstm: {proj_factor: 2.0}}") ==
        "");
  CHECK(parse_message("model: {kind: xlstm_large, feed_forward: {act_fn: silu}}") == "");
  CHECK(
      parse_message("model: {kind: xlstm_large, feed_forward: {act_fn: relu}}") ==
      "f.yaml:1: model.feed_forward.act_fn: is always silu for model.kind xlstm_large; remove it");
}

TEST_CASE("models of the comparison: heads of an even width, feed-forwards where there are any") {
  const auto refused = [](const std::string& yaml, const std::string& what) {
    INFO(yaml);
    CHECK(parse_message(yaml).find(what) != std::string::npos);
  };
  for (const std::string kind : {"retnet", "gla"}) {
    refused("model: {kind: " + kind + ", embedding_dim: 12, num_heads: 4}",
            "f.yaml:1: model.num_heads: leaves heads of width 3, expected an even one");
    CHECK(parse_message("model: {kind: " + kind + ", embedding_dim: 16, num_heads: 4}") == "");
  }
  for (const std::string kind :
       {"linear_attention", "retnet", "gla", "hgrn", "hgrn2", "h3", "hyena"})
    CHECK(parse_message("model: {kind: " + kind + ", feed_forward: {proj_factor: 2}}") == "");
  for (const std::string kind : {"rwkv5", "rwkv6"})
    refused("model: {kind: " + kind + ", feed_forward: {proj_factor: 2}}",
            "model.feed_forward.proj_factor: applies to model.kind xlstm, xlstm_large");
  refused("model: {kind: rwkv7}", "model.kind");
  refused("model: {kind: h3, state_size: 7}", "f.yaml:1: model.state_size: is 7, expected an even");
  refused("model: {kind: hyena, state_size: 8}", "applies to model.kind h3 only");
  refused("model: {kind: h3, filter_length: 8}", "applies to model.kind hyena only");
  refused("model: {kind: llama, max_positions: 8}", "applies to model.kind gpt only");
  refused("model: {kind: gpt, bias: true}", "applies to model.kind xlstm only");
  refused("model: {kind: gpt, qk_dim_factor: 1}", "applies to model.kind xlstm_large only");
  CHECK(parse_message("model: {kind: gpt, max_positions: 8}") == "");
  CHECK(parse_message("model: {kind: h3, state_size: 8}") == "");
  CHECK(parse_message("model: {kind: hyena, filter_length: 8}") == "");
}

TEST_CASE("no product of settings is more than can be counted") {
  const std::string sizes = ", global_batch_size: 2147483647}\ndata: {seq_len: 2147483647}";
  CHECK(parse_message("train: {max_steps: 0" + sizes) == "");
  CHECK(parse_message("train: {max_tokens: 1000000000000000000" + sizes) == "");
  CHECK(parse_message("train: {max_steps: 1" + sizes) ==
        "f.yaml:1: train.max_steps: is 1, with 4611686014132420609 tokens per step "
        "(train.global_batch_size * data.seq_len) more than the 1000000000000000000 tokens that a "
        "run may have");
  CHECK(parse_message("train: {max_steps: 1000000000000, global_batch_size: 1000}\n"
                      "data: {seq_len: 1000}") == "");
  CHECK(parse_message("train: {max_steps: 1000000000001}").find("expected integer 0..") !=
        std::string::npos);
  CHECK(parse_message("eval: {batches: 2147483648}").find("expected integer 0..2147483647") !=
        std::string::npos);
}

TEST_CASE("what a training run needs") {
  const std::string data = "data: {text: a.txt}\n";
  CHECK(training_message(data + "train: {max_steps: 500}") == "");
  CHECK(training_message("data: {train: [{path: a}], val: b}\ntrain: {max_tokens: 4096000}") == "");
  const std::vector<Case> cases = {
      {data,
       "train.max_steps (default): the length of the run is not given; set train.max_steps or "
       "train.max_tokens"},
      {data + "train:\n  max_steps: 500\n  max_tokens: 7\n",
       "f.yaml:4: train.max_tokens: is 7 while train.max_steps is 500, expected one of them; set "
       "the other to 0"},
      {data + "train: {max_steps: 500, global_batch_size: 16, micro_batch_size: 3}",
       "f.yaml:2: train.micro_batch_size: is 3, expected a divisor of train.global_batch_size 16"},
      {data + "train: {max_steps: 500, global_batch_size: 16, micro_batch_size: 32}",
       "f.yaml:2: train.micro_batch_size: is 32, expected a divisor of train.global_batch_size 16"},
      {"train: {max_steps: 500}",
       "data.text (default): nothing to train on; set data.text to a file, folder or glob (or "
       "python-stdlib), data.train to token files, or data.task.name to a task"},
      {"data: {text: a, task: {name: parity}}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.task.name: is given together with data.text, expected one of them"},
      {"data: {task: {name: parity}}\nsample: {prompts: [a]}\ntrain: {max_steps: 500}",
       "f.yaml:2: sample.prompts: works with text only, but data.task.name is parity; remove it"},
      {"data: {text: a, task: {eval_len: 50}}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.task.eval_len: applies to tasks only; set data.task.name, or remove it"},
      {"data: {text: a, task: {path: b}}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.task.path: applies to tasks only; set data.task.name, or remove it"},
      {"data: {task: {name: parity}}\ntrain: {max_steps: 500}", ""},
      {"data: {task: {name: image, path: b, eval_len: 2000}}\ntrain: {max_steps: 500}", ""},
      {"data: {task: {name: image, path: b, vocab_size: 9}}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.task.vocab_size: applies to tasks whose samples are drawn, but those of "
       "data.task.name image are read from files; remove it"},
      {"data: {text: a, train: [{path: b}]}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.text: is given together with data.train, expected one of them; set "
       "data.text=\"\" or "
       "data.train=[]"},
      {"data: {train: [{path: b}], prompt_key: c}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.prompt_key: works with data.text; xlstm-data prepare takes --prompt-key"},
      {"data: {text: b, prompt_key: c, text_key: c}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.prompt_key: is c, as data.text_key is; expected another key"},
      {"data: {train: [{path: b}], text_key: c}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.text_key: works with data.text; xlstm-data prepare takes --text-key"},
      {"data: {train: [{path: b}], val_text: c}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.val_text: works with data.text; with data.train set data.val to a prepared "
       "token file"},
      {"data: {text: b, val: c}\ntrain: {max_steps: 500}",
       "f.yaml:1: data.val: works with data.train; with data.text set data.val_text or "
       "data.val_fraction"},
      {data + "train: {max_steps: 500}\nmodel: {vocab_size: 100}",
       "f.yaml:3: model.vocab_size: is 100, expected >= 256 for data.tokenizer bytes"},
      {data + "train: {max_steps: 500}\noptim: {learning_rate: 1e-5}",
       "optim.min_lr (default): is 1.0e-04, expected at most optim.learning_rate 1.0e-05"},
      {data + "train: {max_steps: 50}",
       "optim.warmup_steps (default): is 100, expected at most the 50 steps of the run; "
       "one that is cut short has its steps on the command line"},
      {data + "train: {max_steps: 100}", ""},
      {data + "train: {max_tokens: 8192}\noptim: {warmup_steps: 3}",
       "f.yaml:3: optim.warmup_steps: is 3, expected at most the 2 steps of the run; one "
       "that is cut short has its steps on the command line"},
      {data + "train: {max_steps: 500}\noptim: {decay_steps: 5}",
       "f.yaml:3: optim.decay_steps: applies to optim.schedule wsd only, but the schedule is "
       "cosine; remove it"},
      {data + "train: {max_steps: 500}\noptim: {schedule: wsd, decay_steps: 401}",
       "f.yaml:3: optim.decay_steps: is 401, expected at most 400, the steps after the warm-up"},
      {data + "train: {max_steps: 500}\noptim: {schedule: wsd, decay_steps: 400}", ""},
      {data + "train: {max_steps: 500}\noptim: {schedule: linear, restarts: 1}",
       "f.yaml:3: optim.restarts: applies to optim.schedule cosine only, but the schedule is "
       "linear; remove it"},
      {data + "train: {max_steps: 500}\noptim: {restarts: 400}",
       "f.yaml:3: optim.restarts: is 400, expected less than 400, the steps after the warm-up"},
      {data + "train: {max_steps: 500}\noptim: {restarts: 399}", ""},
      {data + "train: {max_steps: 500}\nrun: {name: a/b}",
       "f.yaml:3: run.name: got 'a/b', expected a folder name; put the path into run.out_dir"},
      {data + "train: {max_steps: 500}\nrun: {name: ..}",
       "f.yaml:3: run.name: got '..', expected a folder name; put the path into run.out_dir"},
      {"data: {train: [{path: b}]}\ntrain: {max_steps: 500}\nckpt: {keep_best: true}",
       "f.yaml:3: ckpt.keep_best: goes by the held-out loss, but nothing is held out; set data.val "
       "to a prepared token file, or remove it"},
      {"data: {train: [{path: b}]}\ntrain: {max_steps: 500}\neval: {patience: 3}",
       "f.yaml:3: eval.patience: goes by the held-out loss, but nothing is held out; set data.val "
       "to a prepared token file, or remove it"},
      {data + "train: {max_steps: 500}\neval: {every: 0, patience: 3}",
       "f.yaml:3: eval.patience: counts evaluations, but eval.every 0 evaluates at the end alone; "
       "set eval.every, or remove it"},
      {"data: {train: [{path: b}], val: c}\ntrain: {max_steps: 500}\nckpt: {keep_best: true}\n"
       "eval: {patience: 3}",
       ""},
      {"data: {task: {name: parity}}\ntrain: {max_steps: 500}\nckpt: {keep_best: true}", ""},
      {data + "train: {max_steps: 500}\nckpt: {keep_best: true}\neval: {every: 0}", ""},
      {data + "train: {max_steps: 500, carry_state: true}", ""},
      {data + "train: {max_steps: 500, carry_state: true}\nmodel: {kind: llama}",
       "f.yaml:2: train.carry_state: expected false with model.kind llama, whose state grows with "
       "every token"},
      {"data: {task: {name: parity}}\ntrain: {max_steps: 500, carry_state: true}",
       "f.yaml:2: train.carry_state: expected false with data.task.name parity: samples of a task "
       "do not go on in one another"},
  };
  for (const Case& each : cases) {
    INFO(each.yaml);
    CHECK(training_message(each.yaml) == each.message);
  }
  CHECK(training_message(
            data + "train: {max_steps: 500}\noptim: {learning_rate: 1e-5, schedule: constant}") ==
        "");
}

TEST_CASE("tasks that read files refuse the settings of those that draw samples") {
  for (const std::string name : {"image", "rgb_image", "retrieval", "pathfinder", "listops"})
    for (const std::string setting :
         {"vocab_size: 16", "min_len: 20", "eval_min_len: 20", "key_values: 8",
          "random_non_queries: true", "max_depth: 3", "max_args: 3"}) {
      const std::string path = name == "listops" ? "" : ", path: b";
      const std::string message = training_message("data: {task: {name: " + name + path + ", " +
                                                   setting + "}}\ntrain: {max_steps: 500}");
      INFO(name << ", " << setting << ": " << message);
      const std::string refusal = "f.yaml:1: data.task." + setting.substr(0, setting.find(':')) +
                                  ": applies to tasks whose samples are drawn, but those of "
                                  "data.task.name " +
                                  name + " are read from files; remove it";
      CHECK(message == (name == "listops" ? "" : refusal));
    }
}

TEST_CASE("the command line may cut a run short of its warm-up") {
  const TemporaryFolder folder;
  const std::string path = folder.write(
      "a.yaml", "data: {text: a}\ntrain: {max_steps: 500}\noptim: {warmup_steps: 100}\n");
  const auto message = [&](const std::vector<std::string>& overrides) {
    return message_of([&] { validate_for_training(load_config(path, overrides)); });
  };
  CHECK(message({"train.max_steps=3"}) == "");
  CHECK(message({"train.max_steps=0", "train.max_tokens=9000"}) == "");
  CHECK(message({"optim.schedule=wsd", "train.max_steps=3"}) == "");
  CHECK(message({"optim.warmup_steps=501"}) ==
        "override 'optim.warmup_steps=501': optim.warmup_steps: is 501, expected at most the 500 "
        "steps of the run; one that is cut short has its steps on the command line");
  CHECK(message({"train.max_steps=3", "optim.warmup_steps=4"}) != "");
}

TEST_CASE("the number of steps follows from max_steps or max_tokens") {
  Config given;
  given.train.global_batch_size = 4;
  given.data.seq_len = 8;
  CHECK(tokens_per_step(given) == 32);
  given.train.max_steps = 7;
  CHECK(total_steps(given) == 7);
  given.train.max_steps = 0;
  given.train.max_tokens = 64;
  CHECK(total_steps(given) == 2);
  given.train.max_tokens = 65;
  CHECK(total_steps(given) == 3);
  given.train.max_tokens = std::numeric_limits<int64_t>::max();
  CHECK(total_steps(given) == int64_t{1} << 58);
}

TEST_CASE("settings that have no effect in a model are told, once") {
  const auto warning = [](const std::string& model) {
    std::vector<std::string> told;
    warn_of_settings_without_effect(parse_config("model: {" + model + "}", "f.yaml"),
                                    [&](const std::string& text) { told.push_back(text); });
    CHECK(told.size() <= 1);
    return told.empty() ? "" : told[0];
  };
  const std::string all_slstm = "num_blocks: 1, slstm_at: [0], ";
  const std::vector<Case> cases = {
      {"slstm: {cell: lstm, recurrent_clip: 10}",
       "model.slstm.cell=lstm (there is no sLSTM block), model.slstm.recurrent_clip=10.0 (there is "
       "no sLSTM block)"},
      {all_slstm + "mlstm: {conv1d_kernel_size: 0}",
       "model.mlstm.conv1d_kernel_size=0 (there is no mLSTM block)"},
      {all_slstm + "chunk_size: 32", "model.chunk_size=32 (there is no mLSTM cell)"},
      {"kind: llama, mlstm_eps: 1e-5",
       "model.mlstm_eps=1.0e-05 (there is no mLSTM cell with a normaliser)"},
      {"mlstm_eps: 1e-5, mlstm: {normalize: false}",
       "model.mlstm_eps=1.0e-05 (there is no mLSTM cell with a normaliser)"},
      {"kind: gla, chunk_size: 32", "model.chunk_size=32 (there is no mLSTM cell)"},
      {"lora: {alpha: 8}", "model.lora.alpha=8.0 (model.lora.rank is 0)"},
      {"add_embedding_dropout: true", "model.add_embedding_dropout=true (model.dropout is 0)"},
      {"feed_forward: {proj_factor: 2}",
       "model.feed_forward.proj_factor=2.0 (there is no block with a feed-forward layer)"},
  };
  for (const Case& each : cases)
    CHECK(warning(each.yaml) == "settings without effect: " + each.message);
  for (const std::string effective :
       {"slstm_at: [1], slstm: {cell: lstm}, feed_forward: {proj_factor: 2}",
        "mlstm: {up_projection: post}, feed_forward: {proj_factor: 2}",
        "mlstm: {conv1d_kernel_size: 0}, mlstm_eps: 1e-5, chunk_size: 32",
        "kind: xlstm_large, mlstm_eps: 1e-5, chunk_size: 32, feed_forward: {proj_factor: 2}",
        "kind: retnet, chunk_size: 32", "kind: linear_attention, chunk_size: 32",
        "kind: mamba, num_heads: 2", "lora: {rank: 2, alpha: 8}",
        "dropout: 0.1, add_embedding_dropout: true",
        "slstm: {cell: slstm}, lora: {alpha: 16}, mlstm_eps: 1e-6"})
    CHECK(warning(effective) == "");
}

TEST_CASE("programs other than the trainer read incomplete configurations") {
  CHECK(parse_message("model: {num_blocks: 2}") == "");
  CHECK(parse_message("train: {max_steps: 5, max_tokens: 5}") == "");
}

}  // namespace xlstm::config
