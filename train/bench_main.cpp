// xlstm-bench: how fast a model trains and decodes on this machine, without any data.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/error.h"
#include "csrc/nn/no_dropout.h"
#include "train/command_line.h"
#include "train/decoder.h"
#include "train/device.h"
#include "train/flops.h"
#include "train/generation_speed.h"
#include "train/process_setup.h"
#include "train/random_streams.h"
#include "train/step_timer.h"
#include "train/train_step.h"

namespace xlstm::train {
namespace {

using Json = nlohmann::ordered_json;

const std::vector<OptionSpec> kOptions{
    {"--steps", "N", "training steps to time, after 5 that are not; 0: none (20)"},
    {"--tokens", "N", "decoding steps to time at batch 1, after 16 that are not; 0: none (64)"},
    {"--positions", "N,...",
     "generate one sequence up to the last of these positions and tell what a token costs there"},
    {"--batches", "N,...",
     "generate so many sequences at once, in turn, and tell the tokens per second (--tokens steps "
     "of each)"},
    {"--prompt", "N", "random tokens before those that --positions and --batches generate (16)"},
    {"--lazy-fold", "WHEN",
     "on, off, or auto: mLSTM states that are written every 16th token alone, where that moves "
     "fewer bytes on a GPU (auto)"},
    {"--dtype", "NAME",
     "of the weights when it decodes and generates: float32, bfloat16_weights or int8_weights "
     "(float32)"},
    {"--json", "FILE", "also write the numbers there"},
    {"--help", "", "show this"}};

TrainBatch random_batch(const config::Config& config, std::mt19937_64& random, bool pinned) {
  data::Batch batch;
  batch.batch_size = config.train.global_batch_size;
  batch.seq_len = config.data.seq_len;
  const auto count = static_cast<size_t>(batch.batch_size * batch.seq_len);
  std::uniform_int_distribution<int64_t> token(0, config.model.vocab_size - 1);
  for (size_t i = 0; i < count; ++i) {
    batch.input.push_back(token(random));
    batch.target.push_back(token(random));
  }
  batch.reset.assign(count, 0);
  batch.num_targets = static_cast<int64_t>(count);
  return TrainBatch(std::move(batch), pinned);
}

/// Floating point operations per second of one large matrix product in the training dtype: what the machine gives.
double matmul_rate(at::Device device, const std::string& dtype) {
  const int64_t size = device.is_cpu() ? 1024 : 8192;
  const auto options =
      at::TensorOptions().dtype(dtype == "bfloat16" ? at::kBFloat16 : at::kFloat).device(device);
  const at::Tensor a = at::randn({size, size}, options), b = at::randn({size, size}, options);
  std::vector<double> seconds;
  for (int i = 0; i < 13; ++i) {
    wait_for(device);
    const double start = monotonic_seconds();
    const at::Tensor c = at::matmul(a, b);
    wait_for(device);
    if (i >= 3) seconds.push_back(monotonic_seconds() - start);
  }
  return 2.0 * static_cast<double>(size * size * size) / median(seconds);
}

Json time_training(const config::Config& config, models::LanguageModel& model, int64_t steps) {
  constexpr int64_t kWarmUp = 5;
  const at::Device device = model.head_weight().device();
  AdamW optimizer(trained_parameters(model), config.optim);
  TrainStep train_step(model, optimizer, config);
  std::mt19937_64 random(static_cast<uint64_t>(config.run.seed));
  std::vector<double> seconds;
  for (int64_t i = 0; i < kWarmUp + steps; ++i) {
    const TrainBatch batch = random_batch(config, random, !device.is_cpu());
    const double start = monotonic_seconds();
    train_step.run(batch, i + 1);
    while (train_step.finish()) {
    }
    wait_for(device);
    if (i >= kWarmUp) seconds.push_back(monotonic_seconds() - start);
  }
  const double step = median(seconds);
  const double tokens =
      static_cast<double>(config.train.global_batch_size * config.data.seq_len) / step;
  const double flops = training_flops_per_token(config.model, config.data.seq_len);
  const double peak = matmul_rate(device, config.train.dtype);
  return {{"step_ms", 1e3 * step},          {"tokens_per_s", tokens},
          {"model_flops_per_token", flops}, {"matmul_tflops", peak / 1e12},
          {"mfu", tokens * flops / peak},   {"peak_memory_gib", peak_memory_gib(device)}};
}

std::optional<bool> lazy_fold(const CommandLine& line) {
  const std::string when = line.get("--lazy-fold", "auto");
  if (when != "on" && when != "off" && when != "auto")
    throw Error(ExitCode::kConfig, "--lazy-fold: expected on, off or auto, got " + when);
  return when == "auto" ? std::nullopt : std::optional(when == "on");
}

Json time_decoding(const config::Config& config, models::LanguageModel& model, int64_t tokens,
                   std::optional<bool> lazy_fold) {
  constexpr int64_t kWarmUp = 16;
  const at::NoGradGuard no_grad;
  const nn::NoDropout no_dropout;
  Decoder decoder(model, {}, lazy_fold);
  const at::Tensor token = at::zeros({1, 1}, at::kLong);
  std::vector<double> seconds;
  for (int64_t i = 0; i < kWarmUp + tokens; ++i) {
    const double start = monotonic_seconds();
    token.fill_(i % config.model.vocab_size);
    decoder.next(token).to(at::kCPU);  // waits
    if (i >= kWarmUp) seconds.push_back(monotonic_seconds() - start);
  }
  const double per_token = seconds_per_step(seconds);
  return {{"token_ms", 1e3 * per_token}, {"tokens_per_s", 1 / per_token}};
}

Json generation_json(models::LanguageModel& model, int64_t prompt,
                     const std::vector<int64_t>& positions, std::optional<bool> lazy_fold) {
  const GenerationTimes times = time_generation(model, prompt, positions, lazy_fold);
  Json json = {{"prompt", prompt}};
  for (size_t i = 0; i < positions.size(); ++i) {
    const std::string position = std::to_string(positions[i]);
    json["token_" + position + "_ms"] = 1e3 * times.token_s[i];
    json["until_" + position + "_s"] = times.until_s[i];
  }
  return json;
}

/// Tokens per second for each number of sequences; null from where on the memory does not suffice.
Json throughput_json(models::LanguageModel& model, int64_t prompt, int64_t tokens,
                     const std::vector<int64_t>& batches, std::optional<bool> lazy_fold) {
  Json json = {{"prompt", prompt}};
  double best = 0;
  bool enough = true;
  for (const int64_t sequences : batches) {
    Json& rate = json["batch_" + std::to_string(sequences)] = nullptr;
    if (!enough) continue;
    const auto measured = generation_throughput(model, prompt, sequences, tokens, lazy_fold);
    enough = measured.has_value();
    if (!enough) continue;
    rate = *measured;
    best = std::max(best, *measured);
  }
  json["max"] = best;
  return json;
}

void measure_generation(const CommandLine& line, models::LanguageModel& model, Json& report) {
  const at::NoGradGuard no_grad;
  const nn::NoDropout no_dropout;
  const int64_t prompt = line.get_int("--prompt", 16, 1);
  const auto positions = line.get_growing("--positions"), batches = line.get_growing("--batches");
  if (!positions.empty())
    report["generation"] = generation_json(model, prompt, positions, lazy_fold(line));
  if (!batches.empty())
    report["throughput"] =
        throughput_json(model, prompt, line.get_int("--tokens", 64, 1), batches, lazy_fold(line));
}

int body(int argc, char** argv) {
  const CommandLine line = parse_command_line(argc, argv, kOptions, true);
  if (line.has("--help")) {
    std::printf(
        "usage: xlstm-bench CONFIG.yaml [key.sub=value ...] [options]\n\nTimes training steps on "
        "random tokens (their median) and decoding (the median of means of 16 steps); with "
        "--positions or --batches, how fast it generates. mfu: the model's floating point "
        "operations (train/flops.h) per second, as a share of those of one large matrix product in "
        "the same dtype, measured in the same run.\n\n%s",
        format_options(kOptions).c_str());
    return 0;
  }
  if (line.positional.size() != 1)
    throw Error(ExitCode::kConfig, "expected one configuration file; see xlstm-bench --help");
  const config::Config config = config::load_config(line.positional[0], line.overrides);
  if (config.model.input_features > 0)
    throw Error(ExitCode::kConfig, "model.input_features is " +
                                       std::to_string(config.model.input_features) +
                                       ": only models that read tokens are timed; remove it");
  const int64_t steps = line.get_int("--steps", 20, 0), tokens = line.get_int("--tokens", 64, 0);
  const std::optional<bool> lazy = lazy_fold(line);
  const std::string weights = line.get("--dtype", "float32");
  const at::ScalarType weights_dtype = choose_weights_dtype(weights, "--dtype");
  if (config.run.num_threads > 0) at::set_num_threads(static_cast<int>(config.run.num_threads));
  const at::Device device = choose_device(config.run.device, "run.device");
  use_own_stream(device);

  seed_random_streams(device, static_cast<uint64_t>(config.run.seed));
  const double start = monotonic_seconds();
  const auto model = models::make_language_model(config.model, device);
  model->train();
  Json report = {{"config", line.positional[0]},
                 {"overrides", line.overrides},
                 {"device", describe(device)},
                 {"dtype", config.train.dtype},
                 {"decoding_dtype", weights},
                 {"parameters", models::count_parameters(config.model)},
                 {"batch", config.train.global_batch_size},
                 {"seq_len", config.data.seq_len}};
  if (steps > 0) report["training"] = time_training(config, *model, steps);
  nn::round_weights(*model, weights_dtype);
  if (line.has("--positions") || line.has("--batches")) {
    measure_generation(line, *model, report);
  } else if (tokens > 0) {
    report["decoding"] = time_decoding(config, *model, tokens, lazy);
  }
  report["seconds"] = monotonic_seconds() - start;
  const std::string text = report.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
  std::fputs(text.c_str(), stdout);
  if (line.has("--json")) {
    std::ofstream file(line.get("--json", ""));
    if (!(file << text).flush())
      throw Error(ExitCode::kConfig, line.get("--json", "") + ": cannot be written");
  }
  return 0;
}

}  // namespace
}  // namespace xlstm::train

int main(int argc, char** argv) {
  xlstm::train::prepare_long_process(argv);
  return xlstm::train::run_main(
      "xlstm-bench",
      "lower train.micro_batch_size or data.seq_len, or set model.activation_checkpointing=true",
      [&] { return xlstm::train::body(argc, argv); });
}
