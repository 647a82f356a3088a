// What is saved of a run, and what happens where that fails.
#include <filesystem>

#include "tests/support/catch.h"
#include "tests/train/tiny_training.h"
#include "train/checkpoint.h"
#include "train/recorder.h"
#include "train/saver.h"
#include "train/train_step.h"

using namespace xlstm;
using namespace xlstm::train;
namespace fs = std::filesystem;

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
