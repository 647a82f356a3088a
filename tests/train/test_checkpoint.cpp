// Checkpoints: what is saved comes back bit by bit, and anything damaged is refused by name.
#include <ATen/ops/equal.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <signal.h>
#include <sys/resource.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <system_error>

#include "csrc/core/error.h"
#include "csrc/core/sha256.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"
#include "train/checkpoint.h"
#include "train/checkpoint_manifest.h"

using namespace xlstm;
using namespace xlstm::train;
namespace fs = std::filesystem;

namespace {

config::Config tiny_config() {
  config::Config config;
  config.model.embedding_dim = 16;
  config.model.num_blocks = 2;
  config.model.num_heads = 2;
  config.model.slstm_at = {1};
  config.train.max_steps = 10;
  return config;
}

NamedTensors tiny_optimizer() {
  return {
      {"exp_avg.0", at::randn({3, 5})}, {"exp_avg_sq.0", at::rand({3, 5})}, {"step", at::rand({})}};
}

TrainerState tiny_state(int64_t step) {
  TrainerState state;
  state.step = step;
  state.tokens = step * 4096 + (int64_t{1} << 53) + 1;  // no double can hold this
  state.samples_consumed = step * 16;
  state.skipped_updates = 3;
  state.data_fingerprint = "a:\"quoted\"\n\xC3\xA9";
  state.held_out_fingerprint = "sha256:b";
  state.best = {step - 1, 1.0 / 3, 1, step};
  state.rng_state = at::rand({5056}).mul(256).to(at::kByte);
  return state;
}

std::string save_step(const std::string& run, int64_t step) {
  const auto model = models::make_language_model(tiny_config().model);
  fs::create_directories(fs::path(run) / "ckpt");
  return save_checkpoint(run, tiny_config(), *model, tiny_optimizer(), tiny_state(step));
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void write(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// The message of the Error(kCheckpoint) that verifying throws; "" where it passes.
std::string verify_message(const std::string& folder) {
  try {
    check_manifest_hashes(folder, read_manifest(folder));
    return "";
  } catch (const Error& error) {
    REQUIRE(error.code == ExitCode::kCheckpoint);
    return error.what();
  }
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void no_warning(const std::string& message) { FAIL(message); }

/// Puts a manifest with these files in place, with a right checksum of its own.
void forge_manifest(const std::string& folder, const std::vector<ManifestEntry>& files,
                    int64_t version = 1) {
  Manifest manifest;
  manifest.format_version = version;
  manifest.files = files;
  write(fs::path(folder) / kManifestName, format_manifest(manifest));
}

}  // namespace

TEST_CASE("a checkpoint comes back bit by bit") {
  const testing::TemporaryFolder run;
  const auto config = tiny_config();
  const auto model = models::make_language_model(config.model);
  const auto optimizer = tiny_optimizer();
  const auto state = tiny_state(7);
  fs::create_directory(run / "ckpt");
  const std::string folder = save_checkpoint(run.string(), config, *model, optimizer, state);
  CHECK(folder == (run / "ckpt/step-00000007").string());
  CHECK(verify_message(folder).empty());

  const auto other = models::make_language_model(config.model);
  REQUIRE_FALSE(at::equal(other->head_weight(), model->head_weight()));
  const CheckpointFolder checkpoint = open_checkpoint(folder, true);
  load_weights(*other, checkpoint);
  const auto want = named_model_tensors(*model), got = named_model_tensors(*other);
  REQUIRE(want.size() == got.size());
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK(want[i].first == got[i].first);
    CHECK(at::equal(want[i].second, got[i].second));
  }
  CHECK(checkpoint.path == folder);
  const auto loaded = checkpoint_state(checkpoint);
  REQUIRE(loaded.has_value());
  CHECK(loaded->step == state.step);
  CHECK(loaded->tokens == state.tokens);
  CHECK(loaded->samples_consumed == state.samples_consumed);
  CHECK(loaded->skipped_updates == state.skipped_updates);
  CHECK(loaded->data_fingerprint == state.data_fingerprint);
  CHECK(loaded->held_out_fingerprint == state.held_out_fingerprint);
  CHECK(loaded->best.step == state.best.step);
  CHECK(loaded->best.loss == state.best.loss);  // to the bit
  CHECK(loaded->best.evaluations_since == state.best.evaluations_since);
  CHECK(loaded->best.last_step == state.best.last_step);
  CHECK(at::equal(loaded->rng_state, state.rng_state));
  const NamedTensors loaded_optimizer = checkpoint_optimizer(checkpoint);
  REQUIRE(loaded_optimizer.size() == optimizer.size());
  for (const auto& [name, tensor] : loaded_optimizer) {
    bool found = false;
    for (const auto& [own_name, own] : optimizer)
      found = found || (own_name == name && at::equal(own, tensor));
    CHECK(found);
  }
}

TEST_CASE("the manifest lists every file with the sha256 that other tools compute") {
  const testing::TemporaryFolder run;
  const std::string folder = save_step(run.string(), 1);
  const Manifest manifest = read_manifest(folder);
  size_t files = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name == kManifestName) continue;
    ++files;
    const ManifestEntry* listed = manifest.find(name);
    REQUIRE(listed != nullptr);
    CHECK(listed->bytes == static_cast<int64_t>(entry.file_size()));
    CHECK(listed->sha256 == sha256_hex(read(entry.path())));
  }
  CHECK(files == manifest.files.size());
  CHECK(files == 4);
}

