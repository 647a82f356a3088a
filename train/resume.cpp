// Which checkpoint a run goes on from, and whether its settings allow that.
#include <algorithm>
#include <filesystem>
#include <iterator>
#include <string_view>

#include "csrc/config/schema.h"
#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "train/checkpoint.h"
#include "train/log.h"
#include "train/run_folder.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

CheckpointFolder choose_newest_good(const std::string& folder, bool verify) {
  try {
    return find_checkpoint(folder, verify, log_warning);
  } catch (const Error& error) {
    throw Error(error.code, "run folder " + std::string(error.what()) +
                                "; start over with --fresh, which keeps the old folder beside it");
  }
}

CheckpointFolder choose_named(const std::string& folder,
                              const std::vector<std::string>& checkpoints, const std::string& name,
                              bool verify) {
  const int64_t step = checkpoint_step(name);
  std::string known;
  for (const std::string& checkpoint : checkpoints) {
    if (checkpoint_step(checkpoint) == step && step >= 0)
      return open_checkpoint(checkpoint, verify);
    known += (known.empty() ? "" : ", ") + fs::path(checkpoint).filename().string();
  }
  throw Error(ExitCode::kCheckpoint, "run folder " + folder + ": no checkpoint " + name +
                                         "; there is " + (known.empty() ? "none" : known));
}

/// Settings that processes of one run may have differently: the data that they read is compared as such.
constexpr std::string_view kOfEachMachine[] = {
    "run.out_dir", "run.num_threads", "data.text",      "data.val_text",  "data.train",
    "data.val",    "data.tokenizer",  "data.cache_dir", "data.task.path", "train.init_from"};

struct Difference {
  std::string name, a, b;
};

template <class Counts>
std::optional<Difference> first_difference(config::Config a, config::Config b,  // a field refers to
                                           const Counts& counts) {  // what could be written
  for (const config::Field& field : config::schema()) {
    if (!counts(field)) continue;
    Difference found{field.name, config::format_value(field.ref(a)),
                     config::format_value(field.ref(b))};
    if (found.a != found.b) return found;
  }
  return std::nullopt;
}

/// Whether the last start had all the settings of this one, which it wrote down.
bool repeats_last_start(const std::string& folder, const config::Config& config) {
  const std::string recorded = folder + "/config.yaml";
  return fs::exists(recorded) && read_file(recorded) == config::print_config(config);
}

}  // namespace

int64_t checkpoint_step(const std::string& folder) {
  const std::string name = fs::path(folder).filename();
  if (name.size() < 6 || name.size() > 22 || name.rfind("step-", 0) != 0) return -1;
  if (name.find_first_not_of("0123456789", 5) != std::string::npos) return -1;
  return std::stoll(name.substr(5));
}

std::optional<CheckpointFolder> choose_checkpoint(const config::Config& config, bool held_run) {
  const std::string& resume = config.run.resume;
  const std::string folder = run_path(config.run);
  if (resume == "never") {
    if (!held_run) return std::nullopt;
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder +
                    ": holds a run, and run.resume is never; go on with run.resume=auto, or start "
                    "over with --fresh, which keeps the old folder beside it");
  }
  const std::vector<std::string> checkpoints = list_checkpoints(folder);
  if (checkpoints.empty() && resume == "auto") return std::nullopt;
  if (resume != "auto") {
    const bool is_newest =
        checkpoints.empty() || checkpoint_step(checkpoints.back()) <= checkpoint_step(resume);
    if (is_newest || !repeats_last_start(folder, config))
      return choose_named(folder, checkpoints, resume, config.ckpt.verify_on_load);
    log_info("the last start was this one, from " + resume + ": going on where it stopped");
  }
  return choose_newest_good(folder, config.ckpt.verify_on_load);
}

void set_aside_later_checkpoints(const RunFolder& folder, int64_t step) {
  std::string target;
  const std::string root = folder.file("ckpt");
  if (!fs::is_directory(root)) return;
  std::vector<fs::path> later;
  for (const auto& entry : fs::directory_iterator(root)) {
    if (checkpoint_step(entry.path()) > step) later.push_back(entry.path());
  }
  for (const fs::path& checkpoint : later) {
    for (int number = 1; target.empty(); ++number) {
      const std::string name = folder.file("ckpt-old-" + std::to_string(number));
      if (fs::create_directory(name)) target = name;
    }
    fs::rename(checkpoint, fs::path(target) / checkpoint.filename());
    log_info("set aside " + checkpoint.string() + " in " + target);
  }
}

void check_same_run(const config::Config& now, const config::Config& saved,
                    const std::string& saved_in) {
  const auto counts = [](const config::Field& field) { return field.identity; };
  if (const auto found = first_difference(now, saved, counts))
    throw Error(ExitCode::kConfig, found->name + ": " + found->a + " now, but the run in " +
                                       saved_in + " was trained with " + found->b +
                                       "; put it back, or start over with --fresh");
}

std::string differing_setting(const config::Config& own, const config::Config& leader) {
  const auto counts = [](const config::Field& field) {
    return std::find(std::begin(kOfEachMachine), std::end(kOfEachMachine), field.name) ==
           std::end(kOfEachMachine);
  };
  const auto found = first_difference(own, leader, counts);
  return found ? found->name + ": " + found->a + " here, " + found->b + " in process 0" : "";
}

}  // namespace xlstm::train
