// Every kind of bad YAML: a one-line error with place, key, what came, what was expected, and a
// hint.
#include <random>

#include "tests/config/support.h"
#include "tests/support/catch.h"

namespace xlstm::config {
namespace {

struct Case {
  std::string yaml;
  std::string message;  // whole
};

void check(const std::vector<Case>& cases) {
  for (const Case& each : cases) {
    INFO(each.yaml);
    CHECK(parse_message(each.yaml) == each.message);
  }
}

}  // namespace

TEST_CASE("unknown keys name the key that was meant") {
  check({
      {"train:\n  max_stps: 5\n",
       "f.yaml:2: train.max_stps: unknown key; did you mean train.max_steps?"},
      {"train:\n  max_setps: 5\n",
       "f.yaml:2: train.max_setps: unknown key; did you mean train.max_steps?"},
      {"train:\n  Max_Steps: 5\n",
       "f.yaml:2: train.Max_Steps: unknown key; did you mean train.max_steps?"},
      {"max_steps: 5\n", "f.yaml:1: max_steps: unknown key; did you mean train.max_steps?"},
      {"train:\n  seed: 5\n", "f.yaml:2: train.seed: unknown key; did you mean run.seed?"},
      {"train:\n  every: 5\n",
       "f.yaml:2: train.every: unknown key; did you mean ckpt.every or eval.every or sample.every "
       "or log.every?"},
      {"train:\n  lerning_rate: 1\n",
       "f.yaml:2: train.lerning_rate: unknown key; did you mean optim.learning_rate?"},
      {"train:\n  batch_size: 5\n",
       "f.yaml:2: train.batch_size: unknown key; did you mean train.global_batch_size or "
       "train.micro_batch_size?"},
      {"optim:\n  lr: 5\n", "f.yaml:2: optim.lr: unknown key; did you mean optim.learning_rate?"},
      {"trian:\n  max_steps: 5\n", "f.yaml:1: trian: unknown key; did you mean train?"},
      {"model:\n  train: {}\n", "f.yaml:2: model.train: unknown key; did you mean data.train?"},
      {"model:\n  mlstm:\n    noramlize: true\n",
       "f.yaml:3: model.mlstm.noramlize: unknown key; did you mean model.mlstm.normalize?"},
      {"eval:\n  zzz: 5\n", "f.yaml:2: eval.zzz: unknown key; known are every, batches, patience"},
      {"qqqqqq: 5\n",
       "f.yaml:1: qqqqqq: unknown key; sections are run, model, data, train, optim, ckpt, eval, "
       "sample, log, base"},
      {"train.max_steps: 5\n",
       "f.yaml:1: train.max_steps: dots work on the command line only; write `train: {max_steps: "
       "...}`"},
      {"data: {train: [{pth: x}]}\n",
       "f.yaml:1: data.train[0].pth: unknown key; did you mean path?"},
  });
  const std::string huge(100000, 'k');
  CHECK(parse_message(huge + ": 1\n").size() < 500);
}

TEST_CASE("duplicate keys are errors in every map") {
  check({
      {"train:\n  max_steps: 5\n  dtype: float32\n  max_steps: 6\n",
       "f.yaml:4: train.max_steps: duplicate key, first given on line 2; keep one of them"},
      {"train:\n  max_steps: 5\n\ntrain:\n  dtype: float32\n",
       "f.yaml:4: train: duplicate key, first given on line 1; keep one of them"},
      {"train: {max_steps: 5, max_steps: 5}\n",
       "f.yaml:1: train.max_steps: duplicate key, first given on line 1; keep one of them"},
      {"train: {max_steps: 5, \"max_steps\": 5}\n",
       "f.yaml:1: train.max_steps: duplicate key, first given on line 1; keep one of them"},
      {"data:\n  train:\n    - path: a\n    - path: b\n      path: c\n",
       "f.yaml:5: data.train[1].path: duplicate key, first given on line 4; keep one of them"},
  });
}

TEST_CASE("integers are decimal, in range, without tricks") {
  const std::string at = "f.yaml:2: train.max_steps: got ",
                    expected = ", expected integer 0..1000000000000";
  const std::vector<std::pair<std::string, std::string>> values = {
      {"abc", "'abc'" + expected},
      {"1_000", "'1_000'" + expected + "; write 1000, without underscores"},
      {"15e9", "'15e9'" + expected + "; write 15000000000"},
      {"1e3", "'1e3'" + expected + "; write 1000"},
      {"2.0", "'2.0'" + expected + "; write 2"},
      {"2.5", "'2.5'" + expected},
      {"010", "'010'" + expected + "; leading zeros are not allowed"},
      {"0x10", "'0x10'" + expected + "; write a decimal number"},
      {"0o10", "'0o10'" + expected + "; write a decimal number"},
      {"12:30:45", "'12:30:45'" + expected},
      {"1,000", "'1,000'" + expected + "; write a point, and no thousands separators"},
      {"-2", "'-2'" + expected},
      {"9223372036854775807", "'9223372036854775807'" + expected},
      {"9223372036854775808", "'9223372036854775808'" + expected + "; it does not fit 64 bits"},
      {".inf", "'.inf'" + expected + "; only finite numbers are allowed"},
      {"\"5\"", "the text '5'" + expected + "; remove the quotes"},
      {"true", "'true'" + expected},
      {"", "no value" + expected + "; give a value or remove the line"},
      {"null", "no value" + expected + "; give a value or remove the line"},
      {"~", "no value" + expected + "; give a value or remove the line"},
      {"[1]", "a list" + expected},
      {"{a: 1}", "a map of keys" + expected},
  };
  for (const auto& [value, message] : values) {
    INFO(value);
    CHECK(parse_message("train:\n  max_steps: " + value + "\n") == at + message);
  }
  CHECK(parse_message("train: {global_batch_size: 0}\n") ==
        "f.yaml:1: train.global_batch_size: got '0', expected integer 1..2147483647");
  CHECK(parse_message("model: {slstm: {conv1d_kernel_size: 1}}\n") ==
        "f.yaml:1: model.slstm.conv1d_kernel_size: got '1', expected integer 0 or 2..8");
  CHECK(parse_config("run: {seed: 9223372036854775807}", "f").run.seed == 9223372036854775807);
  CHECK(parse_config("train: {max_steps: +7}", "f").train.max_steps == 7);
}

TEST_CASE("numbers are finite decimals, 3e-4 is one") {
  const std::string at = "f.yaml:2: optim.learning_rate: got ", expected = ", expected number > 0";
  const std::vector<std::pair<std::string, std::string>> values = {
      {".inf", "'.inf'" + expected + "; only finite numbers are allowed"},
      {"-.inf", "'-.inf'" + expected + "; only finite numbers are allowed"},
      {".NaN", "'.NaN'" + expected + "; only finite numbers are allowed"},
      {"nan", "'nan'" + expected + "; only finite numbers are allowed"},
      {"1e999", "'1e999'" + expected + "; the number is malformed or out of double's range"},
      {"1_000.5", "'1_000.5'" + expected + "; write 1000.5, without underscores"},
      {"0,5", "'0,5'" + expected + "; write a point, and no thousands separators"},
      {"0x1p-3", "'0x1p-3'" + expected + "; write a decimal number"},
      {"1e", "'1e'" + expected + "; the number is malformed or out of double's range"},
      {"1.2.3", "'1.2.3'" + expected + "; the number is malformed or out of double's range"},
      {"00.5", "'00.5'" + expected + "; the number is malformed or out of double's range"},
      {"0", "'0'" + expected},
      {"-0.0", "'-0.0'" + expected},
      {"-1e-3", "'-1e-3'" + expected},
      {"fast", "'fast'" + expected},
      {"'3e-4'", "the text '3e-4'" + expected + "; remove the quotes"},
  };
  for (const auto& [value, message] : values) {
    INFO(value);
    CHECK(parse_message("optim:\n  learning_rate: " + value + "\n") == at + message);
  }
  const std::vector<std::pair<std::string, double>> good = {
      {"3e-4", 3e-4}, {"3E-4", 3e-4}, {"3.0e-4", 3e-4}, {".5", 0.5},
      {"2.", 2.0},    {"+1", 1.0},    {"1e+2", 100.0},  {"0.1", 0.1}};
  for (const auto& [text, value] : good) {
    INFO(text);
    CHECK(parse_config("optim: {learning_rate: " + text + "}", "f").optim.learning_rate == value);
  }
}

TEST_CASE("booleans are true and false only") {
  const std::string at = "f.yaml:1: data.shuffle: got ", expected = ", expected true | false";
  for (const std::string value : {"yes", "on", "True", "TRUE", "y", "1"}) {
    CHECK(parse_message("data: {shuffle: " + value + "}") ==
          at + "'" + value + "'" + expected + "; write true");
  }
  for (const std::string value : {"no", "off", "False", "N", "0"}) {
    CHECK(parse_message("data: {shuffle: " + value + "}") ==
          at + "'" + value + "'" + expected + "; write false");
  }
  CHECK(parse_message("data: {shuffle: maybe}") == at + "'maybe'" + expected);
  CHECK(parse_message("data: {shuffle: \"true\"}") ==
        at + "the text 'true'" + expected + "; remove the quotes");
}

TEST_CASE("text and choices") {
  check({
      {"optim: {schedule: cosin}",
       "f.yaml:1: optim.schedule: got 'cosin', expected cosine | linear | constant | wsd; did you "
       "mean cosine?"},
      {"optim: {schedule: 5}",
       "f.yaml:1: optim.schedule: got '5', expected cosine | linear | constant | wsd"},
      {"run: {resume: step-}",
       "f.yaml:1: run.resume: got 'step-', expected auto | never | step-N; did you mean step-N?"},
      {"run: {resume: step-1x}",
       "f.yaml:1: run.resume: got 'step-1x', expected auto | never | step-N; did you mean step-N?"},
      {"run: {name: \"\"}", "f.yaml:1: run.name: got the text '', expected text, not empty"},
      {"run: {name: null}",
       "f.yaml:1: run.name: got no value, expected text, not empty; write \"\" for empty text, or "
       "remove the line"},
      {"run: {name: \"a\\0b\"}",
       "f.yaml:1: run.name: got the text 'a\\u0000b', expected text, not empty; remove the NUL "
       "character"},
      {"run: {name: [a]}", "f.yaml:1: run.name: got a list, expected text, not empty"},
      {"sample: {prompts: [\"\"]}",
       "f.yaml:1: sample.prompts[0]: got the text '', expected text, not empty"},
  });
  // Text fields take what looks like another type.
  for (const std::string value : {"123", "1e5", "true", "no", "010", "12:30:45", "a b"}) {
    CHECK(parse_config("run: {name: " + value + "}", "f").run.name == value);
  }
  CHECK(parse_config("run: {name: \"null\"}", "f").run.name == "null");
  CHECK(parse_config("run: {resume: step-100}", "f").run.resume == "step-100");
}

TEST_CASE("lists") {
  check({
      {"model: {slstm_at: 3}",
       "f.yaml:1: model.slstm_at: got '3', expected list of integer 0..9999; write [value, value], "
       "or [] for none"},
      {"model:\n  slstm_at:\n    - 1\n    - x\n",
       "f.yaml:4: model.slstm_at[1]: got 'x', expected integer 0..9999"},
      {"model: {slstm_at: [-1]}",
       "f.yaml:1: model.slstm_at[0]: got '-1', expected integer 0..9999"},
      {"model: {slstm_at: [1,]}\ntrain: {x: 1}",
       "f.yaml:2: train.x: unknown key; known are global_batch_size, "
       "micro_batch_size, max_steps, max_tokens, grad_clip, dtype, nonfinite, cuda_graph, "
       "carry_state, sequence_parallel, shard_weights, init_from"},
      {"data: {train: x}",
       "f.yaml:1: data.train: got 'x', expected list of {path, weight}; write [{path: PREFIX}]"},
      {"data: {train: [x]}",
       "f.yaml:1: data.train[0]: got 'x', expected {path, weight}; write {path: PREFIX} or {path: "
       "PREFIX, weight: "
       "NUMBER}"},
      {"data: {train: [{weight: 1}]}",
       "f.yaml:1: data.train[0]: path is missing; write {path: PREFIX, weight: NUMBER}"},
      {"data: {train: [{path: }]}",
       "f.yaml:1: data.train[0].path: got no value, expected text, not empty; write \"\" for empty "
       "text, or remove the "
       "line"},
      {"data:\n  train:\n    - path: a\n      weight: 0\n",
       "f.yaml:3: data.train[0].weight: got '0', expected number > 0"},
  });
}

TEST_CASE("broken YAML") {
  check({
      {"", "f.yaml: the file is empty, expected settings such as `run: {name: first}`"},
      {"# nothing\n", "f.yaml: the file is empty, expected settings such as `run: {name: first}`"},
      {"null\n", "f.yaml: the file is empty, expected settings such as `run: {name: first}`"},
      {"- a\n",
       "f.yaml:1: expected sections such as `run: {name: first}`; is the space behind a colon "
       "missing?"},
      {"run:x\n",
       "f.yaml:1: expected sections such as `run: {name: first}`; is the space behind a colon "
       "missing?"},
      {"run:\n", "f.yaml:1: run: the section is empty, expected keys below it; remove the line"},
      {"run: 5\n", "f.yaml:1: run: is a section, expected keys below it, got a value"},
      {"run:\n\tname: x\n", "f.yaml:2: tab in the indentation; indent with spaces"},
      {"run:\n  \tname: x\n", "f.yaml:2: tab in the indentation; indent with spaces"},
      {"run: {name: x\n", "f.yaml:1: not valid YAML (end of map flow not found)"},
      {"run:\n  name: \"x\n  seed: 4\n",
       "f.yaml:3: not valid YAML: a quote opened before is never closed; add the closing quote"},
      {"run:\n  name: 'x\n",
       "f.yaml:2: not valid YAML: a quote opened before is never closed; add the closing quote"},
      {"run:\n  name: a: b\n",
       "f.yaml:2: not valid YAML (illegal map value); check the indentation, and quote text that "
       "contains ': '"},
      {"run:\n  name: x\n---\nrun:\n  name: y\n",
       "f.yaml:3: a second document starts here ('---'), expected one per file; remove the line"},
      {"run:\n  name: !!str 5\n",
       "f.yaml:2: run.name: YAML tags are not supported, got 'tag:yaml.org,2002:str'; write the "
       "plain value"},
      {"run: {name: *x}\n", "f.yaml:1: not valid YAML (the referenced anchor is not defined)"},
      {"run: &a [*a]\n", "f.yaml:1: run[0]: the alias stands inside its own anchor"},
      {"? [a]\n: 1\n", "f.yaml:1: expected a key as plain text"},
      {"run: {name: \xff}\n", "f.yaml:1: not UTF-8 text; save the file as UTF-8"},
      {"run: {name: \xc0\x80}\n", "f.yaml:1: not UTF-8 text; save the file as UTF-8"},
      {"\xff\xfer\0u\0n\0", "f.yaml:1: not UTF-8 text; save the file as UTF-8"},
      {"run: {name: a\x01}\n",
       "f.yaml:1: control character with code 1; remove it or write \"\\x..\""},
      {std::string("run: {name: a\0}\n", 17),
       "f.yaml:1: control character with code 0; remove it or write \"\\x..\""},
  });
  CHECK(parse_config("\xef\xbb\xbfrun: {name: x}\n", "f").run.name == "x");
  CHECK(parse_config("run:\r\n  name: x\r\n", "f").run.name == "x");
}

TEST_CASE("aliases work within bounds, nesting is bounded") {
  CHECK(parse_config("sample: {prompts: &p [a, b]}\nrun: {name: &n first}\ndata: {text: *n}", "f")
            .data.text == "first");
  std::string bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 40; ++i) {
    const std::string before = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + before;
    for (int k = 1; k < 10; ++k) bomb += "," + before;
    bomb += "]\n";
  }
  CHECK(parse_message(bomb).find("more than 100000 values once aliases are expanded") !=
        std::string::npos);
  const auto nested = [](int depth, const char* open) {
    std::string text = "a: ";
    for (int i = 0; i < depth; ++i) text += open;
    return text;
  };
  for (const char* open : {"[", "{a: ", "[{a: "}) {
    const std::string message = parse_message(nested(100000, open));
    CHECK(message.find("nested deeper than 16 levels") != std::string::npos);
  }
  std::string block;
  for (int i = 0; i < 1000; ++i) block += std::string(static_cast<size_t>(i), ' ') + "a:\n";
  CHECK(parse_message(block).find("nested deeper than 16 levels") != std::string::npos);
  CHECK(parse_message(std::string(1100000, '#')).find("larger than 1 MiB") != std::string::npos);
}

TEST_CASE("random damage gives a configuration or one line of error") {
  const std::string good =
      print_config(parse_config("model: {slstm_at: [1, 3]}\ndata: {train: [{path: a}]}", "f"));
  std::mt19937 random(7);
  const std::string nasty = "\n\t :-[]{}\"'&*!|>%@`#,?\\0123abc\x80\xff";
  int loaded = 0, refused = 0;
  for (int trial = 0; trial < 1500; ++trial) {
    std::string text = good;
    for (unsigned change = random() % 4 + 1; change > 0; --change) {
      const size_t place = random() % text.size();
      const size_t kind = random() % 3;
      if (kind == 0) text[place] = nasty[random() % nasty.size()];
      if (kind == 1) text.insert(place, 1, nasty[random() % nasty.size()]);
      if (kind == 2) text.erase(place, random() % 40 + 1);
    }
    const std::string message = parse_message(text);
    (message.empty() ? loaded : refused) += 1;
    if (message.empty()) continue;
    INFO(text);
    REQUIRE(message.starts_with("f.yaml"));
    REQUIRE(message.find('\n') == std::string::npos);
  }
  CHECK(loaded > 100);
  CHECK(refused > 300);
}

}  // namespace xlstm::config
