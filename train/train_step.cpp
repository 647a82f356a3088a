#include "train/train_step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "train/autocast.h"
#include "train/device.h"
#include "train/failpoint.h"
#include "train/log.h"
#include "train/schedule.h"

namespace xlstm::train {
namespace {

/// Steps as usual before one is recorded: libraries choose their algorithms and take their memory in them.
constexpr int64_t kStepsBeforeRecording = 3;

/// L2 norm of each tensor, float64.
at::Tensor norms_of(const std::vector<at::Tensor>& tensors) {
  return at::stack(at::_foreach_norm(tensors)).to(at::kDouble);
}

/// Without waiting: the source is kept by torch's pool of pinned memory until it has been read.
at::Tensor to_device(const at::Tensor& host, at::Device device) {
  return host.to(device, /*non_blocking=*/true);
}

at::TensorOptions host_numbers(at::Device device) {
  return at::TensorOptions().dtype(at::kDouble).pinned_memory(!device.is_cpu());
}

/// Not what recomputes dropout: it sets the generator back to where the forward pass was, which torch 2.11 lets happen in a
/// recording without an effect on it. The two passes of a block would then drop different numbers.
bool may_be_recorded(const config::Config& config) {
  return config.train.cuda_graph &&
         !(config.model.activation_checkpointing && config.model.dropout > 0);
}

}  // namespace

NamedTensors named_parameters(const models::LanguageModel& model) {
  NamedTensors parameters;
  for (const auto& item : model.named_parameters())
    parameters.emplace_back(item.key(), item.value());
  return parameters;
}

NamedTensors trained_parameters(const models::LanguageModel& model) {
  NamedTensors parameters = named_parameters(model);
  std::erase_if(parameters, [](const auto& item) { return !item.second.requires_grad(); });
  return parameters;
}

std::string first_non_finite(const NamedTensors& tensors) {
  if (tensors.empty()) return "";
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> list;
  list.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) list.push_back(tensor);
  const at::Tensor norms = norms_of(list).to(at::kCPU);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!std::isfinite(norms.const_data_ptr<double>()[i])) return tensors[i].first;
  }
  return "";
}

TrainStep::TrainStep(models::LanguageModel& model, AdamW& optimizer, const config::Config& config,
                     ProcessGroup* group, ShardedWeights* weights)
    : model_(model),
      optimizer_(optimizer),
      config_(config),
      group_(group != nullptr && !group->place().alone() ? group : nullptr),
      weights_(weights),
      parameters_(trained_parameters(model)),
      total_steps_(total_steps(config)),
      device_(model.head_weight().device()),
      halted_(at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device_))),
      may_record_(may_be_recorded(config) && group_ == nullptr && !device_.is_cpu() &&
                  StepGraph::available()) {
  if (weights != nullptr) {
    std::vector<double> divided;
    for (const auto& [name, parameter] : parameters_)
      divided.push_back(weights->parts(parameter) != nullptr ? 1 : 0);
    divided_ = at::tensor(divided).to(device_, at::kBool);
  }
  if (config.train.sequence_parallel > 1 && group_ != nullptr)
    relay_.emplace(model, config, *group_);
  if (config.train.carry_state) carried_.emplace(model, config, group_);
  if (group_ == nullptr) return;
  std::vector<at::Tensor> whole;
  for (const auto& [name, parameter] : parameters_)
    if (weights == nullptr || weights->parts(parameter) == nullptr) whole.push_back(parameter);
  sums_.emplace(whole, *group_);
}

