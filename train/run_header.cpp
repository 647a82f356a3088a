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
  const std::string path = folder.file("run.json");
  if (!std::filesystem::exists(path)) return "";
  const auto header = nlohmann::json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  if (!header.is_object() || !header.contains("first_weights")) return "";
  const auto& weights = header["first_weights"];
  return weights.is_string() ? weights.get<std::string>() : "";
}

}  // namespace xlstm::train
