#include "train/checkpoint.h"

#include <sys/statvfs.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "csrc/core/sha256.h"
#include "csrc/data/tokenizer.h"
#include "train/failpoint.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int64_t kTextBytes = 1 << 16;   // JSON, YAML, the manifest, folder entries
constexpr int64_t kBytesPerTensor = 512;  // its line in the header

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::string to_hex(const at::Tensor& bytes) {
  const at::Tensor dense = bytes.to(at::kCPU).contiguous();
  const auto* data = static_cast<const unsigned char*>(dense.const_data_ptr());
  static const char* digits = "0123456789abcdef";
  std::string hex;
  for (size_t i = 0; i < dense.nbytes(); ++i) {
    hex += digits[data[i] >> 4];
    hex += digits[data[i] & 15];
  }
  return hex;
}

/// Room for tensors and all that goes with them.
int64_t needed_bytes(const TokenizerFiles& tokenizer,
                     const std::vector<const NamedTensors*>& files) {
  int64_t bytes = kTextBytes;
  for (const NamedTensors* tensors : files)
    for (const auto& entry : *tensors)
      bytes += static_cast<int64_t>(entry.second.nbytes()) + kBytesPerTensor;
  for (const auto& [name, content] : tokenizer) bytes += static_cast<int64_t>(content.size());
  return bytes;
}

/// Fails early and with numbers, where a write would fail late.
void check_free_space(const std::string& folder, int64_t needed) {
  struct statvfs info {};
  if (::statvfs(folder.c_str(), &info) != 0) fail(folder);
  const auto available = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
  if (available >= static_cast<double>(needed)) return;
  char text[96];
  std::snprintf(text, sizeof text, ": a checkpoint needs %.1f MB, %.1f MB are free",
                static_cast<double>(needed) / 1e6, available / 1e6);
  throw std::system_error(ENOSPC, std::generic_category(), folder + text);
}

/// A name beside `path` that no other thread of this machine takes for the same purpose.
fs::path name_beside(const fs::path& path, const char* purpose) {
  return path.parent_path() /
         ("." + path.filename().string() + "." + purpose + "-" + std::to_string(::gettid()));
}

/// The folder being written: removed again unless commit() was reached.
class Writer {
 public:
  Writer(fs::path folder, int64_t step) : folder_(std::move(folder)), step_(step) {
    uncommit(folder_);
    fs::remove_all(folder_);
    fs::create_directory(folder_);
    failpoint("ckpt.after_mkdir", step_);
    if (const auto limit = failpoint_value("ckpt.write");
        limit && failpoint_at("ckpt.write_step", step_))
      bytes_to_live_ = static_cast<size_t>(*limit);
  }
  ~Writer() {
    std::error_code ignored;
    if (!committed_) fs::remove_all(folder_, ignored);
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void add(const std::string& name, const NamedTensors& tensors) {
    OutputFile file((folder_ / name).string());
    int64_t bytes = 0;
    const auto sink = [&](const void* data, size_t size) {
      write(file, data, size);
      bytes += static_cast<int64_t>(size);
    };
    const std::string sha256 = write_safetensors(sink, tensors, {{"format", "pt"}});
    file.sync_and_close();
    manifest_.files.push_back({name, bytes, sha256});
  }

  void add(const std::string& name, const std::string& text) {
    write_whole(folder_ / name, text);
    manifest_.files.push_back({name, static_cast<int64_t>(text.size()), sha256_hex(text)});
  }

  /// From here on the folder is a checkpoint. Everything it lists is on disk before the manifest's name is.
  void commit() {
    failpoint("ckpt.before_sync", step_);
    sync_directory(folder_.string());
    sync_directory(
        (folder_.parent_path().empty() ? fs::path(".") : folder_.parent_path()).string());
    const std::string path = (folder_ / kManifestName).string();
    write_whole(path + ".tmp", format_manifest(manifest_));
    failpoint("ckpt.before_rename", step_);
    if (::rename((path + ".tmp").c_str(), path.c_str()) != 0) fail(path);
    failpoint("ckpt.after_rename", step_);
    sync_directory(folder_.string());
    committed_ = true;
  }

  /// Renames the committed folder, over an earlier one if need be. At each moment one of them is at `path`, but for the
  /// time between two renames where the file system cannot exchange names.
  void move_to(const fs::path& path) {
    committed_ = false;
    fs::path earlier;
    if (::rename(folder_.c_str(), path.c_str()) != 0) {
      if (errno != ENOTEMPTY && errno != EEXIST) fail(path);
      earlier = take_place_of(path);
    }
    committed_ = true;
    sync_directory(path.parent_path().string());
    if (!earlier.empty()) fs::remove_all(earlier);
  }

  /// Takes a committed folder's manifest away, durably: from then on it is no checkpoint.
  static void uncommit(const fs::path& folder) {
    if (fs::remove(folder / kManifestName)) sync_directory(folder.string());
  }

 private:
  /// Returns where the folder that was there is now.
  fs::path take_place_of(const fs::path& path) const {
    if (!failpoint_value("ckpt.no_exchange") && exchange_paths(folder_, path)) {
      failpoint("ckpt.replacing");
      return folder_;
    }
    const fs::path earlier = name_beside(path, "old");
    fs::remove_all(earlier);  // of a crash
    fs::rename(path, earlier);
    failpoint("ckpt.replacing");
    try {
      fs::rename(folder_, path);
    } catch (...) {
      fs::rename(earlier, path);
      throw;
    }
    return earlier;
  }

  void write(OutputFile& file, const void* data, size_t size) {
    const size_t now = std::min(bytes_to_live_, size);
    file.write(data, now);
    if (now < size) failpoint("ckpt.write");
    bytes_to_live_ -= now;
  }

  void write_whole(const fs::path& path, const std::string& text) {
    OutputFile file(path.string());
    write(file, text.data(), text.size());
    file.sync_and_close();
  }

  fs::path folder_;
  int64_t step_;
  /// "ckpt.write:N,ckpt.write_step:S" dies with exactly N bytes of step S written.
  size_t bytes_to_live_ = std::numeric_limits<size_t>::max();
  Manifest manifest_;
  bool committed_ = false;
};

void add_common_files(Writer& writer, const config::Config& config,
                      const TokenizerFiles& tokenizer) {
  writer.add(kConfigName, config::print_config(config));
  for (const auto& [name, content] : tokenizer) writer.add(name, content);
}

Json format_best(const BestEvaluation& best) {
  return {{"step", best.step},
          {"loss", best.step < 0 ? Json() : Json(best.loss)},
          {"evaluations_since", best.evaluations_since},
          {"last_step", best.last_step}};
}

std::string format_state(const TrainerState& state) {
  const auto hex_or_empty = [](const at::Tensor& bytes) {
    return bytes.defined() ? to_hex(bytes) : std::string();
  };
  const Json json = {{"format_version", kCheckpointFormatVersion},
                     {"step", state.step},
                     {"tokens", state.tokens},
                     {"samples_consumed", state.samples_consumed},
                     {"skipped_updates", state.skipped_updates},
                     {"data_fingerprint", state.data_fingerprint},
                     {"held_out_fingerprint", state.held_out_fingerprint},
                     {"best_evaluation", format_best(state.best)},
                     {"rng_state", hex_or_empty(state.rng_state)},
                     {"device_rng_state", hex_or_empty(state.device_rng_state)},
                     {"libxlstm_version", XLSTM_VERSION},
                     {"torch_version", TORCH_VERSION}};
  return json.dump(2) + "\n";
}

/// The checkpoint of a step, whether it is there or not.
fs::path step_folder(const std::string& run_dir, int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "step-%08lld", static_cast<long long>(step));
  return fs::path(run_dir) / "ckpt" / name;
}