/// On a CPU the batch's own memory is read. On a GPU it is copied to where the recorded step looks for it. Returns how many
/// targets of the whole batch count.
int64_t TrainStep::set_inputs(const TrainBatch& batch, double learning_rate) {
  at::Tensor scalars = at::empty({2}, host_numbers(device_));
  auto* numbers = scalars.mutable_data_ptr<double>();
  const int64_t targets =
      group_ != nullptr ? group_->sum(batch.host.num_targets) : batch.host.num_targets;
  numbers[0] = targets > 0 ? 1 / static_cast<double>(targets) : 0;
  numbers[1] = learning_rate;
  Inputs next{batch.ids, batch.targets, batch.reset, scalars};
  if (device_.is_cpu()) {
    inputs_ = next;
    return targets;
  }
  // Whether a document starts inside differs from batch to batch; the recorded work must not.
  const bool resets = config_.data.reset_state_at_document || config_.train.carry_state;
  if (resets && !next.reset.defined()) next.reset = at::zeros(next.targets.sizes(), at::kBool);
  const bool same = inputs_.ids.defined() && inputs_.ids.sizes() == next.ids.sizes() &&
                    inputs_.reset.defined() == next.reset.defined();
  const auto set = [&](at::Tensor& to, const at::Tensor& from) {
    if (!from.defined()) {
      to = from;
    } else if (same) {
      to.copy_(from, /*non_blocking=*/true);
    } else {
      to = to_device(from, device_);
    }
  };
  set(inputs_.ids, next.ids), set(inputs_.targets, next.targets);
  set(inputs_.reset, next.reset), set(inputs_.scalars, next.scalars);
  if (!same) may_record_ = may_record_ && runs_ == 0;  // sizes that change are not recorded
  return targets;
}

/// Leaves the gradients of the mean loss; returns the sum of the losses of all targets (float64). Both of all processes.
at::Tensor TrainStep::accumulate(const Inputs& inputs) {
  const int64_t batch_size = inputs.ids.size(0);
  const int64_t micro =
      config_.train.micro_batch_size > 0 ? config_.train.micro_batch_size : batch_size;
  // Sums per micro batch, divided by the targets of all of them: masked tokens do not shift the
  // weights.
  at::Tensor sum;
  const SequenceRelay::Scope segments(relay_ ? &*relay_ : nullptr);
  for (int64_t first = 0; first < batch_size; first += micro) {
    const int64_t rows = std::min(micro, batch_size - first);
    const auto part = [&](const at::Tensor& tensor) { return tensor.narrow(0, first, rows); };
    at::Tensor loss;
    models::ModelState carried;
    {
      const AutocastGuard autocast(device_.type(), config_.train.dtype == "bfloat16");
      const auto reset = inputs.reset.defined() ? std::optional(part(inputs.reset)) : std::nullopt;
      const at::Tensor ids = part(inputs.ids), targets = part(inputs.targets);
      if (carried_) {
        std::tie(loss, carried) =
            model_.loss_and_state(ids, targets, carried_->rows(first, rows), reset, "sum");
      } else {
        loss = model_.loss(ids, targets, reset, "sum");
      }
    }
    if (relay_) loss = relay_->with_sent(loss);
    {
      const bool last = first + micro >= batch_size;
      const GradientSums::Scope summed(sums_ && last ? &*sums_ : nullptr);
      loss.backward(inputs.scalars.select(0, 0).to(loss.scalar_type()));
    }
    if (carried_) carried_->store(first, carried, loss);
    if (relay_) relay_->finish();
    const at::Tensor value = loss.detach().to(at::kDouble);
    sum = sum.defined() ? sum + value : value;
  }
  if (sums_) sums_->finish(sum);
  if (weights_ != nullptr) weights_->finish_gradients();
  return sum;
}

/// L2 norm of each parameter's gradient, float64; zero where the backward pass did not reach it: it is not updated. Of
/// divided weights each process has a part of the squares.
at::Tensor TrainStep::gradient_norms() {
  std::vector<at::Tensor> gradients;
  for (const auto& [name, parameter] : parameters_) {
    at::Tensor gradient = parameter.grad();
    const auto* parts = weights_ != nullptr ? weights_->parts(parameter) : nullptr;
    if (parts != nullptr)
      for (const HeldPart& part : *parts)
        if (part.weights.defined()) gradient = part.weights.grad();
    gradients.push_back(gradient.defined() ? gradient : at::zeros({1}, parameter.options()));
  }
  const at::Tensor norms = norms_of(gradients);
  if (weights_ == nullptr) return norms;
  const at::Tensor squares = norms.square();
  group_->sum(squares);
  return at::where(divided_, squares.sqrt(), norms);
}

double TrainStep::accumulate_gradients(const TrainBatch& batch) {
  set_inputs(batch, 0);
  const at::Tensor loss = accumulate(inputs_);
  return (loss * inputs_.scalars.select(0, 0)).item<double>();
}

