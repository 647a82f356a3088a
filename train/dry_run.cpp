#include "train/dry_run.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "csrc/nn/layers.h"
#include "train/activation_memory.h"
#include "train/carried_state.h"
#include "train/device.h"
#include "train/distributed.h"
#include "train/first_weights.h"
#include "train/flops.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/random_streams.h"
#include "train/run_folder.h"
#include "train/samples.h"
#include "train/schedule.h"
#include "train/step_timer.h"
#include "train/train_step.h"
#include "train/training_data.h"

namespace xlstm::train {
namespace {

std::string format_gib(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  return bytes < int64_t{1} << 30 ? format_number("%.1f MiB", value / (1 << 20))
                                  : format_number("%.1f GiB", value / (1 << 30));
}

std::string format_parameters(int64_t count) {
  const double millions = static_cast<double>(count) / 1e6;
  return format_thousands(count) + " (" +
         format_number(millions < 10 ? "%.2f M" : "%.1f M", millions) + ")";
}

/// Whether a run computes on a GPU; unlike choose_device, no error where the one that it asks for is elsewhere.
bool on_gpu(const config::Config& config) {
  return config.run.device == "cuda" || (config.run.device == "auto" && at::hasCUDA());
}

bool has_length(const config::Config& config) {
  return config.train.max_steps > 0 || config.train.max_tokens > 0;
}

void print_model(const config::Config& config) {
  const ParameterCount count = count_parameters_by_part(config.model);
  print_line("parameters  " + format_parameters(count.total()));
  print_line("  embedding " + format_parameters(count.embedding));
  print_line("  blocks    " + format_parameters(count.blocks));
  print_line("  head      " +
             (config.model.tie_weights ? "tied to the embedding" : format_parameters(count.head)));
  if (count.trained < count.total()) print_line("  trained   " + format_parameters(count.trained));
}

void print_memory(const MemoryEstimate& memory, int64_t available, const config::Config& config) {
  const ProcessPlace place = place_from_environment();
  print_line("memory      " + format_gib(memory.known()) +
             (memory.activations ? " estimated" : " and the activations") +
             (place.alone() ? "" : " in each of " + std::to_string(place.size) + " processes") +
             " (" +
             (available >= 0 ? format_gib(available) + " available)" : "available: unknown)"));
  const char* divided =
      config.train.shard_weights           ? "; several processes divide all but the activations"
      : config.train.sequence_parallel > 1 ? "; of whole sequences, which several processes divide"
      : config.optim.shard                 ? "; several processes divide the optimizer"
                                           : "";
  print_line("  weights " + format_gib(memory.weights) + ", gradients " +
             format_gib(memory.gradients) + ", optimizer " + format_gib(memory.optimizer) +
             ", activations " + (memory.activations ? format_gib(*memory.activations) : "unknown") +
             (memory.carried > 0 ? ", states " + format_gib(memory.carried) : "") +
             (memory.whole_weights > 0
                  ? ", to save and evaluate at least " + format_gib(memory.whole_weights) +
                        " in place of the last two"
                  : "") +
             (place.alone() ? divided : ""));
}

void print_schedule(const config::Config& config) {
  const int64_t per_step = tokens_per_step(config);
  const int64_t steps = total_steps(config), processes = place_from_environment().size;
  print_line("per step    " + format_thousands(per_step) +
             " tokens: " + std::to_string(config.train.global_batch_size) + " sequences of " +
             format_thousands(config.data.seq_len) + " in micro batches of " +
             std::to_string(micro_batch(config, processes)) +
             (processes > 1 ? " in each of " + std::to_string(processes) + " processes" : "") +
             (processes > 1 && config.train.sequence_parallel > 1
                  ? ", segments of " +
                        format_thousands(config.data.seq_len / config.train.sequence_parallel) +
                        " tokens"
                  : ""));
  print_line("whole run   " + (has_length(config)
                                   ? format_thousands(steps) + " steps, " +
                                         format_thousands(steps * per_step) + " tokens"
                                   : "length not given"));
}

/// Where the run would begin, and the checkpoint that it would go on from. Throws what a start would: settings or data that
/// must not change, a checkpoint that is bad or not there.
std::optional<CheckpointFolder> print_start(const config::Config& config, bool fresh, bool held_run,
                                            TrainingData& data) {
  const std::string folder = run_path(config.run);
  if (fresh) {
    print_line("start       at step 0; what " + folder + " holds is moved aside");
    return std::nullopt;
  }
  std::optional<CheckpointFolder> checkpoint = choose_checkpoint(config, held_run);
  if (!checkpoint) {
    print_line("start       at step 0, in " + folder);
    return std::nullopt;
  }
  const TrainerState state = state_to_go_on(*checkpoint, config, data);
  print_line("start       from " + checkpoint->path +
             (is_finished(config, state) ? ": this run is finished" : ""));
  return checkpoint;
}

void print_data(const config::Config& config, const TrainingData& data) {
  print_line("data        " + describe_data(config, data, total_steps(config)) + "; all checked");
}

/// The weights the run would start with, checked; nothing where it draws them or has its own.
std::optional<CheckpointFolder> print_first_weights(const config::Config& config, bool fresh) {
  if (config.train.init_from.empty()) return std::nullopt;
  if (!takes_first_weights(config, fresh)) {
    print_line(
        "weights     train.init_from would not be read: this run goes on from its own "
        "checkpoint");
    return std::nullopt;
  }
  CheckpointFolder weights = check_first_weights(config, config.ckpt.verify_on_load);
  print_line("weights     of " + describe(weights) + "; all tensors fit");
  warn_of_other_settings(weights, config.model, log_warning);
  return weights;
}

/// One real optimizer step on what one process takes of the first batch. weights: those the run starts or goes on with where they are not drawn.
void run_one_step(const config::Config& config, const TrainingData& data, at::Device device,
                  const std::optional<CheckpointFolder>& weights) {
  seed_random_streams(device, static_cast<uint64_t>(config.run.seed));
  const auto model = make_model(config, device);
  if (weights) load_weights(*model, *weights);
  model->train();
  AdamW optimizer(trained_parameters(*model), config.optim);
  TrainStep train_step(*model, optimizer, config);
  const TrainBatch batch(
      data.train->batch(0, sequences_of_process(config, place_from_environment().size)));
  const double start = monotonic_seconds();
  std::optional<StepResult> done = train_step.run(batch, 1);
  if (!done) done = train_step.finish();
  const StepResult& result = *done;
  const std::string learnt = result.targets > 0
                                 ? "loss " + format_number("%.4f", result.loss) +
                                       ", gradient norm " + format_number("%.3g", result.grad_norm)
                                 : "no loss, as no token of the first batch counts";
  print_line("one step    " + learnt + ", " +
             format_number("%.0f ms", 1e3 * (monotonic_seconds() - start)) + " with " +
             describe(device) + ", peak memory " +
             format_number("%.2f GiB", peak_memory_gib(device)));
}

}  // namespace

ParameterCount count_parameters_by_part(const models::ModelOptions& options) {
  const auto model = models::make_language_model(models::unrounded(options), at::kMeta);
  const at::Tensor head = model->head_weight();
  ParameterCount count;
  for (const auto& [name, parameter] : named_parameters(*model)) {
    int64_t& part = name.find("embed") != std::string::npos ? count.embedding
                    : parameter.is_same(head)               ? count.head
                                                            : count.blocks;
    part += parameter.numel();
    if (parameter.requires_grad()) count.trained += parameter.numel();
  }
  return count;
}

MemoryEstimate estimate_memory(const config::Config& config) {
  const auto model = models::make_language_model(config.model, at::kMeta);
  const int64_t processes = place_from_environment().size;
  const int64_t sequences = sequences_of_process(config, processes);
  config::Config segment = config;
  if (processes > 1) segment.data.seq_len /= config.train.sequence_parallel;
  const auto bytes_of = [](const torch::nn::Module& module) {
    int64_t bytes = 0;
    for (const auto& parameter : module.parameters())
      bytes += static_cast<int64_t>(parameter.nbytes());
    return bytes;
  };
  MemoryEstimate memory;
  memory.weights = bytes_of(*model);
  memory.gradients = 4 * count_parameters_by_part(config.model).trained;
  memory.optimizer = 2 * memory.gradients;
  memory.activations = activation_bytes(segment, on_gpu(config), processes);
  if (config.train.carry_state) memory.carried = state_bytes(config.model, sequences);
  // Of a micro batch: states that were taken, states that were given, gradients of these.
  if (processes > 1 && config.train.sequence_parallel > 1)
    memory.carried = 3 * state_bytes(config.model, micro_batch(config, processes));
  if (processes == 1) return memory;
  if (config.optim.shard || config.train.shard_weights) memory.optimizer /= processes;
  if (!config.train.shard_weights) return memory;
  // Of each block a part, and whole the weights of one and of the next, the gradients of one and of the one before.
  int64_t blocks = 0, largest = 0;
  for (const auto& module : model->modules(/*include_self=*/false)) {
    if (module->as<nn::Block>() == nullptr) continue;
    const int64_t block = bytes_of(*module);
    blocks += block;
    largest = std::max(largest, block);
  }
  const int64_t elsewhere = blocks - blocks / processes;
  memory.whole_weights = blocks;
  memory.weights += 2 * largest - elsewhere;
  memory.gradients += 2 * largest - elsewhere;
  return memory;
}

namespace {

/// Share of the tokens that count in the loss; nothing where only preparing a text would tell.
std::optional<double> counted_share(const config::Config& config) {
  const std::vector<config::DataSource>& sources = config.data.train;
  if (sources.empty() || !missing_data(config).empty()) return std::nullopt;
  double counted = 0, weights = 0;
  for (const auto& [path, weight] : sources) {
    const data::TokenFile file(path, data::Verify::kNone);
    counted += weight * static_cast<double>(file.num_counted_tokens()) /
               static_cast<double>(std::max<int64_t>(1, file.num_tokens()));
    weights += weight;
  }
  return counted / weights;
}

}  // namespace

std::string describe_run(const config::Config& config) {
  const ParameterCount count = count_parameters_by_part(config.model);
  const MemoryEstimate memory = estimate_memory(config);
  const int64_t steps = total_steps(config);
  const int64_t per_step = tokens_per_step(config);
  const double forward = forward_flops_per_token(config.model, config.data.seq_len),
               training = training_flops_per_token(config.model, config.data.seq_len);
  using Json = nlohmann::ordered_json;
  const auto given = [](bool known, const auto& number) { return known ? Json(number) : Json(); };
  const bool length = has_length(config);
  const std::optional<double> share = counted_share(config);
  const Json numbers = {
      {"parameters", count.total()},
      {"parameters_embedding", count.embedding},
      {"parameters_head", count.head},
      {"parameters_trained", count.trained},
      {"forward_flops_per_token", forward},
      {"training_flops", given(length, training * static_cast<double>(steps * per_step))},
      {"memory_bytes", given(memory.activations.has_value(), memory.known())},
      {"activation_bytes", given(memory.activations.has_value(), memory.activations.value_or(0))},
      {"micro_batch_size", micro_batch(config, place_from_environment().size)},
      {"tokens_per_step", per_step},
      {"steps", given(length, steps)},
      {"tokens", given(length, steps * per_step)},
      {"counted_tokens",
       given(length && share,
             std::llround(share.value_or(0) * static_cast<double>(steps * per_step)))}};
  return numbers.dump();
}

void dry_run(const config::Config& given, bool fresh) {
  config::Config config = given;
  check_adapters(config);
  const ProcessPlace place = place_from_environment();
  if (!place.alone()) share_of_batch(config, place);  // throws what a start would
  config::warn_of_settings_without_effect(config, log_warning);
  print_model(config);
  const MemoryEstimate memory = estimate_memory(config);
  const at::Device device = choose_device(config.run.device, "run.device");
  const int64_t available = available_memory_bytes(device);
  print_memory(memory, available, config);
  print_schedule(config);
  const bool held_run = has_data(config) && finds_run(config.run, fresh);
  const std::optional<CheckpointFolder> weights = print_first_weights(config, fresh);
  if (!has_data(config)) {
    print_line(
        "data        none configured: not checked, and no step was run (set data.text, "
        "data.train or data.task.name)");
    return;
  }
  if (const std::string missing = missing_data(config); !missing.empty()) {
    print_line("data        " + missing +
               ": not checked, nor where the run would begin; no step was run");
    return;
  }
  TrainingData data = open_training_data(config);
  print_data(config, data);
  const SampleWriter checks_prompts(config, "");
  if (weights) check_first_tokenizer(*weights, config);
  const std::optional<CheckpointFolder> own = print_start(config, fresh, held_run, data);
  if (available >= 0 && memory.known() > available) {
    print_line("one step    not run: it would need more memory than there is");
    return;
  }
  const bool shared = config.train.shard_weights || config.train.sequence_parallel > 1;
  if (shared && !place.alone()) {
    print_line("one step    not run: it takes all processes, which have a part of it each");
    return;
  }
  run_one_step(config, data, device, own ? own : weights);
}

}  // namespace xlstm::train
