#include "train/optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <map>
#include <optional>
#include <sstream>

#include "csrc/core/error.h"

namespace xlstm::train {
namespace {

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.sizes() << " " << tensor.scalar_type();
  return text.str();
}

}  // namespace

bool AdamW::decays(const std::string& name, const at::Tensor& parameter,
                   const config::OptimConfig& options) {
  const auto holds = [&name](const char* part) { return name.find(part) != std::string::npos; };
  if (parameter.dim() < 2 || !holds("weight") || holds("norm") || holds("recurrent")) return false;
  return !holds("embed") || options.weight_decay_on_embedding;
}

AdamW::AdamW(const NamedTensors& parameters, const config::OptimConfig& options)
    : options_(options), groups_(2) {
  const at::Device device = parameters.empty() ? at::kCPU : parameters.front().second.device();
  step_ = at::zeros({1}, at::TensorOptions().dtype(at::kFloat).device(device));
  groups_[0].weight_decay = options.weight_decay;
  for (const auto& [name, parameter] : parameters) {
    Group& group = groups_[decays(name, parameter, options) ? 0 : 1];
    group.names.push_back(name);
    group.parameters.push_back(parameter);
    group.exp_avgs.push_back(at::zeros_like(parameter, at::MemoryFormat::Contiguous));
    group.exp_avg_sqs.push_back(at::zeros_like(parameter, at::MemoryFormat::Contiguous));
  }
}

void AdamW::step(const at::Tensor& learning_rate, const at::Tensor& divisor,
                 const at::Tensor& skip) {
  const at::NoGradGuard no_grad;
  const auto given = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  };
  // The kernels for CUDA read a float32, those for the CPU any number.
  const at::Tensor rate = step_.is_cpu() ? learning_rate : learning_rate.to(at::kFloat);
  step_.add_(1);
  if (skip.defined()) step_.sub_(skip);
  for (Group& group : groups_) {
    std::vector<at::Tensor> parameters, gradients, exp_avgs, exp_avg_sqs;
    for (size_t i = 0; i < group.parameters.size(); ++i) {
      const at::Tensor& gradient = group.parameters[i].grad();
      if (!gradient.defined()) continue;
      parameters.push_back(group.parameters[i]);
      gradients.push_back(gradient.is_contiguous() ? gradient : gradient.contiguous());
      exp_avgs.push_back(group.exp_avgs[i]);
      exp_avg_sqs.push_back(group.exp_avg_sqs[i]);
    }
    if (parameters.empty()) continue;
    const std::vector<at::Tensor> steps(parameters.size(), step_);  // read only: all share one
    at::_fused_adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, {}, steps, rate, options_.beta1,
                      options_.beta2, group.weight_decay, options_.eps,
                      /*amsgrad=*/false, /*maximize=*/false, given(divisor), given(skip));
  }
}

void AdamW::zero_grad() {
  for (Group& group : groups_) {
    for (at::Tensor& parameter : group.parameters) parameter.mutable_grad() = at::Tensor();
  }
}

int64_t AdamW::steps() const { return static_cast<int64_t>(step_.item<float>()); }

NamedTensors AdamW::state() const {
  NamedTensors state;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      state.emplace_back("exp_avg." + group.names[i], group.exp_avgs[i]);
      state.emplace_back("exp_avg_sq." + group.names[i], group.exp_avg_sqs[i]);
    }
  }
  state.emplace_back("step", step_);
  return state;
}

void AdamW::load_state(const NamedTensors& state) {
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  for (auto& [name, tensor] : this->state()) {
    const auto found = given.find(name);
    if (found == given.end()) {
      throw Error(ExitCode::kCheckpoint,
                  "optimizer state lacks " + name + ": it belongs to another model");
    }
    const at::Tensor& source = found->second;
    if (source.sizes() != tensor.sizes() || source.scalar_type() != tensor.scalar_type()) {
      throw Error(ExitCode::kCheckpoint, "optimizer state " + name + ": expected " +
                                             describe(tensor) + ", got " + describe(source) +
                                             ": it belongs to another model");
    }
    tensor.copy_(source);
    given.erase(found);
  }
  if (!given.empty()) {
    throw Error(ExitCode::kCheckpoint,
                "optimizer state holds " + given.begin()->first + ", which this model lacks");
  }
}

}  // namespace xlstm::train
