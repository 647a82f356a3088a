#include <unistd.h>

#include <fstream>
#include <functional>
#include <set>

#include "csrc/config/schema.h"
#include "csrc/core/error.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"
#include "train/run_folder.h"

using namespace xlstm;
using namespace xlstm::train;
namespace fs = std::filesystem;

namespace {

config::RunConfig run_in(const testing::TemporaryFolder& folder) {
  config::RunConfig run;
  run.out_dir = (folder / "runs").string();
  run.name = "demo";
  return run;
}

/// Message and code of the Error that `body` throws.
std::pair<std::string, ExitCode> error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return {error.what(), error.code};
  }
  return {"", ExitCode::kOk};
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("one process per run folder") {
  const testing::TemporaryFolder folder;
  {
    const RunFolder first(run_in(folder), false);
    CHECK(!first.held_run());
    const auto [message, code] = error_of([&] { RunFolder(run_in(folder), false); });
    CHECK(code == ExitCode::kCheckpoint);
    CHECK(holds(message, "pid " + std::to_string(::getpid())));
  }
  const RunFolder again(run_in(folder), false);
  CHECK(!again.held_run());
}

TEST_CASE("a run folder that cannot be one is refused before anything is written") {
  const testing::TemporaryFolder folder;
  fs::create_directories(folder / "runs");
  SECTION("a file in its place") {
    std::ofstream(folder / "runs/demo") << "x";
    const auto [message, code] = error_of([&] { RunFolder(run_in(folder), false); });
    CHECK(code == ExitCode::kCheckpoint);
    CHECK(holds(message, "is a file"));
    CHECK(holds(message, "run.out_dir="));
  }
  SECTION("a file above it") {
    std::ofstream(folder / "file") << "x";
    config::RunConfig run = run_in(folder);
    run.out_dir = (folder / "file/runs").string();
    CHECK(error_of([&] { RunFolder(run, false); }).second == ExitCode::kCheckpoint);
  }
  SECTION("a file system that cannot be written") {
    config::RunConfig run = run_in(folder);
    run.out_dir = "/proc/runs";
    const auto [message, code] = error_of([&] { RunFolder(run, false); });
    CHECK(code == ExitCode::kCheckpoint);
    CHECK(holds(message, "cannot be written"));
  }
  SECTION("a ckpt that leads nowhere") {
    fs::create_directories(folder / "runs/demo");
    fs::create_symlink(folder / "unmounted", folder / "runs/demo/ckpt");
    const auto [message, code] = error_of([&] { RunFolder(run_in(folder), false); });
    CHECK(code == ExitCode::kCheckpoint);
    CHECK(holds(message, "a link to a folder that is not there"));
    fs::create_directory(folder / "unmounted");
    CHECK(RunFolder(run_in(folder), false).held_run());
  }
  SECTION("somebody else's files") {
    fs::create_directories(folder / "runs/demo");
    std::ofstream(folder / "runs/demo/thesis.tex") << "x";
    CHECK(holds(error_of([&] { RunFolder(run_in(folder), false); }).first, "not a run"));
    CHECK(fs::exists(folder / "runs/demo/thesis.tex"));
  }
}

TEST_CASE("--fresh moves the old run aside and loses nothing") {
  const testing::TemporaryFolder folder;
  for (int number = 1; number <= 2; ++number) {
    { RunFolder(run_in(folder), true).start_over(); }
    std::ofstream(folder / "runs/demo/run.json") << number;
  }
  RunFolder third(run_in(folder), true);
  CHECK(!third.held_run());
  CHECK(fs::exists(folder / "runs/demo/run.json"));  // until it is known that the new run can start
  CHECK(third.start_over() == (folder / "runs/demo.old-2").string());
  CHECK(!fs::exists(folder / "runs/demo/run.json"));
  CHECK(third.start_over().empty());
  CHECK(holds(error_of([&] { RunFolder(run_in(folder), false); }).first, "trains here"));
  CHECK(fs::exists(folder / "runs/demo.old-1/run.json"));
  CHECK(fs::exists(folder / "runs/demo.old-2/run.json"));
}

