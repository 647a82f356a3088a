#include "train/evaluation.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "csrc/core/error.h"
#include "csrc/core/progress.h"
#include "csrc/nn/no_dropout.h"
#include "train/autocast.h"

namespace xlstm::train {
namespace {

struct Score {
  double nats = 0;  ///< or squared error
  int64_t correct = 0;
  double last_errors = 0;
  double text_bytes = 0;
};

/// Token ids (B,T) or real vectors (B,T,F).
at::Tensor inputs_of(data::Batch& batch, at::Device device) {
  if (batch.num_features == 0)
    return at::from_blob(batch.input.data(), {batch.batch_size, batch.seq_len}, at::kLong)
        .to(device);
  return at::from_blob(batch.features.data(), {batch.batch_size, batch.seq_len, batch.num_features},
                       at::kFloat)
      .to(device);
}

/// Squared errors of predicted numbers, all and those of the last position that counts.
Score squared_errors(models::LanguageModel& model, data::Batch& batch, at::Device device) {
  const at::Tensor inputs = inputs_of(batch, device);
  const at::Tensor targets =
      at::from_blob(batch.values.data(), {batch.batch_size, batch.seq_len}, at::kFloat).to(device);
  const at::Tensor errors =
      model.loss(inputs, targets, {}, "none").to(at::kCPU, at::kDouble).contiguous();
  Score score;
  for (int64_t row = 0; row < batch.batch_size; ++row) {
    double last = 0;
    for (int64_t t = row * batch.seq_len; t < (row + 1) * batch.seq_len; ++t) {
      if (std::isnan(batch.values[static_cast<size_t>(t)])) continue;
      last = errors.const_data_ptr<double>()[t];
      score.nats += last;
    }
    score.last_errors += last;
  }
  return score;
}

/// Adds each target's loss to that of its group; returns their sum.
double add_by_group(const at::Tensor& losses, const data::Batch& batch, const TokenGroups& groups,
                    std::vector<GroupLoss>& by_group) {
  const at::Tensor each = losses.to(at::kCPU, at::kDouble).contiguous();
  const double* nats = each.const_data_ptr<double>();
  double total = 0;
  for (size_t i = 0; i < batch.target.size(); ++i) {
    if (batch.target[i] == data::kIgnored) continue;
    GroupLoss& group =
        by_group[static_cast<size_t>(groups.of_token[static_cast<size_t>(batch.target[i])])];
    group.nats += nats[i];
    ++group.tokens;
    total += nats[i];
  }
  return total;
}

/// The loss alone, also by group where there are groups; or, where `answers`, the likeliest token too.
Score score(models::LanguageModel& model, data::Batch& batch, at::Device device, bool answers,
            const TokenGroups* groups, std::vector<GroupLoss>& by_group) {
  if (!batch.values.empty()) return squared_errors(model, batch, device);
  const std::vector<int64_t> shape{batch.batch_size, batch.seq_len};
  const at::Tensor ids = inputs_of(batch, device);
  const at::Tensor targets = at::from_blob(batch.target.data(), shape, at::kLong).to(device);
  const at::Tensor reset =
      at::from_blob(batch.reset.data(), shape, at::kByte).to(device, at::kBool);
  if (groups != nullptr)
    return {add_by_group(model.loss(ids, targets, reset, "none"), batch, *groups, by_group)};
  if (!answers) return {model.loss(ids, targets, reset, "sum").item<double>()};
  const at::Tensor asked = (targets != data::kIgnored).flatten().nonzero().squeeze(1);
  const at::Tensor h = model.hidden(ids, {}, reset).first.flatten(0, 1).index_select(0, asked);
  const at::Tensor logits = model.logits(h), wanted = targets.flatten().index_select(0, asked);
  return {at::cross_entropy_loss(logits, wanted, {}, at::Reduction::Sum).item<double>(),
          (logits.argmax(1) == wanted).sum().item<int64_t>()};
}

/// What the processes found together.
void sum_over_processes(ProcessGroup& processes, Score& total, EvaluationResult& result) {
  std::vector<double> numbers{total.nats, static_cast<double>(total.correct), total.last_errors,
                              total.text_bytes, static_cast<double>(result.tokens)};
  for (const GroupLoss& group : result.groups)
    numbers.insert(numbers.end(), {group.nats, static_cast<double>(group.tokens)});
  processes.sum(numbers);
  total = {numbers[0], static_cast<int64_t>(numbers[1]), numbers[2], numbers[3]};
  result.tokens = static_cast<int64_t>(numbers[4]);
  for (size_t i = 0; i < result.groups.size(); ++i)
    result.groups[i] = {numbers[5 + 2 * i], static_cast<int64_t>(numbers[6 + 2 * i])};
}

}  // namespace

EvaluationResult evaluate(models::LanguageModel& model, const data::HeldOutSet& data,
                          int64_t batch_size, const EvaluationOptions& options) {
  if (batch_size < 1)
    throw Error(ExitCode::kConfig,
                "evaluation needs a batch size >= 1, got " + std::to_string(batch_size));
  const at::NoGradGuard no_grad;
  const nn::NoDropout no_dropout;
  const at::Device device = model.head_weight().device();
  const AutocastGuard autocast(device.type(), options.bfloat16);
  int64_t windows = data.num_windows();
  if (options.max_windows > 0) windows = std::min(windows, options.max_windows);

  std::optional<Progress> progress;
  if (options.show_progress) progress.emplace("evaluating", windows, "windows");
  EvaluationResult result;
  const std::optional<double> chance = data.chance();
  if (options.groups != nullptr) {
    if (chance.has_value() || models::predicts_numbers(model.options()))
      throw Error(ExitCode::kConfig, data.name() + ": only tokens of texts are judged by group");
    result.groups.resize(static_cast<size_t>(options.groups->count));
  }
  Score total;
  ProcessGroup* const processes = options.processes;
  const ProcessPlace place = processes != nullptr ? processes->place() : ProcessPlace();
  for (int64_t begin = 0; begin < windows; begin += place.size * batch_size) {
    const int64_t first = std::min(begin + place.rank * batch_size, windows);
    data::Batch batch = data.batch(first, std::min(batch_size, windows - first));
    if (batch.num_targets > 0) {
      const Score part =
          score(model, batch, device, chance.has_value(), options.groups, result.groups);
      total.nats += part.nats;
      total.correct += part.correct;
      total.last_errors += part.last_errors;
      total.text_bytes += data.text_bytes(batch);
    }
    result.tokens += batch.num_targets;
    if (progress) progress->update(std::min(first + batch_size, windows));
    options.after_batch();
  }
  if (progress) progress->finish();
  if (processes != nullptr && !place.alone()) sum_over_processes(*processes, total, result);
  if (result.tokens == 0)
    throw Error(ExitCode::kData,
                data.name() + ": no token to score in " + std::to_string(windows) +
                    " windows; each document needs at least two, and some that count");
  result.loss = total.nats / static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.loss);
  if (total.text_bytes > 0) result.bits_per_byte = total.nats / std::log(2.0) / total.text_bytes;
  if (models::predicts_numbers(model.options()))
    result.last_error = total.last_errors / static_cast<double>(windows);
  if (chance.has_value()) {
    result.accuracy = static_cast<double>(total.correct) / static_cast<double>(result.tokens);
    result.scaled_accuracy = (*result.accuracy - *chance) / (1 - *chance);
  }
  return result;
}

EvaluationResult combined(const std::vector<JudgedSet>& sets) {
  EvaluationResult all;
  double nats = 0, bytes = 0;
  bool bytes_known = true;
  for (const auto& [name, part] : sets) {
    const double part_nats = part.loss * static_cast<double>(part.tokens);
    nats += part_nats;
    bytes_known = bytes_known && part.bits_per_byte > 0;
    if (bytes_known) bytes += part_nats / std::log(2.0) / part.bits_per_byte;
    all.tokens += part.tokens;
    all.groups.resize(std::max(all.groups.size(), part.groups.size()));
    for (size_t i = 0; i < part.groups.size(); ++i) {
      all.groups[i].nats += part.groups[i].nats;
      all.groups[i].tokens += part.groups[i].tokens;
    }
  }
  all.loss = nats / static_cast<double>(all.tokens);
  all.perplexity = std::exp(all.loss);
  if (bytes_known) all.bits_per_byte = nats / std::log(2.0) / bytes;
  return all;
}

}  // namespace xlstm::train
