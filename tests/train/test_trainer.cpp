// The training loop on a tiny model: exact accumulation, the guard before the update, and resuming
// to the bit.
#include <ATen/CPUGeneratorImpl.h>
#include <unistd.h>

#include <chrono>
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

#include "csrc/core/sha256.h"
#include "csrc/data/prepare.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"
#include "train/checkpoint.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/random_streams.h"
#include "train/recorder.h"
#include "train/saver.h"
#include "train/signals.h"
#include "train/train_step.h"
#include "train/trainer.h"

using namespace xlstm;
using namespace xlstm::train;
namespace fs = std::filesystem;

namespace {

config::Config tiny_config(const testing::TemporaryFolder& folder) {
  const std::string prefix = (folder / "tokens").string();
  if (!fs::exists(prefix + ".bin")) {
    std::ofstream text(folder / "text.txt");
    for (int i = 0; i < 400; ++i) text << "line " << i * i << " of a small text, " << i % 7 << "\n";
    text.close();
    data::PrepareOptions options;
    options.inputs = {(folder / "text.txt").string()};
    options.output_prefix = prefix;
    data::prepare(options);
  }
  config::Config config;
  config.run.out_dir = (folder / "runs").string();
  config.model.embedding_dim = 16;
  config.model.num_blocks = 2;
  config.model.num_heads = 2;
  config.model.slstm_at = {1};
  config.model.dropout = 0.1;  // the random stream must be resumed too
  config.data.train = {{prefix, 1.0}};
  config.data.val = prefix;
  config.data.seq_len = 16;
  config.train.global_batch_size = 4;
  config.train.max_steps = 20;
  config.optim.warmup_steps = 5;
  config.ckpt.every = 10;
  config.eval.every = 7;
  config.eval.batches = 2;
  config.log.every = 1;
  config.log.console = "off";
  config.log.plot = false;
  return config;
}

/// sha256 of the files that hold weights and optimizer state.
std::string hash_of(const std::string& checkpoint) {
  return sha256_file(checkpoint + "/model.safetensors") +
         sha256_file(checkpoint + "/optim-rank00000.safetensors");
}

std::string sha256_of_parameters(const models::LanguageModel& model) {
  std::string all;
  for (const auto& [name, parameter] : named_parameters(model)) {
    const at::Tensor dense = parameter.detach().contiguous();
    all.append(static_cast<const char*>(dense.const_data_ptr()), dense.nbytes());
  }
  return sha256_hex(all);
}

std::map<int64_t, std::string> losses(const std::string& run) {
  std::map<int64_t, std::string> result;
  std::ifstream file(run + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line);
    if (json.contains("train/loss_hex")) result[json["step"]] = json["train/loss_hex"];
  }
  return result;
}

ExitCode train_once(const config::Config& config) {
  clear_stop_request();
  set_console_verbosity(Verbosity::kQuiet);
  return Trainer(config, {}).run();
}

}  // namespace

TEST_CASE("micro batches give the gradient of the whole batch, masked targets or not") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.model.dropout = 0;
  at::Generator(at::detail::getDefaultCPUGenerator()).set_current_seed(1);
  const auto model = models::make_language_model(config.model);
  model->to(at::kDouble);
  AdamW optimizer(named_parameters(*model), config.optim);
  data::Batch host;
  host.batch_size = 4;
  host.seq_len = 6;
  host.reset.assign(24, 0);
  for (int64_t i = 0; i < 24; ++i) {
    host.input.push_back(i * 7 % 256);
    host.target.push_back(i < 11 ? -100 : i * 5 % 256);  // the first micro batch has one target
  }
  host.num_targets = 13;
  host.reset[14] = 1;
  const TrainBatch batch(std::move(host));

  const auto gradients = [&](int64_t micro, double& loss) {
    config.train.micro_batch_size = micro;
    TrainStep step(*model, optimizer, config);
    loss = step.accumulate_gradients(batch);
    std::map<std::string, at::Tensor> result;
    for (const auto& [name, p] : named_parameters(*model)) {
      if (p.grad().defined()) result[name] = p.grad().clone();
    }
    optimizer.zero_grad();
    return result;
  };
  // The mean over targets by definition, through autograd alone.
  const at::Tensor mean = model->loss(batch.ids, batch.targets, batch.reset, "mean");
  double whole = 0, split = 0;
  const auto one = gradients(0, whole);
  const auto two = gradients(2, split);
  const auto odd = gradients(3, split);
  CHECK(whole == Approx(mean.item<double>()).epsilon(1e-12));
  CHECK(split == Approx(whole).epsilon(1e-12));
  for (const auto& [name, gradient] : one) {
    INFO(name);
    CHECK((gradient - two.at(name)).abs().max().item<double>() < 1e-12);
    CHECK((gradient - odd.at(name)).abs().max().item<double>() < 1e-12);
  }
}

TEST_CASE("a batch without a target has the loss 0 and gradients of 0") {
  const testing::TemporaryFolder folder;
  const config::Config config = tiny_config(folder);
  const auto model = models::make_language_model(config.model);
  AdamW optimizer(named_parameters(*model), config.optim);
  data::Batch host(2, 5);
  host.input.assign(10, 7);
  CHECK(TrainStep(*model, optimizer, config).accumulate_gradients(TrainBatch(std::move(host))) ==
        0);
  for (const auto& [name, parameter] : named_parameters(*model))
    if (parameter.grad().defined()) CHECK(parameter.grad().abs().max().item<double>() == 0);
}

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