TEST_CASE("resume never does not touch a run") {
  const testing::TemporaryFolder folder;
  config::Config config;
  config.run = run_in(folder);
  config.run.resume = "never";
  {
    const RunFolder first(config.run, false);
    CHECK(!choose_checkpoint(config, first.held_run()).has_value());
    std::ofstream(first.file("run.json")) << "{}";
  }
  const RunFolder second(config.run, false);
  const auto [message, code] = error_of([&] { choose_checkpoint(config, second.held_run()); });
  CHECK(code == ExitCode::kCheckpoint);
  CHECK(holds(message, "--fresh"));
  config.run.resume = "step-7";
  CHECK(holds(error_of([&] { choose_checkpoint(config, second.held_run()); }).first,
              "no checkpoint step-7"));
}

TEST_CASE("checkpoint folders by name") {
  CHECK(checkpoint_step("runs/a/ckpt/step-00001000") == 1000);
  CHECK(checkpoint_step("step-7") == 7);
  CHECK(checkpoint_step("step-") == -1);
  CHECK(checkpoint_step("step-12x") == -1);
  CHECK(checkpoint_step("ckpt-00001000") == -1);
}

TEST_CASE("checkpoints beyond the resumed step are set aside") {
  const testing::TemporaryFolder folder;
  const RunFolder run(run_in(folder), false);
  const auto make = [&](const std::string& step, bool committed = true) {
    fs::create_directories(run.file("ckpt/" + step));
    if (committed) std::ofstream(run.file("ckpt/" + step + "/MANIFEST.json")) << "{}";
  };
  for (const char* step : {"step-00000010", "step-00000011", "step-00000030"}) make(step);
  make("step-00000040", /*committed=*/false);  // left by a crash
  set_aside_later_checkpoints(run, 10);
  CHECK(fs::exists(run.file("ckpt/step-00000010")));
  CHECK(!fs::exists(run.file("ckpt/step-00000011")));
  CHECK(fs::exists(run.file("ckpt/old-1/step-00000011")));
  CHECK(fs::exists(run.file("ckpt/old-1/step-00000030")));
  CHECK(fs::exists(run.file("ckpt/step-00000040")));
  set_aside_later_checkpoints(run, 10);
  CHECK(!fs::exists(run.file("ckpt/old-2")));
  make("step-00000020");
  fs::create_symlink(folder / "unmounted", run.file("ckpt/old-2"));
  const auto [message, code] = error_of([&] { set_aside_later_checkpoints(run, 10); });
  CHECK(code == ExitCode::kCheckpoint);
  CHECK(holds(message, "step 10 cannot be set aside within " + run.file("ckpt") + ": "));
}

TEST_CASE("the folder where a run was started is found by every name of its checkpoints") {
  const testing::TemporaryFolder folder;
  const RunFolder run(run_in(folder), false);
  fs::create_directories(folder / "disk/step-00000010");
  fs::create_symlink(folder / "disk", run.file("ckpt"));
  fs::create_directories(run.file("elsewhere/step-00000010"));
  fs::create_symlink(run.file("elsewhere/step-00000010"), folder / "best");
  const std::string started = (folder / "runs").string();
  std::ofstream(run.file("run.json")) << "{\"folder\": \"" << started << "\"}";
  for (const std::string& checkpoint :
       {run.file("ckpt/step-00000010"), run.file("ckpt/step-00000010/"),
        run.file("ckpt/../ckpt/step-00000010"), (folder / "best").string()})
    CHECK(recorded_start_folder(checkpoint) == started);
  CHECK(recorded_start_folder((folder / "disk/step-00000010").string()).empty());
}

namespace {

/// Another value of a setting, whatever its type.
struct Changer {
  void operator()(int64_t* value) const { *value += 2; }
  void operator()(double* value) const { *value += 0.125; }
  void operator()(bool* value) const { *value = !*value; }
  void operator()(std::string* value) const { *value += "x"; }
  void operator()(std::vector<int64_t>* value) const { value->push_back(1); }
  void operator()(std::vector<std::string>* value) const { value->push_back("x"); }
  void operator()(std::vector<config::DataSource>* value) const { value->push_back({"x", 1}); }
};

}  // namespace

