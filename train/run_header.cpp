// <run>/run.json: what was run, with what, where and when.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/version.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "csrc/core/file.h"
#include "train/device.h"
#include "train/distributed.h"
#include "train/run_folder.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

/// A text of a run's header; "" where there is none.
std::string recorded(const std::string& path, const char* key) {
  if (!fs::exists(path)) return "";
  const auto header = nlohmann::json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  if (!header.is_object() || !header.contains(key) || !header[key].is_string()) return "";
  return header[key].get<std::string>();
}

}  // namespace

void write_run_header(const RunFolder& folder, const config::Config& config,
                      const std::string& command, int64_t num_parameters,
                      const std::string& first_weights) {
  char host[128] = "";
  ::gethostname(host, sizeof host - 1);
  char time_text[40];
  const std::time_t now = std::time(nullptr);
  struct tm utc {};
  std::strftime(time_text, sizeof time_text, "%Y-%m-%dT%H:%M:%SZ", ::gmtime_r(&now, &utc));
  const std::string yaml = config::print_config(config);
  const nlohmann::ordered_json header = {
      {"command", command},
      {"folder", fs::current_path().string()},
      {"time", time_text},
      {"host", host},
      {"pid", ::getpid()},
      {"processes", place_from_environment().size},
      {"threads", at::get_num_threads()},
      {"device", choose_device(config.run.device, "run.device").str()},
      {"cpu_capability", at::get_cpu_capability()},
      {"versions",
       {{"libxlstm", XLSTM_VERSION}, {"torch", TORCH_VERSION}, {"compiler", __VERSION__}}},
      {"parameters", num_parameters},
      {"first_weights", first_weights},
      {"config", yaml}};
  write_file_atomically(
      folder.file("run.json"),
      header.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  write_file_atomically(folder.file("config.yaml"), yaml);
}

std::string recorded_first_weights(const RunFolder& folder) {
  return recorded(folder.file("run.json"), "first_weights");
}

std::string recorded_start_folder(const std::string& checkpoint) {
  // As named first: the run's ckpt may be a link to another disk. Then what a link to a checkpoint leads to.
  for (const fs::path& path :
       {fs::absolute(checkpoint).lexically_normal(), fs::weakly_canonical(checkpoint)}) {
    const fs::path run = (path / "").parent_path().parent_path().parent_path();
    const std::string folder = recorded(run / "run.json", "folder");
    std::error_code ignored;
    if (fs::is_directory(folder, ignored)) return folder;
  }
  return "";
}

}  // namespace xlstm::train
