#include "csrc/nn/recompute.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>

#include "csrc/nn/random_state.h"

namespace xlstm::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Runs a scope with the random numbers of the forward pass; the stream goes on afterwards as if nothing happened.
class RandomStateGuard {
 public:
  RandomStateGuard(at::Device device, const at::Tensor& state) : device_(device) {
    if (!state.defined()) return;
    before_ = random_state(device_);
    set_random_state(device_, state);
  }
  ~RandomStateGuard() {
    if (!before_.defined()) return;
    try {
      set_random_state(device_, before_);
    } catch (
        const std::exception& error) {  // a GPU that has failed: the backward pass says so, too
      TORCH_WARN("random numbers repeat those of a recomputed block: ", error.what());
    }
  }
  RandomStateGuard(const RandomStateGuard&) = delete;
  RandomStateGuard& operator=(const RandomStateGuard&) = delete;

 private:
  at::Device device_;
  at::Tensor before_;
};

struct Autocast {
  explicit Autocast(at::DeviceType device) : enabled(at::autocast::is_autocast_enabled(device)) {
    if (enabled) dtype = at::autocast::get_autocast_dtype(device);
  }
  bool enabled;
  at::ScalarType dtype = at::kFloat;
};

/// Autocast as given, without its cache of cast weights: one filled under no-grad would cut the graph of the recompute.
class AutocastGuard {
 public:
  AutocastGuard(at::DeviceType device, const Autocast& wanted)
      : device_(device), before_(device), cache_before_(at::autocast::is_autocast_cache_enabled()) {
    set(wanted);
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~AutocastGuard() {
    set(before_);
    at::autocast::set_autocast_cache_enabled(cache_before_);
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  void set(const Autocast& value) const {
    at::autocast::set_autocast_enabled(device_, value.enabled);
    if (value.enabled) at::autocast::set_autocast_dtype(device_, value.dtype);
  }
  at::DeviceType device_;
  Autocast before_;
  bool cache_before_;
};

/// Training or evaluation mode of a block and what it consists of, as at one time, for a scope.
class ModeGuard {
 public:
  static std::vector<bool> modes(const Block& block) {
    std::vector<bool> modes;
    for (const auto& module : block.modules()) modes.push_back(module->is_training());
    return modes;
  }
  ModeGuard(Block& block, const std::vector<bool>& wanted) : block_(block), before_(modes(block)) {
    set(wanted);
  }
  ~ModeGuard() { set(before_); }
  ModeGuard(const ModeGuard&) = delete;
  ModeGuard& operator=(const ModeGuard&) = delete;

 private:
  void set(const std::vector<bool>& wanted) {
    if (modes(block_) == wanted) return;
    size_t i = 0;  // a module sets those it consists of, which come behind it
    for (const auto& module : block_.modules()) module->train(wanted[i++]);
  }
  Block& block_;
  std::vector<bool> before_;
};

/// Hooks of tensors are off in a scope: they are for the gradients that come out of it.
class HooksAside {
 public:
  explicit HooksAside(const variable_list& tensors) : tensors_(tensors), hooks_(tensors.size()) {
    for (size_t i = 0; i < tensors_.size(); ++i) exchange(i);
  }
  ~HooksAside() {
    for (size_t i = tensors_.size(); i-- > 0;) exchange(i);  // one may be there twice
  }
  HooksAside(const HooksAside&) = delete;
  HooksAside& operator=(const HooksAside&) = delete;

 private:
  void exchange(size_t i) {
    if (tensors_[i].requires_grad()) hooks_[i].swap(torch::autograd::impl::hooks(tensors_[i]));
  }
  const variable_list tensors_;
  std::vector<std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>> hooks_;
};

/// What the backward pass needs besides tensors. Tensor inputs of the node: x, the state, the block's
/// parameters and those it borrows.
struct Call : torch::CustomClassHolder {
  Call(std::shared_ptr<Block> block_, size_t num_state_, size_t num_parameters_, bool fused_,
       bool draws, at::Device device)
      : block(std::move(block_)),
        num_state(num_state_),
        num_parameters(num_parameters_),
        fused(fused_),
        modes(ModeGuard::modes(*block)),
        autocast(device.type()) {
    if (draws && block->is_training() && !device.is_meta()) random = random_state(device);
  }
  variable_list run(const variable_list& inputs, const std::optional<at::Tensor>& reset) const {
    const at::Device device = inputs[0].device();
    AutocastGuard autocast_guard(device.type(), autocast);
    const auto first = inputs.begin() + 1;
    auto [y, next] = block->forward(
        inputs[0], State(first, first + static_cast<int64_t>(num_state)), reset, fused);
    variable_list outputs = {std::move(y)};
    for (auto& tensor : next) outputs.push_back(std::move(tensor));
    return outputs;
  }
  std::shared_ptr<Block> block;
  size_t num_state, num_parameters;
  bool fused;
  std::vector<bool> modes;
  Autocast autocast;
  at::Tensor random;  ///< undefined where nothing is drawn
};

struct Checkpoint : torch::autograd::Function<Checkpoint> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs,
                               const std::optional<at::Tensor>& reset,
                               const c10::intrusive_ptr<Call>& call) {
    ctx->set_materialize_grads(false);  // states are large and mostly without a gradient
    variable_list saved = inputs.vec();
    saved.push_back(reset.value_or(at::Tensor()));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    const Fetched fetched(call->block->transient, TransientParameters::Pass::kForward);
    return call->run(inputs.vec(), reset);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "activation_checkpointing: second derivatives are not implemented");
    const auto capsule = ctx->saved_data["call"].toCapsule();
    const Call& call = static_cast<const Call&>(*capsule);
    variable_list inputs = ctx->get_saved_variables();
    const at::Tensor reset = inputs.back();
    inputs.pop_back();
    variable_list result = gradients(call, inputs, reset, grads);
    if (const auto& transient = call.block->transient) {
      const auto first = result.begin() + static_cast<int64_t>(1 + call.num_state);
      const auto last = first + static_cast<int64_t>(call.num_parameters);
      transient->take_gradients({first, last});
      std::fill(first, last, at::Tensor());
    }
    result.resize(result.size() + 2);  // `reset` and `call` have none
    return result;
  }

 private:
  /// Of the inputs, undefined where none is wanted or reached.
  static variable_list gradients(const Call& call, variable_list& inputs, const at::Tensor& reset,
                                 const variable_list& grads) {
    const Fetched fetched(call.block->transient, TransientParameters::Pass::kBackward);
    const HooksAside hooks_aside(inputs);
    const variable_list recomputed = recompute(call, inputs, reset);
    variable_list outputs, output_grads, wanted;
    for (size_t i = 0; i < recomputed.size(); ++i) {
      if (!grads[i].defined() || !recomputed[i].requires_grad()) continue;
      outputs.push_back(recomputed[i]);
      output_grads.push_back(grads[i]);
    }
    for (const auto& input : inputs) {
      if (input.requires_grad()) wanted.push_back(input);
    }
    variable_list result(inputs.size());
    if (outputs.empty() || wanted.empty()) return result;
    const variable_list found =
        torch::autograd::grad(outputs, wanted, output_grads, /*retain_graph=*/std::nullopt,
                              /*create_graph=*/false, /*allow_unused=*/true);
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].requires_grad()) result[i] = found[next++];
    }
    return result;
  }

  /// Replaces x and the state in `inputs` by leaves of a graph of its own and runs the block on them. The parameters
  /// stay: the block holds them, and grad() stops at them.
  static variable_list recompute(const Call& call, variable_list& inputs, const at::Tensor& reset) {
    at::AutoGradMode enable_grad(true);
    for (size_t i = 0; i <= call.num_state; ++i) {
      inputs[i] = inputs[i].detach().set_requires_grad(inputs[i].requires_grad());
    }
    RandomStateGuard random_guard(inputs[0].device(), call.random);
    const ModeGuard modes(*call.block, call.modes);
    return call.run(inputs, given(reset));
  }
};

}  // namespace

Result checkpoint(const std::shared_ptr<Block>& block, const at::Tensor& x, const State& state,
                  const std::optional<at::Tensor>& reset, bool fused, bool draws) {
  if (!at::GradMode::is_enabled()) {
    const Fetched fetched(block->transient, TransientParameters::Pass::kForward);
    return block->forward(x, state, reset, fused);
  }
  variable_list inputs = {x};
  inputs.insert(inputs.end(), state.begin(), state.end());
  const variable_list parameters = block->parameters();
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  for (auto& parameter : block->outer_parameters()) inputs.push_back(parameter);
  auto outputs = Checkpoint::apply(
      at::TensorList(inputs), reset,
      c10::make_intrusive<Call>(block, state.size(), parameters.size(), fused, draws, x.device()));
  return {outputs[0], State(outputs.begin() + 1, outputs.end())};
}

}  // namespace xlstm::nn