TEST_CASE("the best checkpoint whose save has failed leaves the one before in place") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.ckpt.keep_best = true;
  config.ckpt.keep_last = 1;
  const auto model = models::make_language_model(config.model);
  const AdamW optimizer(named_parameters(*model), config.optim);
  ProcessGroup alone({}, at::kCPU);
  Recorder recorder(config, 20, at::kCPU, "off");
  const std::string run = (folder / "").string();
  Saver saver(config, run, *model, optimizer, nullptr, at::kCPU, alone, recorder);
  fs::create_directories(folder / "ckpt");
  TrainerState state;
  const auto save = [&](int64_t step, double loss) {
    state.step = step;
    state.best.count(step, loss);
    saver.save(state, /*last=*/false);
    return list_checkpoints(run).size();
  };
  CHECK(save(1, 3) == 1);
  CHECK(save(2, 4) == 2);
  fs::rename(folder / "ckpt", folder / "away");
  CHECK(save(3, 2) == 0);
  fs::rename(folder / "away", folder / "ckpt");
  CHECK(save(4, 5) == 2);
  CHECK(fs::read_symlink(folder / "ckpt/best") == "step-00000001");
  CHECK(save(5, 1) == 1);
  CHECK(fs::read_symlink(folder / "ckpt/best") == "step-00000005");
  CHECK(save(6, 2) == 2);
}

TEST_CASE("saves that fail are counted from the last one that did not") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.ckpt.max_failed_saves = 2;
  const auto model = models::make_language_model(config.model);
  const AdamW optimizer(named_parameters(*model), config.optim);
  ProcessGroup alone({}, at::kCPU);
  Recorder recorder(config, 20, at::kCPU, "off");
  Saver saver(config, (folder / "").string(), *model, optimizer, nullptr, at::kCPU, alone,
              recorder);
  TrainerState state;
  const auto save = [&](bool possible) {  // there must be a folder for checkpoints
    possible ? fs::create_directories(folder / "ckpt") : fs::remove_all(folder / "ckpt") > 0;
    ++state.step;
    saver.save(state, /*last=*/false);
  };
  CHECK_NOTHROW(save(false));
  CHECK_NOTHROW(save(true));
  CHECK_NOTHROW(save(false));
  CHECK_THROWS_AS(save(false), Error);
}

TEST_CASE("every process and step draws from a stream of its own, a single process from one") {
  std::set<double> drawn;
  for (const int64_t rank : {0, 1, 2}) {
    for (const int64_t step : {1, 2, 3}) {
      seed_step_of_process(at::kCPU, 42, step, {rank, 3});
      drawn.insert(at::rand({}, at::kDouble).item<double>());
    }
  }
  CHECK(drawn.size() == 9);
  seed_random_streams(at::kCPU, 1);
  const at::Tensor wanted = at::rand({4});
  seed_random_streams(at::kCPU, 1);
  seed_step_of_process(at::kCPU, 42, 5, {});
  CHECK(at::equal(at::rand({4}), wanted));
}

TEST_CASE("a random stream is not touched while another thread has it") {
  TrainerState state;
  store_random_streams(at::kCPU, state);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  for (const std::function<void()>& touch :
       {std::function<void()>([] { seed_random_streams(at::kCPU, 1); }),
        std::function<void()>([&] { store_random_streams(at::kCPU, state); }),
        std::function<void()>([&] { restore_random_streams(at::kCPU, state); })}) {
    std::unique_lock lock(generator.mutex());
    auto done = std::async(std::launch::async, touch);
    CHECK(done.wait_for(std::chrono::milliseconds(50)) == std::future_status::timeout);
    lock.unlock();
    done.get();
  }
}

/// A GPU runs ahead of the host: what follows a bad step must do nothing until the host has seen it.
TEST_CASE("with nonfinite=stop nothing is updated after a bad step") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  const auto model = models::make_language_model(config.model);
  AdamW optimizer(named_parameters(*model), config.optim);
  TrainStep step(*model, optimizer, config);
  const auto batch = [] {
    data::Batch host;
    host.batch_size = 1, host.seq_len = 5, host.num_targets = 5;
    host.input = {1, 2, 3, 4, 5}, host.target = {2, 3, 4, 5, 6}, host.reset.assign(5, 0);
    return TrainBatch(std::move(host));
  };
  CHECK(step.run(batch(), 1, 10)->finite);
  ::setenv("XLSTM_FAILPOINT", "trainer.nan_grad:2", 1);
  const std::string before = sha256_of_parameters(*model);
  const auto bad = step.run(batch(), 2, 11);
  ::unsetenv("XLSTM_FAILPOINT");
  CHECK(!bad->finite);
  CHECK(bad->step == 2);
  CHECK(bad->first_sample == 11);
  CHECK(bad->last_sample == 11);
  CHECK(step.run(batch(), 3)->finite);
  CHECK(sha256_of_parameters(*model) == before);
  CHECK(optimizer.steps() == 1);
  CHECK(!step.finish().has_value());
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
