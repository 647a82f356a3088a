// The training loop on a tiny model: it learns, stops, and resumes to the bit.
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>

#include "csrc/core/safetensors.h"
#include "tests/support/catch.h"
#include "tests/train/tiny_training.h"
#include "train/checkpoint.h"
#include "train/metrics.h"

using namespace xlstm;
using namespace xlstm::train;
namespace fs = std::filesystem;

TEST_CASE("a run stopped by a signal and resumed has the bits of one that was not") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.optim.restarts = 2;  // the run stops in the second of three descents
  config.run.name = "whole";
  REQUIRE(train_once(config) == ExitCode::kOk);
  const std::string whole = (folder / "runs/whole").string();

  config.run.name = "halved";
  const std::string halved = (folder / "runs/halved").string();
  install_signal_handlers();
  clear_stop_request();
  ::setenv("XLSTM_FAILPOINT", "trainer.raise_sigterm:13", 1);
  CHECK(Trainer(config, {}).run() == ExitCode::kPreempted);
  ::unsetenv("XLSTM_FAILPOINT");
  CHECK(fs::exists(halved + "/ckpt/step-00000013"));
  REQUIRE(train_once(config) == ExitCode::kOk);

  CHECK(hash_of(whole + "/ckpt/step-00000020") == hash_of(halved + "/ckpt/step-00000020"));
  CHECK(losses(whole).size() == 20);
  CHECK(losses(whole) == losses(halved));

  SECTION("a finished run changes nothing") {
    const std::string before = hash_of(halved + "/ckpt/step-00000020");
    CHECK(train_once(config) == ExitCode::kOk);
    CHECK(hash_of(halved + "/ckpt/step-00000020") == before);
  }
  SECTION("a bad newest checkpoint is passed over, and training reaches the same bits") {
    std::fstream file(halved + "/ckpt/step-00000020/model.safetensors",
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(2000);
    file.put('\x55');
    file.close();
    CHECK(train_once(config) == ExitCode::kOk);
    CHECK(hash_of(whole + "/ckpt/step-00000020") == hash_of(halved + "/ckpt/step-00000020"));
    CHECK(fs::exists(halved + "/ckpt/old-1/step-00000020"));
    CHECK(losses(whole) == losses(halved));
  }
  SECTION("a named checkpoint, longer training") {
    config.run.resume = "step-10";
    config.train.max_steps = 22;
    CHECK(train_once(config) == ExitCode::kOk);
    CHECK(fs::exists(halved + "/ckpt/step-00000022"));
    CHECK(fs::exists(halved + "/metrics.jsonl.bak"));
  }
  SECTION("another model is refused by name") {
    config.model.embedding_dim = 32;
    try {
      train_once(config);
      FAIL("expected an error");
    } catch (const Error& error) {
      CHECK(error.code == ExitCode::kConfig);
      CHECK(std::string(error.what()).find("model.embedding_dim: 32 now") != std::string::npos);
    }
  }
}

TEST_CASE("a run that carries states is resumed with them") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.run.name = "fresh_states";
  REQUIRE(train_once(config) == ExitCode::kOk);
  config.train.carry_state = true;
  config.train.micro_batch_size = 2;
  config.run.name = "whole";
  REQUIRE(train_once(config) == ExitCode::kOk);
  config.run.name = "halved";
  install_signal_handlers();
  clear_stop_request();
  ::setenv("XLSTM_FAILPOINT", "trainer.raise_sigterm:13", 1);
  CHECK(Trainer(config, {}).run() == ExitCode::kPreempted);
  ::unsetenv("XLSTM_FAILPOINT");
  REQUIRE(train_once(config) == ExitCode::kOk);

  const std::string whole = (folder / "runs/whole").string();
  const std::string halved = (folder / "runs/halved").string();
  const std::string last = "/ckpt/step-00000020";
  CHECK(losses(whole).size() == 20);
  CHECK(losses(whole) == losses(halved));
  CHECK(losses(whole) != losses((folder / "runs/fresh_states").string()));
  CHECK(hash_of(whole + last) == hash_of(halved + last));
  CHECK(sha256_file(whole + last + "/carried.safetensors") ==
        sha256_file(halved + last + "/carried.safetensors"));
  CHECK_FALSE(fs::exists(folder / "runs/fresh_states" / last.substr(1) / "carried.safetensors"));
  config.train.carry_state = false;
  CHECK_THROWS_AS(train_once(config), Error);  // not the same run
}

