#pragma once
// A training run of seconds: its text, its settings, and what it left.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "csrc/core/sha256.h"
#include "csrc/data/prepare.h"
#include "tests/support/temporary_folder.h"
#include "train/log.h"
#include "train/signals.h"
#include "train/trainer.h"

namespace xlstm::train {

/// Settings of a run below `folder`, whose text is made and prepared there.
inline config::Config tiny_config(const testing::TemporaryFolder& folder) {
  const std::string prefix = (folder / "tokens").string();
  if (!std::filesystem::exists(prefix + ".bin")) {
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
inline std::string hash_of(const std::string& checkpoint) {
  return sha256_file(checkpoint + "/model.safetensors") +
         sha256_file(checkpoint + "/optim-rank00000.safetensors");
}

/// step -> exact loss of what it logged
inline std::map<int64_t, std::string> losses(const std::string& run) {
  std::map<int64_t, std::string> result;
  std::ifstream file(run + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line);
    if (json.contains("train/loss_hex")) result[json["step"]] = json["train/loss_hex"];
  }
  return result;
}

inline ExitCode train_once(const config::Config& config) {
  clear_stop_request();
  set_console_verbosity(Verbosity::kQuiet);
  return Trainer(config, {}).run();
}

}  // namespace xlstm::train