TEST_CASE("every flipped bit is found and its file named") {
  const testing::TemporaryFolder run;
  const std::string folder = save_step(run.string(), 1);
  std::mt19937_64 random(20240607);
  int found = 0;
  const int trials_per_file = 40;
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) files.push_back(entry.path());
  REQUIRE(files.size() == 5);
  for (const auto& file : files) {
    const std::string good = read(file);
    for (int i = 0; i < trials_per_file; ++i) {
      std::string bad = good;
      const size_t bit = random() % (good.size() * 8);
      bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
      write(file, bad);
      const std::string message = verify_message(folder);
      if (contains(message, file.string())) ++found;
    }
    write(file, good);
  }
  CHECK(found == static_cast<int>(files.size()) * trials_per_file);
  CHECK(verify_message(folder).empty());
}

TEST_CASE("every single bit of a manifest counts") {
  const testing::TemporaryFolder run;
  const std::string folder = save_step(run.string(), 1);
  const fs::path path = fs::path(folder) / kManifestName;
  const std::string good = read(path);
  size_t missed = 0;
  for (size_t bit = 0; bit < good.size() * 8; bit += 3) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
    write(path, bad);
    if (!contains(verify_message(folder), path.string())) ++missed;
  }
  CHECK(missed == 0);
}

TEST_CASE("truncated, missing, grown and emptied files are named") {
  const testing::TemporaryFolder run;
  for (const char* name :
       {"model.safetensors", "optim-rank00000.safetensors", "trainer.json", "config.yaml"}) {
    const std::string folder = save_step(run.string(), 1);
    const fs::path file = fs::path(folder) / name;
    const std::string good = read(file);
    write(file, good.substr(0, good.size() / 2));
    CHECK(contains(verify_message(folder), file.string()));
    write(file, "");
    CHECK(contains(verify_message(folder), file.string()));
    write(file, good + "x");
    CHECK(contains(verify_message(folder), file.string()));
    std::string zeros = good;
    std::fill(zeros.begin() + static_cast<std::ptrdiff_t>(zeros.size() / 3), zeros.end(), '\0');
    write(file, zeros);
    CHECK(contains(verify_message(folder), file.string()));
    fs::remove(file);
    CHECK(contains(verify_message(folder), "missing"));
    CHECK_THROWS_AS(open_checkpoint(folder, true), Error);
    CHECK_THROWS_AS(open_checkpoint(folder, false), Error);
  }
}

