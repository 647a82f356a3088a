#include "train/dry_run.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "train/device.h"
#include "train/flops.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/schedule.h"
#include "train/step_timer.h"
#include "train/train_step.h"
#include "train/training_data.h"

namespace xlstm::train {
namespace {

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

std::string format_gib(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  return bytes < int64_t{1} << 30 ? format("%.1f MiB", value / (1 << 20))
                                  : format("%.1f GiB", value / (1 << 30));
}

std::string format_parameters(int64_t count) {
  const double millions = static_cast<double>(count) / 1e6;
  return format_thousands(count) + " (" + format(millions < 10 ? "%.2f M" : "%.1f M", millions) +
         ")";
}

int64_t micro_batch(const config::Config& config) {
  return config.train.micro_batch_size > 0 ? config.train.micro_batch_size
                                           : config.train.global_batch_size;
}

/// Numbers kept per token by the backward pass of one mLSTM block: block input, normed input, the
/// two branches, the convolved one, q, k, v, h, normed h, gated h; and the matrix states between
/// chunks.
double mlstm_block_numbers(const models::ModelOptions& model) {
  const double width = static_cast<double>(model.embedding_dim);
  const bool large = model.kind == "xlstm_large";
  const double value_width = large ? width * model.v_dim_factor : width * model.mlstm.proj_factor;
  const double key_width = large ? width * model.qk_dim_factor : value_width;
  const double chunk = model.chunk_size > 0 ? static_cast<double>(model.chunk_size) : 64;
  const double states = key_width * value_width / static_cast<double>(model.num_heads) / chunk;
  const double feed_forward = large ? 3 * model.feed_forward.proj_factor * width + 2 * width : 0;
  return 2 * width + 2 * key_width + 8 * value_width + states + feed_forward;
}

/// The same for one sLSTM block: inputs and norms, convolution, four gates, four states, and the
/// gated feed-forward.
double slstm_block_numbers(const models::ModelOptions& model) {
  return static_cast<double>(model.embedding_dim) * (14 + 4 * model.feed_forward.proj_factor);
}

int64_t activation_bytes(const config::Config& config) {
  const models::ModelOptions& model = config.model;
  const auto slstm_blocks = static_cast<double>(model.kind == "xlstm" ? model.slstm_at.size() : 0);
  const double mlstm_blocks = static_cast<double>(model.num_blocks) - slstm_blocks;
  const double mlstm = mlstm_block_numbers(model),
               slstm = slstm_blocks > 0 ? slstm_block_numbers(model) : 0;
  double numbers = mlstm_blocks * mlstm + slstm_blocks * slstm;
  if (model.activation_checkpointing) {
    // Each block keeps its input; one at a time is recomputed in full.
    numbers = static_cast<double>(model.num_blocks * model.embedding_dim) + std::max(mlstm, slstm);
  }
  numbers +=
      4 * static_cast<double>(model.embedding_dim);  // embedding, last norm, and their gradients
  const double bytes = config.train.dtype == "bfloat16" ? 2 : 4;
  return static_cast<int64_t>(numbers * bytes *
                              static_cast<double>(micro_batch(config) * config.data.seq_len));
}

void print_model(const config::Config& config) {
  const ParameterCount count = count_parameters_by_part(config.model);
  print_line("parameters  " + format_parameters(count.total()));
  print_line("  embedding " + format_parameters(count.embedding));
  print_line("  blocks    " + format_parameters(count.blocks));
  print_line("  head      " +
             (config.model.tie_weights ? "tied to the embedding" : format_parameters(count.head)));
}

void print_memory(const MemoryEstimate& memory, int64_t available) {
  print_line("memory      " + format_gib(memory.total()) + " estimated (" +
             (available >= 0 ? format_gib(available) + " available)" : "available: unknown)"));
  print_line("  weights " + format_gib(memory.weights) + ", gradients " +
             format_gib(memory.gradients) + ", optimizer " + format_gib(memory.optimizer) +
             ", activations " + format_gib(memory.activations));
}

void print_schedule(const config::Config& config) {
  const int64_t per_step = config.train.global_batch_size * config.data.seq_len;
  const int64_t steps = total_steps(config);
  print_line("per step    " + format_thousands(per_step) +
             " tokens: " + std::to_string(config.train.global_batch_size) + " sequences of " +
             format_thousands(config.data.seq_len) + " in micro batches of " +
             std::to_string(micro_batch(config)));
  print_line("whole run   " + format_thousands(steps) + " steps, " +
             format_thousands(steps * per_step) + " tokens");
}

void print_data(const config::Config& config, const TrainingData& data) {
  print_line("data        " + describe_data(config, data, total_steps(config)) + "; all checked");
}

/// One real optimizer step on the first batch.
void run_one_step(const config::Config& config, const TrainingData& data, at::Device device) {
  at::Generator(at::detail::getDefaultCPUGenerator())
      .set_current_seed(static_cast<uint64_t>(config.run.seed));
  const auto model = models::make_language_model(config.model, device);
  model->train();
  AdamW optimizer(named_parameters(*model), config.optim);
  TrainStep train_step(*model, optimizer, config);
  const TrainBatch batch(data.train->batch(0, config.train.global_batch_size));
  const double start = monotonic_seconds();
  std::optional<StepResult> done = train_step.run(batch, 1);
  if (!done) done = train_step.finish();
  const StepResult& result = *done;
  print_line("one step    loss " + format("%.4f", result.loss) + ", gradient norm " +
             format("%.3g", result.grad_norm) + ", " +
             format("%.0f ms", 1e3 * (monotonic_seconds() - start)) + " with " + describe(device) +
             ", peak memory " + format("%.2f GiB", peak_memory_gib(device)));
}

}  // namespace

ParameterCount count_parameters_by_part(const models::ModelOptions& options) {
  const auto model = models::make_language_model(options, at::kMeta);
  const at::Tensor head = model->head_weight();
  ParameterCount count;
  for (const auto& [name, parameter] : named_parameters(*model)) {
    int64_t& part = name.find("embed") != std::string::npos ? count.embedding
                    : parameter.is_same(head)               ? count.head
                                                            : count.blocks;
    part += parameter.numel();
  }
  return count;
}

MemoryEstimate estimate_memory(const config::Config& config) {
  const int64_t weights = 4 * count_parameters_by_part(config.model).total();
  return {weights, weights, 2 * weights, activation_bytes(config)};
}

std::string describe_run(const config::Config& config) {
  const ParameterCount count = count_parameters_by_part(config.model);
  const MemoryEstimate memory = estimate_memory(config);
  const int64_t steps = total_steps(config);
  const int64_t per_step = config.train.global_batch_size * config.data.seq_len;
  const double forward = forward_flops_per_token(config.model, config.data.seq_len);
  const nlohmann::ordered_json numbers = {
      {"parameters", count.total()},
      {"parameters_embedding", count.embedding},
      {"parameters_head", count.head},
      {"forward_flops_per_token", forward},
      {"training_flops", 3 * forward * static_cast<double>(steps * per_step)},
      {"memory_bytes", memory.total()},
      {"activation_bytes", memory.activations},
      {"micro_batch_size", micro_batch(config)},
      {"tokens_per_step", per_step},
      {"steps", steps},
      {"tokens", steps * per_step}};
  return numbers.dump();
}

void dry_run(const config::Config& given) {
  config::Config config = given;
  print_model(config);
  const MemoryEstimate memory = estimate_memory(config);
  const at::Device device = choose_device(config.run.device, "run.device");
  const int64_t available = available_memory_bytes(device);
  print_memory(memory, available);
  print_schedule(config);
  if (!has_data(config)) {
    print_line(
        "data        none configured: not checked, and no step was run (set data.text, "
        "data.train or data.task.name)");
    return;
  }
  if (const std::string missing = missing_data(config); !missing.empty()) {
    print_line("data        " + missing + ": not checked, and no step was run");
    return;
  }
  const TrainingData data = open_training_data(config);
  print_data(config, data);
  if (available >= 0 && memory.total() > available) {
    print_line("one step    not run: it would need more memory than there is");
    return;
  }
  run_one_step(config, data, device);
}

}  // namespace xlstm::train