TEST_CASE("processes of a run must agree, but on where their files are") {
  const std::set<std::string> of_each = {
      "run.out_dir", "run.num_threads", "data.text",      "data.val_text",  "data.train",
      "data.val",    "data.tokenizer",  "data.cache_dir", "data.task.path", "train.init_from"};
  size_t free = 0;
  for (const config::Field& field : config::schema()) {
    config::Config own, leader;
    std::visit(Changer(), field.ref(own));
    INFO(field.name);
    const std::string found = differing_setting(own, leader);
    if (found.empty()) {
      ++free;
      CHECK(of_each.count(field.name) == 1);
    } else {
      CHECK(found == field.name + ": " + config::format_value(field.ref(own)) + " here, " +
                         config::format_value(field.ref(leader)) + " in process 0");
    }
  }
  CHECK(free == of_each.size());
}

TEST_CASE("a run goes on with its own model and data alone, and everything else may change") {
  const std::set<std::string> may_change = {
      // rounding, memory or time
      "model.activation_checkpointing", "model.chunk_size", "model.fused", "model.slstm.recompute",
      // first weights
      "model.embedding_init_std", "model.slstm.bias_init", "model.slstm.recurrent_weight_init",
      // how it is trained
      "model.dropout", "model.add_embedding_dropout", "model.slstm.recurrent_clip",
      "model.slstm.recurrent_cut"};
  const std::set<std::string> others = {"train.global_batch_size",
                                        "train.carry_state",
                                        "data.seq_len",
                                        "data.shuffle",
                                        "data.shuffle_seed",
                                        "data.reset_state_at_document",
                                        "data.mask_loss_across_documents"};
  size_t refused = 0;
  for (const config::Field& field : config::schema()) {
    config::Config now, saved;
    std::visit(Changer(), field.ref(now));
    const auto [message, code] = error_of([&] { check_same_run(now, saved, "runs/a"); });
    INFO(field.name);
    const bool model = field.name.starts_with("model.") && may_change.count(field.name) == 0;
    if (!model && others.count(field.name) == 0) {
      CHECK(message.empty());
      continue;
    }
    ++refused;
    CHECK(code == ExitCode::kConfig);
    CHECK(message == field.name + ": " + config::format_value(field.ref(now)) +
                         " now, but the run in runs/a was trained with " +
                         config::format_value(field.ref(saved)) +
                         "; put it back, or start over with --fresh");
  }
  CHECK(refused > 35);
  for (const auto* names : {&may_change, &others})
    for (const std::string& name : *names) CHECK(config::find_field(name) != nullptr);
}

TEST_CASE("settings that must not change are named") {
  const config::Config saved;
  const auto message_with = [&](const std::function<void(config::Config&)>& change) {
    config::Config now;
    change(now);
    const auto [message, code] = error_of([&] { check_same_run(now, saved, "runs/a"); });
    CHECK(code == (message.empty() ? ExitCode::kOk : ExitCode::kConfig));
    return message;
  };
  CHECK(message_with([](config::Config& c) { c.train.max_steps = 99999; }).empty());
  CHECK(message_with([](config::Config& c) { c.optim.learning_rate = 7; }).empty());
  CHECK(message_with([](config::Config& c) { c.model.chunk_size = 32; }).empty());
  CHECK(message_with([](config::Config& c) { c.train.micro_batch_size = 2; }).empty());
  CHECK(holds(message_with([](config::Config& c) { c.train.global_batch_size = 3; }),
              "train.global_batch_size: 3 now"));
  CHECK(holds(message_with([](config::Config& c) { c.data.seq_len = 3; }), "data.seq_len"));
  CHECK(holds(message_with([](config::Config& c) {
                c.model.slstm_at = {0, 2};
              }),
              "model.slstm_at: [0, 2] now"));
  CHECK(holds(message_with([](config::Config& c) { c.model.tie_weights = true; }),
              "model.tie_weights: true now"));
}