TEST_CASE("a task is learnt, judged by its accuracy, and resumed to the bit") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.model.vocab_size = 3;
  config.model.num_blocks = 1;
  config.model.slstm_at = {0};
  config.model.dropout = 0;
  config.data = {};
  config.data.seq_len = 12;
  config.data.task.name = "even_pairs";
  config.train.global_batch_size = 32;
  config.train.max_steps = 160;
  config.optim.learning_rate = 1e-2;
  config.ckpt.every = 0;
  config.eval.every = 0;
  config.eval.batches = 0;
  config.run.name = "whole";
  REQUIRE(train_once(config) == ExitCode::kOk);
  const std::string whole = (folder / "runs/whole").string();
  CHECK(last_value(whole + "/metrics.jsonl", "val/accuracy") > 0.95);
  CHECK(last_value(whole + "/metrics.jsonl", "val/scaled_accuracy") > 0.9);

  config.run.name = "halved";
  install_signal_handlers();
  clear_stop_request();
  ::setenv("XLSTM_FAILPOINT", "trainer.raise_sigterm:70", 1);
  CHECK(Trainer(config, {}).run() == ExitCode::kPreempted);
  ::unsetenv("XLSTM_FAILPOINT");
  REQUIRE(train_once(config) == ExitCode::kOk);
  const std::string last = "/ckpt/step-00000160";
  CHECK(hash_of(whole + last) == hash_of((folder / "runs/halved").string() + last));
  config.data.task.key_values = 5;
  config.data.shuffle_seed = 7;
  CHECK_THROWS_AS(train_once(config), Error);  // other samples: not the same run
}

TEST_CASE("numbers are predicted from real vectors, judged by their squared error") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.model.vocab_size = 1;
  config.model.input_features = 3;
  config.model.dropout = 0;
  config.data = {};
  config.data.seq_len = 6;
  config.data.task.name = "nns";
  config.data.task.eval_samples = 300;
  config.train.global_batch_size = 32;
  config.train.micro_batch_size = 16;
  config.train.max_steps = 200;
  config.optim.learning_rate = 1e-2;
  config.ckpt.every = 0;
  config.eval.every = 0;
  config.eval.batches = 0;
  REQUIRE(train_once(config) == ExitCode::kOk);
  const std::string metrics = (folder / "runs/run/metrics.jsonl").string();
  // Predicting the mean gives 1/12 = 0.083 everywhere.
  CHECK(last_value(metrics, "val/loss") < 0.05);
  CHECK(last_value(metrics, "val/last_error") < 0.07);
}

/// model.fused only chooses operators: the losses of a run agree to the rounding of float32, though not to the bit.
TEST_CASE("fused operators and single steps train alike") {
  const std::string kind = GENERATE("xlstm", "xlstm_large");
  CAPTURE(kind);
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.model.kind = kind;
  if (kind == "xlstm_large") config.model.slstm_at.clear();
  config.model.dropout = 0;
  config.model.output_logit_soft_cap = 30;
  config.train.max_steps = 50;
  config.ckpt.every = 0;
  config.eval.every = 0;
  std::map<int64_t, std::string> hex[2];
  for (const bool fused : {false, true}) {
    config.model.fused = fused;
    config.run.name = fused ? "fused" : "steps";
    REQUIRE(train_once(config) == ExitCode::kOk);
    hex[fused] = losses((folder / "runs" / config.run.name).string());
  }
  REQUIRE(hex[0].size() == 50);
  REQUIRE(hex[1].size() == 50);
  const auto value = [](const std::string& text) { return std::strtod(text.c_str(), nullptr); };
  double worst = 0;
  for (const auto& [step, loss] : hex[0])
    worst = std::max(worst, std::abs(value(loss) / value(hex[1].at(step)) - 1));
  CAPTURE(worst);
  CHECK(worst < 3e-6);      // the last step's included: training that only drifts would show here
  CHECK(hex[0] != hex[1]);  // two paths, not one twice
  CHECK(value(hex[0].at(50)) < value(hex[0].at(1)) - 0.5);
}