TEST_CASE("a manifest cannot lead out of its folder") {
  const testing::TemporaryFolder run;
  const std::string folder = save_step(run.string(), 1);
  const std::string secret = (run / "secret").string();
  write(secret, "secret");
  const std::string hash = sha256_hex("secret");
  for (const std::string& name :
       {std::string("../secret"), std::string("../../secret"), secret, std::string(".."),
        std::string("."), std::string(""), std::string("a/b"), std::string(kManifestName),
        std::string("a\0b", 3)}) {
    forge_manifest(folder, {{name, 6, hash}});
    CHECK(contains(verify_message(folder), "plain file name"));
  }
  fs::create_symlink(secret, fs::path(folder) / "link");
  forge_manifest(folder, {{"link", 6, hash}});
  CHECK(contains(verify_message(folder), "not a regular file"));
  forge_manifest(folder, {{"config.yaml", -1, hash}});
  CHECK_FALSE(verify_message(folder).empty());
  forge_manifest(folder, {{"config.yaml", 6, "short"}});
  CHECK(contains(verify_message(folder), "sha256"));
  const std::string text = read(fs::path(folder) / "config.yaml");
  const ManifestEntry entry{"config.yaml", static_cast<int64_t>(text.size()), sha256_hex(text)};
  forge_manifest(folder, {entry, entry});
  CHECK(contains(verify_message(folder), "twice"));
  forge_manifest(folder, {entry});
  CHECK(verify_message(folder).empty());
  forge_manifest(folder, {entry}, 2);
  CHECK(contains(verify_message(folder), "checkpoint format 2"));
}

TEST_CASE("a model of other sizes is refused with every difference and the settings that differ") {
  const testing::TemporaryFolder run;
  const std::string folder = save_step(run.string(), 1);
  const auto message = [&](config::Config config) -> std::string {
    const auto model = models::make_language_model(config.model, at::kMeta);
    try {
      check_weights_fit(*model, open_checkpoint(folder, true));
    } catch (const Error& error) {
      REQUIRE(error.code == ExitCode::kCheckpoint);
      return error.what();
    }
    return "";
  };
  CHECK(message(tiny_config()).empty());
  auto config = tiny_config();
  config.model.vocab_size = 300;
  const std::string shapes = " has shape (256,16), the model's is (300,16)";
  const size_t first = message(config).find(shapes);
  REQUIRE(first != std::string::npos);
  CHECK(message(config).find(shapes, first + 1) != std::string::npos);
  CHECK(contains(message(config), folder + "/model.safetensors: does not fit the model"));
  CHECK(contains(message(config), "0 missing, 0 unexpected, 2 of another shape"));
  CHECK(message(config).ends_with("config.yaml: model.vocab_size=256 (here 300)"));
  config = tiny_config();
  config.model.num_blocks = 3;
  CHECK(contains(message(config), "is missing"));
  config.model.num_blocks = 1;
  config.model.slstm_at = {};
  CHECK(contains(message(config), "is not in the model"));

  const auto wide = models::make_language_model(tiny_config().model);
  wide->to(at::kDouble);
  const at::Tensor before = wide->head_weight().clone();
  CHECK_THROWS_AS(load_weights(*wide, open_checkpoint(folder, true)), Error);
  CHECK(at::equal(wide->head_weight(), before));
}

TEST_CASE("settings that change no tensor still make another model") {
  const testing::TemporaryFolder run;
  const CheckpointFolder checkpoint = open_checkpoint(save_step(run.string(), 1), true);
  auto config = tiny_config();
  CHECK(other_model_settings(checkpoint, config.model).empty());
  config.model.chunk_size *= 2;  // the same function
  CHECK(other_model_settings(checkpoint, config.model).empty());
  config.model.dropout = 0.5;  // of training alone, as what comes next
  config.model.slstm.recurrent_clip = 10;
  config.model.mlstm.igate_bias_init = "zeros";  // the checkpoint has what was learnt since
  CHECK(other_model_settings(checkpoint, config.model).empty());
  config.model.output_logit_soft_cap = 30;
  CHECK(other_model_settings(checkpoint, config.model) ==
        "model.output_logit_soft_cap=0.0 (here 30.0)");
}

