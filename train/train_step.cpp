#include "train/train_step.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "train/failpoint.h"
#include "train/schedule.h"

namespace xlstm::train {
namespace {

/// bfloat16 matrix products for as long as it lives. The weights' bfloat16 copies belong to one
/// graph: they go with it.
class Autocast {
 public:
  explicit Autocast(bool enabled) : enabled_(enabled) {
    if (!enabled_) return;
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~Autocast() {
    if (!enabled_) return;
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool enabled_;
};

/// L2 norm of each tensor, float64.
at::Tensor norms_of(const NamedTensors& tensors) {
  std::vector<at::Tensor> list;
  list.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) list.push_back(tensor);
  return at::stack(at::_foreach_norm(list)).to(at::kDouble);
}

/// Those that the backward pass reached.
NamedTensors gradients_of(const NamedTensors& parameters) {
  NamedTensors gradients;
  gradients.reserve(parameters.size());
  for (const auto& [name, parameter] : parameters) {
    if (parameter.grad().defined()) gradients.emplace_back(name, parameter.grad());
  }
  return gradients;
}

}  // namespace

NamedTensors named_parameters(const models::LanguageModel& model) {
  NamedTensors parameters;
  for (const auto& item : model.named_parameters())
    parameters.emplace_back(item.key(), item.value());
  return parameters;
}

std::string first_non_finite(const NamedTensors& tensors) {
  if (tensors.empty()) return "";
  const at::NoGradGuard no_grad;
  const at::Tensor norms = norms_of(tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!std::isfinite(norms.const_data_ptr<double>()[i])) return tensors[i].first;
  }
  return "";
}

TrainStep::TrainStep(models::LanguageModel& model, AdamW& optimizer, const config::Config& config)
    : model_(model),
      optimizer_(optimizer),
      config_(config),
      parameters_(named_parameters(model)),
      total_steps_(total_steps(config)) {}

double TrainStep::accumulate_gradients(const TrainBatch& batch) {
  const int64_t batch_size = batch.host.batch_size;
  const int64_t micro =
      config_.train.micro_batch_size > 0 ? config_.train.micro_batch_size : batch_size;
  // Sums per micro batch, divided by the targets of all of them: masked tokens do not shift the
  // weights.
  const double count = static_cast<double>(std::max<int64_t>(1, batch.host.num_targets));
  double loss_sum = 0;
  for (int64_t first = 0; first < batch_size; first += micro) {
    const int64_t rows = std::min(micro, batch_size - first);
    const auto part = [&](const at::Tensor& tensor) { return tensor.narrow(0, first, rows); };
    at::Tensor loss;
    {
      const Autocast autocast(config_.train.dtype == "bfloat16");
      const auto reset = batch.reset.defined() ? std::optional(part(batch.reset)) : std::nullopt;
      loss = model_.loss(part(batch.ids), part(batch.targets), reset, "sum");
    }
    loss.backward(at::full({}, 1 / count, loss.options().requires_grad(false)));
    loss_sum += loss.item<double>();
  }
  return loss_sum / count;
}

StepResult TrainStep::run(const TrainBatch& batch, int64_t step) {
  StepResult result;
  // 2 forward and backward
  result.loss = accumulate_gradients(batch);
  if (failpoint_at("trainer.nan_grad", step)) {
    const at::NoGradGuard no_grad;
    parameters_.front().second.mutable_grad().fill_(std::numeric_limits<float>::quiet_NaN());
  }
  // 3 finite check, before anything is changed
  const NamedTensors gradients = gradients_of(parameters_);
  {
    const at::NoGradGuard no_grad;
    result.grad_norm = gradients.empty() ? 0 : norms_of(gradients).norm().item<double>();
  }
  result.finite = std::isfinite(result.loss) && std::isfinite(result.grad_norm);
  if (!result.finite) result.bad_parameter = first_non_finite(gradients);
  // 4 clip: the factor is applied inside the update
  const double clip = config_.train.grad_clip;
  const double factor =
      clip > 0 && result.grad_norm > clip ? clip / (result.grad_norm + 1e-6) : 1.0;
  // 5 learning rate
  result.learning_rate = learning_rate(config_.optim, step, total_steps_);
  // 6 optimizer
  if (result.finite) optimizer_.step(result.learning_rate, factor);
  optimizer_.zero_grad();
  return result;
}

}  // namespace xlstm::train