TEST_CASE("a gradient that is not finite changes nothing") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.train.max_steps = 6;
  ::setenv("XLSTM_FAILPOINT", "trainer.nan_grad:4", 1);
  SECTION("stop") {
    try {
      train_once(config);
      FAIL("expected an error");
    } catch (const Error& error) {
      CHECK(error.code == ExitCode::kNonFinite);
      const std::string message = error.what();
      CHECK(message.find("step 4") != std::string::npos);
      CHECK(message.find("samples 12 to 15") != std::string::npos);
      CHECK(message.find(".weight") != std::string::npos);
    }
    CHECK(!fs::exists(folder / "runs/run/ckpt/step-00000006"));
  }
  SECTION("skip") {
    config.train.nonfinite = "skip";
    CHECK(train_once(config) == ExitCode::kOk);
    const SafetensorsFile optimizer = load_safetensors(
        (folder / "runs/run/ckpt/step-00000006/optim-rank00000.safetensors").string());
    CHECK(optimizer.tensors.at("step").item<float>() == 5);  // six steps, one of them skipped
    config.train.max_steps = 8;
    CHECK(train_once(config) == ExitCode::kOk);  // goes on, and knows of the skipped one
    const auto last = open_checkpoint((folder / "runs/run/ckpt/step-00000008").string(), true);
    CHECK(checkpoint_state(last)->skipped_updates == 1);
  }
  ::unsetenv("XLSTM_FAILPOINT");
}

TEST_CASE("a run ends after eval.patience evaluations without a lower loss, and keeps the best") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.optim.learning_rate =
      1e-30;  // no weight changes: every evaluation has the first one's loss
  config.optim.min_lr = 0;
  config.ckpt.every = 5;
  config.ckpt.keep_last = 1;
  config.ckpt.keep_best = true;
  config.eval.every = 4;
  config.eval.patience = 2;
  const fs::path ckpt = folder / "runs/run/ckpt";
  const auto names = [&] {
    std::set<std::string> all;
    for (const auto& entry : fs::directory_iterator(ckpt)) all.insert(entry.path().filename());
    return all;
  };
  const auto events = [&] {
    std::vector<std::string> all;
    std::ifstream file(folder / "runs/run/metrics.jsonl");
    for (std::string line; std::getline(file, line);) {
      const auto json = nlohmann::json::parse(line);
      if (json.contains("event")) all.push_back(json["event"]);
    }
    return all;
  };
  CHECK(train_once(config) == ExitCode::kOk);
  CHECK(names() == std::set<std::string>{"best", "step-00000004", "step-00000012"});
  CHECK(fs::read_symlink(ckpt / "best") == "step-00000004");
  CHECK(events() == std::vector<std::string>{"start", "early_stop", "end"});
  CHECK(train_once(config) == ExitCode::kOk);  // it is finished
  CHECK(events().size() == 3);
  CHECK(names().size() == 3);

  config.eval.patience = 3;
  CHECK(train_once(config) == ExitCode::kOk);
  CHECK(names() == std::set<std::string>{"best", "step-00000004", "step-00000016"});
  config.eval.patience = 0;
  CHECK(train_once(config) == ExitCode::kOk);
  CHECK(names() == std::set<std::string>{"best", "step-00000004", "step-00000020"});
  CHECK(fs::read_symlink(ckpt / "best") == "step-00000004");
  CHECK(events().back() == "end");
}

TEST_CASE("bfloat16 training with accumulation falls too") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.train.dtype = "bfloat16";
  config.train.micro_batch_size = 2;
  config.train.max_steps = 40;
  config.optim.learning_rate = 1e-2;
  CHECK(train_once(config) == ExitCode::kOk);
  const auto hex = losses((folder / "runs/run").string());
  const auto value = [&](int64_t step) { return std::strtod(hex.at(step).c_str(), nullptr); };
  CHECK(value(1) == Approx(std::log(256.0)).epsilon(0.1));
  CHECK(value(40) < value(1) - 1);
}