TEST_CASE("list and prune keep what they promise") {
  const testing::TemporaryFolder run;
  CHECK(list_checkpoints(run.string()).empty());
  for (const int64_t step : {10, 20, 30, 40, 50}) save_step(run.string(), step);
  fs::create_directories(run / "ckpt/step-00000035");  // never committed
  write(run / "ckpt/step-00000035/model.safetensors", "half");
  fs::create_directories(run / "ckpt/notes");
  fs::copy(run / "ckpt/step-00000010", run / "ckpt/step-7");  // somebody's copy
  fs::create_directories(run / "elsewhere");
  write(run / "elsewhere/precious", "x");
  fs::create_directory_symlink(run / "elsewhere", run / "ckpt/step-00000005");
  const auto steps = [&] {
    std::string text;
    for (const auto& path : list_checkpoints(run.string()))
      text += fs::path(path).filename().string().substr(11) + " ";
    return text;
  };
  CHECK(steps() == "10 20 30 40 50 ");
  prune_checkpoints(run.string(), 2, 20, -1, no_warning);
  CHECK(steps() == "20 40 50 ");
  CHECK_FALSE(fs::exists(run / "ckpt/step-00000035"));
  CHECK(fs::exists(run / "ckpt/notes"));
  CHECK(fs::exists(run / "ckpt/step-7" / kManifestName));
  CHECK(fs::exists(run / "elsewhere/precious"));

  fs::resize_file(run / "ckpt/step-00000050/model.safetensors",
                  100);  // damaged: does not count as kept
  prune_checkpoints(run.string(), 1, 0, -1, no_warning);
  CHECK(steps() == "40 50 ");
  prune_checkpoints(run.string(), 0, 0, -1, no_warning);
  CHECK(steps() == "40 50 ");
}

TEST_CASE("the caller is told of a checkpoint that cannot be deleted") {
  const testing::TemporaryFolder run;
  for (const int64_t step : {10, 20, 30}) save_step(run.string(), step);
  const fs::path manifest = run / "ckpt/step-00000010" / kManifestName;
  fs::remove(manifest);
  fs::create_directories(manifest / "a folder in its place");
  std::vector<std::string> told;
  prune_checkpoints(run.string(), 1, 0, -1,
                    [&](const std::string& message) { told.push_back(message); });
  REQUIRE(told.size() == 1);
  CHECK(contains(told[0], "cannot delete an old checkpoint: "));
  CHECK(contains(told[0], manifest.string()));
  CHECK_FALSE(fs::exists(run / "ckpt/step-00000020"));
}

TEST_CASE("the best evaluation is the first of the lowest finite losses") {
  BestEvaluation best;
  const auto count = [&](int64_t step, double loss) {
    best.count(step, loss);
    return std::pair(best.step, best.evaluations_since);
  };
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(count(5, std::nan("")) == std::pair<int64_t, int64_t>(-1, 1));
  CHECK(count(10, -inf) == std::pair<int64_t, int64_t>(-1, 2));
  CHECK(count(15, 3) == std::pair<int64_t, int64_t>(15, 0));
  CHECK(count(20, 3) == std::pair<int64_t, int64_t>(15, 1));
  CHECK(count(20, 3) == std::pair<int64_t, int64_t>(15, 1));  // counted already
  CHECK(count(15, 1) == std::pair<int64_t, int64_t>(15, 1));
  CHECK(best.loss == 3);
  CHECK(count(25, inf) == std::pair<int64_t, int64_t>(15, 2));
  CHECK(count(30, std::nextafter(3, 0)) == std::pair<int64_t, int64_t>(30, 0));
  CHECK(best.last_step == 30);
}

TEST_CASE("ckpt/best names one checkpoint, which is kept, and is none of its own") {
  const testing::TemporaryFolder run;
  const std::string root = run.string();
  for (const int64_t step : {10, 20, 30, 40}) save_step(root, step);
  const fs::path link = run / "ckpt/best";
  CHECK_FALSE(name_best_checkpoint(root, -1));
  CHECK_FALSE(fs::exists(fs::symlink_status(link)));
  CHECK(name_best_checkpoint(root, 10));
  CHECK(fs::read_symlink(link) == "step-00000010");  // relative: the run may be moved
  CHECK(best_checkpoint(root, 10) == link.string());
  CHECK(best_checkpoint(root, 40) == (run / "ckpt/step-00000040").string());
  CHECK(best_checkpoint(root, 50).empty());
  CHECK(list_checkpoints(root).size() == 4);
  for (const std::string given : {"ckpt/best", "ckpt/best/", "ckpt/again"}) {
    if (given == "ckpt/again") fs::create_directory_symlink("best", run / given);
    CHECK(load_model((run / given).string()).folder == (run / "ckpt/step-00000010").string());
  }

  prune_checkpoints(root, 1, 0, /*best=*/20, no_warning);  // as where no link could be made to it
  CHECK(list_checkpoints(root).size() == 3);
  CHECK_FALSE(fs::exists(run / "ckpt/step-00000030"));
  fs::create_directory_symlink("step-00000030", run / "ckpt/best.tmp");  // of a crash
  CHECK(name_best_checkpoint(root, 20));
  CHECK(fs::read_symlink(link) == "step-00000020");
  prune_checkpoints(root, 1, 0, -1, no_warning);
  CHECK_FALSE(fs::exists(run / "ckpt/step-00000010"));

  CHECK_FALSE(name_best_checkpoint(root, 50));  // its save has failed
  CHECK(fs::read_symlink(link) == "step-00000020");
  fs::remove_all(run / "ckpt/step-00000020");  // set aside
  CHECK_FALSE(name_best_checkpoint(root, 50));
  CHECK_FALSE(fs::exists(fs::symlink_status(link)));
  CHECK_FALSE(fs::exists(fs::symlink_status(run / "ckpt/best.tmp")));

  fs::create_directories(link / "notes");  // somebody's own
  CHECK_THROWS_AS(name_best_checkpoint(root, 40), std::system_error);
  CHECK(fs::exists(link / "notes"));
  CHECK_FALSE(fs::exists(fs::symlink_status(run / "ckpt/best.tmp")));
}