/// The step that <run>/ckpt/best names, whether it is there or not; -1: none.
int64_t named_best(const std::string& run_dir) {
  std::error_code ignored;
  return checkpoint_step(fs::read_symlink(fs::path(run_dir) / "ckpt" / kBestName, ignored));
}

bool is_committed(const fs::path& folder) {
  std::error_code ignored;
  return fs::exists(folder / kManifestName, ignored);
}

struct StepFolder {
  int64_t step;
  fs::path path;
  bool committed;
};

/// All step folders of a run (no links), by step.
std::vector<StepFolder> step_folders(const std::string& run_dir) {
  std::vector<StepFolder> folders;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(fs::path(run_dir) / "ckpt", error)) {
    const int64_t step = checkpoint_step(entry.path());
    if (step >= 0 && entry.path() == step_folder(run_dir, step) &&
        fs::is_directory(entry.symlink_status()))
      folders.push_back({step, entry.path(), is_committed(entry.path())});
  }
  std::sort(folders.begin(), folders.end(),
            [](const auto& a, const auto& b) { return a.step < b.step; });
  return folders;
}

/// Cheap: the manifest is whole and every file has its size.
bool looks_good(const fs::path& folder) {
  try {
    check_manifest_sizes(folder.string(), read_manifest(folder.string()));
    return true;
  } catch (const Error&) {
    return false;
  }
}

void remove_folder(const StepFolder& folder, const Warn& warn) {
  try {
    Writer::uncommit(folder.path);
    failpoint("ckpt.prune", folder.step);
    fs::remove_all(folder.path);
  } catch (const std::system_error& error) {
    warn("cannot delete an old checkpoint: " + std::string(error.what()));
  }
}

}  // namespace

void BestEvaluation::count(int64_t evaluated_step, double held_out_loss) {
  if (evaluated_step <= last_step) return;
  last_step = evaluated_step;
  ++evaluations_since;
  if (!std::isfinite(held_out_loss) || held_out_loss >= loss) return;
  step = evaluated_step;
  loss = held_out_loss;
  evaluations_since = 0;
}

