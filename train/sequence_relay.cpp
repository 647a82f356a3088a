#include "train/sequence_relay.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <string>
#include <utility>

#include "csrc/core/error.h"
#include "train/carried_state.h"
#include "train/schedule.h"

namespace xlstm::train {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

BatchShare share_of_batch(const config::Config& config, const ProcessPlace& place) {
  const int64_t segments = config.train.sequence_parallel, batch = config.train.global_batch_size;
  if (place.size % segments != 0)
    throw Error(ExitCode::kConfig, "train.sequence_parallel is " + std::to_string(segments) +
                                       ", but there " +
                                       (place.alone() ? "is one process; start them by torchrun"
                                                      : "are " + std::to_string(place.size) +
                                                            " processes; make that a multiple"));
  const int64_t groups = process_groups(config, place.size);
  if (batch % groups != 0)
    throw Error(ExitCode::kConfig, "train.global_batch_size " + std::to_string(batch) +
                                       " cannot be shared by " + std::to_string(groups) +
                                       (segments > 1 ? " times " + std::to_string(segments) : "") +
                                       " processes; make it a multiple of " +
                                       std::to_string(groups));
  const int64_t sequences = sequences_of_process(config, place.size);
  return {place.rank / segments * sequences, sequences, place.rank % segments, segments};
}

/// What the two functions of autograd know besides tensors.
struct SequenceRelay::Link : torch::CustomClassHolder {
  Link(SequenceRelay& of, int64_t number) : relay(of), block(number) {}
  static const Link& of(AutogradContext* ctx) {
    return static_cast<const Link&>(*ctx->saved_data["link"].toCapsule());
  }
  SequenceRelay& relay;
  int64_t block;
};

/// Takes the state of a block; in the backward pass its gradient goes to where it came from.
class SequenceRelay::Receive : public torch::autograd::Function<Receive> {
 public:
  /// The tensor is a number that needs a gradient, so that the state does.
  static variable_list forward(AutogradContext* ctx, const at::Tensor&, int64_t sequences,
                               const c10::intrusive_ptr<Link>& link) {
    ctx->saved_data["link"] = c10::IValue::make_capsule(link);
    variable_list state = link->relay.empty_like(link->block, sequences);
    for (const at::Tensor& tensor : state) link->relay.group_.receive(tensor, link->relay.before_);
    return state;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Link& link = Link::of(ctx);
    for (const at::Tensor& gradient : gradients)
      link.relay.post(gradient.contiguous(), link.relay.before_);
    return variable_list(3);
  }
};

/// Gives the state of a block away, and zero for the loss. Whatever of it needs a gradient, the next process sends one.
class SequenceRelay::Send : public torch::autograd::Function<Send> {
 public:
  /// The tensor is a number that needs a gradient, so that this is in the graph.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor&, at::TensorList state,
                            const c10::intrusive_ptr<Link>& link) {
    link->relay.check(link->block, state);
    ctx->saved_data["link"] = c10::IValue::make_capsule(link);
    ctx->saved_data["sequences"] = state.front().size(0);
    for (const at::Tensor& tensor : state)
      link->relay.post(tensor.contiguous(), link->relay.after_);
    return at::zeros({}, state.front().options().dtype(at::kFloat));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    const Link& link = Link::of(ctx);
    variable_list gradients(1);  // of the number
    for (at::Tensor& gradient :
         link.relay.empty_like(link.block, ctx->saved_data["sequences"].toInt())) {
      link.relay.group_.receive(gradient, link.relay.after_);
      gradients.push_back(std::move(gradient));
    }
    gradients.emplace_back();  // of `link`
    return gradients;
  }
};

SequenceRelay::SequenceRelay(models::LanguageModel& model, const config::Config& config,
                             ProcessGroup& group)
    : model_(model),
      group_(group),
      share_(share_of_batch(config, group.place())),
      before_(group.place().rank - 1),
      after_(group.place().rank + 1),
      shapes_(empty_state(model, 1, config.train.dtype == "bfloat16")) {}

std::vector<at::Tensor> SequenceRelay::empty_like(int64_t block, int64_t sequences) const {
  std::vector<at::Tensor> state;
  for (const at::Tensor& tensor : shapes_[static_cast<size_t>(block)]) {
    std::vector<int64_t> sizes = tensor.sizes().vec();
    sizes.front() = sequences;
    state.push_back(at::empty(sizes, tensor.options().requires_grad(false)));
  }
  return state;
}

at::Tensor SequenceRelay::needs_gradient() const {
  return at::zeros({}, model_.head_weight().options().requires_grad(false)).set_requires_grad(true);
}

/// The next process makes room by `shapes_`.
void SequenceRelay::check(int64_t block, at::TensorList state) const {
  const models::BlockState& expected = shapes_[static_cast<size_t>(block)];
  TORCH_INTERNAL_ASSERT(state.size() == expected.size());
  for (size_t i = 0; i < state.size(); ++i)
    TORCH_INTERNAL_ASSERT(state[i].scalar_type() == expected[i].scalar_type() &&
                              state[i].sizes().slice(1) == expected[i].sizes().slice(1),
                          "block ", block, ": tensor ", i, " of its state is ",
                          state[i].scalar_type(), " ", state[i].sizes(), ", that of no token ",
                          expected[i].scalar_type(), " ", expected[i].sizes());
}

void SequenceRelay::post(const at::Tensor& tensor, int64_t to) {
  under_way_.push_back(group_.begin_send(tensor.detach(), to));
}

models::BlockState SequenceRelay::receive(int64_t block, int64_t sequences) {
  if (first()) return {};
  return Receive::apply(needs_gradient(), sequences, c10::make_intrusive<Link>(*this, block));
}

void SequenceRelay::send(int64_t block, const models::BlockState& state) {
  if (last()) return;
  const at::Tensor zero =
      Send::apply(needs_gradient(), at::TensorList(state), c10::make_intrusive<Link>(*this, block));
  sent_ = sent_.defined() ? sent_ + zero : zero;
}

at::Tensor SequenceRelay::with_sent(const at::Tensor& loss) {
  if (!sent_.defined()) return loss;
  return loss + std::exchange(sent_, at::Tensor()).to(loss.scalar_type());
}

void SequenceRelay::finish() {
  for (const auto& wait : std::exchange(under_way_, {})) wait();
}

}  // namespace xlstm::train