TEST_CASE("a step is written again under a new manifest") {
  const testing::TemporaryFolder run;
  const std::string folder = save_step(run.string(), 4);
  write(fs::path(folder) / "stray", "x");
  const std::string before = read(fs::path(folder) / "model.safetensors");
  CHECK(save_step(run.string(), 4) == folder);
  CHECK(read(fs::path(folder) / "model.safetensors") != before);
  CHECK_FALSE(fs::exists(fs::path(folder) / "stray"));
  CHECK(verify_message(folder).empty());
}

TEST_CASE("a failing disk leaves earlier checkpoints and no rest") {
  const testing::TemporaryFolder run;
  const std::string good = save_step(run.string(), 1);
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t limit : {rlim_t{0}, rlim_t{100}, rlim_t{5000}}) {
    struct rlimit small = before;
    small.rlim_cur = limit;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    bool thrown = false;
    try {
      save_step(run.string(), 2);
    } catch (const std::system_error& error) {
      thrown = error.code().value() == EFBIG && contains(error.what(), "model.safetensors");
    }
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK(thrown);
    CHECK_FALSE(fs::exists(run / "ckpt/step-00000002"));
    CHECK(verify_message(good).empty());
  }
  ::signal(SIGXFSZ, old_handler);
  save_step(run.string(), 2);
  CHECK(list_checkpoints(run.string()).size() == 2);

  write(run / "file", "");  // the run folder is a file
  CHECK_THROWS_AS(save_step((run / "file").string(), 1), std::system_error);
}

TEST_CASE("load_model takes a checkpoint, a run folder and a model folder") {
  const testing::TemporaryFolder run;
  const auto config = tiny_config();
  CHECK_THROWS_AS(load_model((run / "absent").string()), Error);
  CHECK_THROWS_AS(load_model(run.string()), Error);
  const std::string first = save_step(run.string(), 1);
  const std::string second = save_step(run.string(), 2);
  LoadedModel loaded = load_model(run.string());
  CHECK(loaded.folder == second);
  CHECK(loaded.tokenizer == "bytes");
  CHECK_FALSE(loaded.model->is_training());
  CHECK(config::print_config(loaded.config) == config::print_config(config));
  CHECK(load_model(first).folder == first);

  fs::path damaged = fs::path(second) / "model.safetensors";
  std::string bytes = read(damaged);
  bytes[bytes.size() - 1] = static_cast<char>(bytes[bytes.size() - 1] ^ 1);
  write(damaged, bytes);
  CHECK(load_model(run.string()).folder == first);  // the newest good one
  CHECK(load_model(run.string(), false).folder == second);
  CHECK_THROWS_AS(load_model(second), Error);

  const auto model = models::make_language_model(config.model);
  const std::string exported = (run / "exported").string();
  save_model_folder(exported, config, named_model_tensors(*model));
  save_model_folder(exported, config, named_model_tensors(*model));  // again over its own
  loaded = load_model(exported);
  CHECK(at::equal(loaded.model->head_weight(), model->head_weight()));
  const CheckpointFolder model_only = open_checkpoint(exported, true);
  CHECK(checkpoint_optimizer(model_only).empty());
  CHECK_FALSE(checkpoint_state(model_only).has_value());
  CHECK_THROWS_AS(save_model_folder(run.string(), config, {}),
                  Error);  // not over a folder of something else
}