NamedTensors named_model_tensors(const models::LanguageModel& model) {
  NamedTensors tensors;
  for (const auto& item : model.named_parameters()) tensors.emplace_back(item.key(), item.value());
  for (const auto& item : model.named_buffers()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

TokenizerFiles read_tokenizer(const std::string& spec) {
  const bool single_file = fs::is_regular_file(spec);
  TokenizerFiles files;
  for (const std::string& path : data::tokenizer_files(spec))
    files.emplace_back(single_file ? "tokenizer.json" : fs::path(path).filename().string(),
                       read_file(path, ExitCode::kData));
  if (single_file && fs::path(spec).filename() != files.front().first) return files;
  for (const std::string& path : data::tokenizer_companions(spec))
    files.emplace_back(fs::path(path).filename().string(), read_file(path, ExitCode::kData));
  return files;
}

std::string save_checkpoint(const std::string& run_dir, const config::Config& config,
                            const models::LanguageModel& model, const NamedTensors& optimizer,
                            const TrainerState& state, const TokenizerFiles& tokenizer,
                            const NamedTensors& carried) {
  const fs::path folder = step_folder(run_dir, state.step);
  const NamedTensors weights = named_model_tensors(model);
  check_free_space(folder.parent_path().string(),
                   needed_bytes(tokenizer, {&weights, &optimizer, &carried}));
  Writer writer(folder, state.step);
  writer.add(kModelName, weights);
  writer.add(kOptimizerName, optimizer);
  if (!carried.empty()) writer.add(kCarriedName, carried);
  writer.add(kTrainerName, format_state(state));
  add_common_files(writer, config, tokenizer);
  writer.commit();
  return folder.string();
}

void save_model_folder(const std::string& folder, const config::Config& config,
                       const NamedTensors& model_tensors, const TokenizerFiles& tokenizer) {
  // A name with "/" behind it would be that of no link.
  const fs::path path = (fs::absolute(folder).lexically_normal() / "").parent_path();
  const bool is_free = !fs::exists(path) || (fs::is_directory(path) && fs::is_empty(path));
  if (!is_free && !fs::exists(path / kManifestName))
    throw Error(ExitCode::kCheckpoint,
                folder + ": exists and is not a model folder; choose another name");
  if (fs::is_symlink(path) || fs::exists(path / kTrainerName))
    throw Error(ExitCode::kCheckpoint,
                folder + ": a checkpoint that a run goes on from; choose another name");
  fs::create_directories(path.parent_path());
  check_free_space(path.parent_path().string(), needed_bytes(tokenizer, {&model_tensors}));
  Writer writer(name_beside(path, "tmp"), 0);
  writer.add(kModelName, model_tensors);
  add_common_files(writer, config, tokenizer);
  writer.commit();
  writer.move_to(path);
}

int64_t checkpoint_step(const std::string& folder) {
  const std::string name = fs::path(folder).filename();
  if (name.size() < 6 || name.size() > 22 || !name.starts_with("step-")) return -1;
  if (name.find_first_not_of("0123456789", 5) != std::string::npos) return -1;
  return std::stoll(name.substr(5));
}

std::vector<std::string> list_checkpoints(const std::string& run_dir) {
  std::vector<std::string> paths;
  for (const StepFolder& folder : step_folders(run_dir))
    if (folder.committed) paths.push_back(folder.path.string());
  return paths;
}

void prune_checkpoints(const std::string& run_dir, int64_t keep_last, int64_t keep_every,
                       int64_t best, const Warn& warn) {
  const int64_t named = named_best(run_dir);
  int64_t kept = 0;
  bool newest = true;
  auto folders = step_folders(run_dir);
  std::reverse(folders.begin(), folders.end());
  for (const StepFolder& folder : folders) {
    if (!folder.committed) {
      remove_folder(folder, warn);
      continue;
    }
    const bool major = (keep_every > 0 && folder.step % keep_every == 0) || folder.step == best ||
                       folder.step == named;
    const bool recent = kept < std::max<int64_t>(keep_last, 1);
    if (recent && looks_good(folder.path))
      ++kept;  // a damaged one does not count, so a good one stays
    if (!newest && !recent && !major) remove_folder(folder, warn);
    newest = false;
  }
}

bool name_best_checkpoint(const std::string& run_dir, int64_t step) {
  const fs::path target = step_folder(run_dir, step), link = target.parent_path() / kBestName,
                 next = link.string() + ".tmp";
  fs::remove(next);  // of a crash
  const int64_t named = named_best(run_dir);
  if (!is_committed(target)) {
    if (named >= 0 && !fs::exists(link)) fs::remove(link);
    return false;
  }
  if (named == step) return true;
  fs::create_directory_symlink(target.filename(), next);
  failpoint("ckpt.best", step);
  if (::rename(next.c_str(), link.c_str()) != 0) {
    const int reason = errno;
    fs::remove(next);
    throw std::system_error(reason, std::generic_category(), link.string());
  }
  sync_directory(link.parent_path().string());
  return true;
}

std::string best_checkpoint(const std::string& run_dir, int64_t step) {
  const fs::path folder = step_folder(run_dir, step);
  if (!is_committed(folder)) return "";
  return (named_best(run_dir) == step ? folder.parent_path() / kBestName : folder).string();
}

}  // namespace xlstm::train