/// Phases 2 to 6, enqueued on the device: what a graph records. Returns the numbers of a result.
at::Tensor TrainStep::work(int64_t step) {
  // 2 forward and backward
  at::Tensor loss = accumulate(inputs_);
  loss = loss * inputs_.scalars.select(0, 0);
  if (failpoint_at("trainer.nan_grad", step)) {
    const at::NoGradGuard no_grad;
    parameters_.front().second.mutable_grad().fill_(std::numeric_limits<float>::quiet_NaN());
  }
  const at::NoGradGuard no_grad;
  const at::Tensor norms = gradient_norms();
  const at::Tensor norm = norms.norm();
  // 3 finite check, before anything is changed
  const at::Tensor bad = at::isfinite(loss + norm).logical_not().to(at::kFloat);
  const bool stop = config_.train.nonfinite == "stop";
  if (stop) halted_.copy_(at::maximum(halted_, bad));
  const at::Tensor nothing_counts = inputs_.scalars.select(0, 0).eq(0).to(at::kFloat);
  // 4 clip: the optimizer divides the gradients by this
  const double clip = config_.train.grad_clip;
  const at::Tensor divisor =
      clip > 0 ? at::where(norm > clip, (norm + 1e-6) / clip, at::ones_like(norm)).to(at::kFloat)
               : at::Tensor();
  // 6 optimizer
  optimizer_.step(inputs_.scalars.select(0, 1), divisor,
                  at::maximum(stop ? halted_ : bad, nothing_counts));
  optimizer_.zero_grad();
  if (failpoint_at("trainer.change_weight", step)) parameters_.front().second.add_(1);
  return at::cat({loss.view(1), norm.view(1), norms});
}

/// Records the step where that is possible. Nothing is computed by it.
void TrainStep::record(int64_t step) {
  may_record_ = false;  // once
  try {
    // A recording has memory of its own. What the steps before it used is not needed beside that, and while it runs torch's
    // allocator gives nothing back.
    release_reserved_memory(device_);
    graph_.record([&] { numbers_ = work(step); });
    log_debug("the training step is recorded as a CUDA graph");
  } catch (const std::exception& error) {
    optimizer_.zero_grad();
    log_warning(
        std::string("the training step cannot be recorded as a CUDA graph and runs without (") +
        error.what() + "); train.cuda_graph=false leaves out the attempt");
  }
}

void TrainStep::run_or_replay(int64_t step) {
  if (may_record_ && runs_ == kStepsBeforeRecording) record(step);
  if (graph_.recorded()) {
    graph_.replay();
  } else {
    numbers_ = work(step);
  }
  ++runs_;
}

TrainStep::Pending TrainStep::send(StepResult result) const {
  Pending pending{std::move(result), numbers_, std::nullopt};
  if (device_.is_cpu()) return pending;
  pending.numbers = at::empty(numbers_.sizes(), host_numbers(device_));
  pending.numbers.copy_(numbers_, /*non_blocking=*/true);
  pending.arrived.emplace(device_.type());
  pending.arrived->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  return pending;
}

StepResult TrainStep::receive(Pending pending) const {
  if (pending.arrived) pending.arrived->synchronize();
  const double* numbers = pending.numbers.const_data_ptr<double>();
  StepResult& result = pending.result;
  result.loss = numbers[0];
  result.grad_norm = numbers[1];
  result.finite = std::isfinite(result.loss) && std::isfinite(result.grad_norm);
  for (size_t i = 0; i < parameters_.size() && !result.finite && result.bad_parameter.empty(); ++i)
    if (!std::isfinite(numbers[2 + i])) result.bad_parameter = parameters_[i].first;
  return result;
}

std::optional<StepResult> TrainStep::run(const TrainBatch& batch, int64_t step,
                                         int64_t first_sample) {
  StepResult result;
  result.step = step;
  result.first_sample = first_sample;
  const int64_t processes = group_ != nullptr ? group_->place().size : 1;
  result.last_sample =
      first_sample + process_groups(config_, processes) * batch.host.batch_size - 1;
  result.learning_rate = learning_rate(config_.optim, step, total_steps_);  // 5
  result.targets = set_inputs(batch, result.learning_rate);
  run_or_replay(step);
  pending_.push_back(send(std::move(result)));
  const size_t late = device_.is_cpu() ? 0 : 1;
  return pending_.size() > late ? finish() : std::nullopt;
}

std::optional<StepResult> TrainStep::finish() {
  if (pending_.empty()) return std::nullopt;
  Pending pending = std::move(pending_.front());
  pending_.pop_front();
  return receive(std::move(pending));
}

}  // namespace xlstm::train
