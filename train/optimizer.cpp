#include "train/optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <sstream>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/models/language_model.h"
#include "csrc/nn/layers.h"

namespace xlstm::train {
namespace {

/// Pieces begin at multiples of this many elements, so that the update's vectors are the same as those of the whole.
constexpr int64_t kPieceElements = 64;
constexpr std::array kMoments{"exp_avg.", "exp_avg_sq."};

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.sizes() << " " << tensor.scalar_type();
  return text.str();
}

/// Elements begin to end of a contiguous tensor; the tensor itself where that is all of it.
at::Tensor part_of(const at::Tensor& tensor, int64_t begin, int64_t end) {
  return end - begin == tensor.numel() ? tensor : tensor.view(-1).slice(0, begin, end);
}

}  // namespace

AdamW::AdamW(const NamedTensors& parameters, const config::OptimConfig& options,
             ProcessGroup* group, ShardedWeights* weights)
    : options_(options),
      group_(group),
      place_(group != nullptr ? group->place() : ProcessPlace{}),
      weights_(weights),
      sharded_((options.shard || weights != nullptr) && !place_.alone()) {
  const at::Device device = parameters.empty() ? at::kCPU : parameters.front().second.device();
  step_ = at::zeros({1}, at::TensorOptions().dtype(at::kFloat).device(device));
  for (const auto& [name, tensor] : parameters) {
    TORCH_CHECK(tensor.is_contiguous(), "AdamW: ", name, ": expected a contiguous tensor");
    parameters_.push_back(
        {name,
         tensor,
         models::decays(name, tensor, options.weight_decay_on_embedding) ? options.weight_decay : 0,
         weights != nullptr && weights->parts(tensor) != nullptr,
         {}});
  }
  std::stable_partition(parameters_.begin(), parameters_.end(), [&](const Parameter& parameter) {
    return models::decays(parameter.name, parameter.tensor, options_.weight_decay_on_embedding);
  });
  divide();
}

/// Of all elements in a row each process has an equal part, but where the weights are divided already.
void AdamW::divide() {
  const at::NoGradGuard no_grad;
  const int64_t owners = sharded_ ? place_.size : 1;
  int64_t total = 0, start = 0;
  for (const Parameter& parameter : parameters_)
    if (!parameter.divided) total += parameter.tensor.numel();
  for (Parameter& parameter : parameters_) {
    if (parameter.divided) {
      for (const HeldPart& part : *weights_->parts(parameter.tensor))
        parameter.pieces.push_back({part.owner, part.begin, part.end, part.weights, {}});
      continue;
    }
    const int64_t count = parameter.tensor.numel();
    const auto begin_of = [&](int64_t owner) {
      const int64_t at = std::clamp<int64_t>(total * owner / owners - start, 0, count);
      return at == count ? count : at / kPieceElements * kPieceElements;
    };
    for (int64_t owner = 0; owner < owners; ++owner) {
      Piece piece{sharded_ ? owner : place_.rank,
                  begin_of(owner),
                  owner + 1 == owners ? count : begin_of(owner + 1),
                  {},
                  {}};
      if (piece.begin == piece.end && owners > 1) continue;
      if (own(piece)) piece.weights = part_of(parameter.tensor, piece.begin, piece.end);
      parameter.pieces.push_back(std::move(piece));
    }
    start += count;
  }
  for (Parameter& parameter : parameters_) {
    for (Piece& piece : parameter.pieces) {
      if (!own(piece)) continue;
      for (at::Tensor& moment : piece.moments)
        moment = at::zeros(piece.weights.sizes(), piece.weights.options().requires_grad(false));
    }
  }
}

/// Undefined where there is none.
at::Tensor AdamW::gradient(const Parameter& parameter, const Piece& piece) const {
  if (parameter.divided) return piece.weights.grad();
  const at::Tensor& whole = parameter.tensor.grad();
  return whole.defined() ? part_of(whole.contiguous(), piece.begin, piece.end) : whole;
}

void AdamW::step(const at::Tensor& learning_rate, const at::Tensor& divisor,
                 const at::Tensor& skip) {
  const at::NoGradGuard no_grad;
  // The kernels for CUDA read a float32, those for the CPU any number.
  const at::Tensor rate = step_.is_cpu() ? learning_rate : learning_rate.to(at::kFloat);
  step_.add_(1);
  if (skip.defined()) step_.sub_(skip);
  update(options_.weight_decay, rate, divisor, skip);
  if (options_.weight_decay != 0) update(0, rate, divisor, skip);
  if (sharded_) exchange();
}

/// Of the parameters with this decay.
void AdamW::update(double weight_decay, const at::Tensor& rate, const at::Tensor& divisor,
                   const at::Tensor& skip) {
  std::vector<at::Tensor> tensors, gradients, exp_avgs, exp_avg_sqs;
  for (const Parameter& parameter : parameters_) {
    if (parameter.weight_decay != weight_decay) continue;
    for (const Piece& piece : parameter.pieces) {
      if (!own(piece)) continue;
      const at::Tensor of_piece = gradient(parameter, piece);
      if (!of_piece.defined()) continue;
      tensors.push_back(piece.weights);
      gradients.push_back(of_piece);
      exp_avgs.push_back(piece.moments[0]);
      exp_avg_sqs.push_back(piece.moments[1]);
    }
  }
  if (tensors.empty()) return;
  const std::vector<at::Tensor> steps(tensors.size(), step_);  // read only: all share one
  at::_fused_adamw_(tensors, gradients, exp_avgs, exp_avg_sqs, {}, steps, rate, options_.beta1,
                    options_.beta2, weight_decay, options_.eps,
                    /*amsgrad=*/false, /*maximize=*/false, nn::given(divisor), nn::given(skip));
}

/// Every process's updated elements go to the others, of parameters that all hold.
void AdamW::exchange() {
  std::vector<at::Tensor> parts;
  std::vector<int64_t> owners;
  for (const Parameter& parameter : parameters_) {
    if (parameter.divided || !parameter.tensor.grad().defined()) continue;
    for (const Piece& piece : parameter.pieces) {
      parts.push_back(part_of(parameter.tensor.detach(), piece.begin, piece.end));
      owners.push_back(piece.owner);
    }
  }
  group_->broadcast(parts, owners);
}

void AdamW::zero_grad() {
  for (Parameter& parameter : parameters_) parameter.tensor.mutable_grad() = at::Tensor();
  if (weights_ != nullptr) weights_->zero_grad();
}

int64_t AdamW::steps() const { return static_cast<int64_t>(step_.item<float>()); }

int64_t AdamW::bytes() const {
  size_t bytes = 0;
  for (const Parameter& parameter : parameters_) {
    for (const Piece& piece : parameter.pieces) {
      if (!own(piece)) continue;
      for (const at::Tensor& moment : piece.moments) bytes += moment.nbytes();
    }
  }
  return static_cast<int64_t>(bytes);
}

/// A moment of a whole parameter, from all its owners, in the process that leads; undefined in the others.
at::Tensor AdamW::collect(const Parameter& parameter, size_t moment) const {
  at::Tensor whole;
  if (place_.leads())
    whole = at::empty(parameter.tensor.sizes(), parameter.tensor.options().device(at::kCPU));
  for (const Piece& piece : parameter.pieces) {
    if (!place_.leads()) {
      if (own(piece)) group_->send(piece.moments[moment].cpu(), 0);
      continue;
    }
    const at::Tensor part = part_of(whole, piece.begin, piece.end);
    if (own(piece)) {
      part.copy_(piece.moments[moment]);
    } else {
      group_->receive(part, piece.owner);
    }
  }
  return whole;
}

/// whole: a moment of a whole parameter, in the process that leads, for all its owners.
void AdamW::hand_out(const at::Tensor& whole, Parameter& parameter, size_t moment) {
  for (Piece& piece : parameter.pieces) {
    if (!place_.leads()) {
      if (!own(piece)) continue;
      const at::Tensor part = at::empty(piece.moments[moment].sizes(),
                                        piece.moments[moment].options().device(at::kCPU));
      group_->receive(part, 0);
      piece.moments[moment].copy_(part);
      continue;
    }
    const at::Tensor part = part_of(whole, piece.begin, piece.end);
    if (own(piece)) {
      piece.moments[moment].copy_(part);
    } else {
      group_->send(part.cpu(), piece.owner);
    }
  }
}

NamedTensors AdamW::state() const {
  const at::NoGradGuard no_grad;
  NamedTensors state;
  for (const Parameter& parameter : parameters_) {
    for (size_t i = 0; i < kMoments.size(); ++i) {
      const at::Tensor moment =
          sharded_ ? collect(parameter, i) : parameter.pieces.front().moments[i];
      if (moment.defined()) state.emplace_back(kMoments[i] + parameter.name, moment);
    }
  }
  if (!sharded_ || place_.leads()) state.emplace_back("step", step_);
  return state;
}

void AdamW::check_state(const NamedTensors& state) const {
  std::map<std::string, at::Tensor> left(state.begin(), state.end());
  const auto check = [&](const std::string& name, const at::Tensor& like) {
    const auto found = left.find(name);
    if (found == left.end()) {
      throw Error(ExitCode::kCheckpoint,
                  "optimizer state lacks " + name + ": it belongs to another model");
    }
    const at::Tensor& source = found->second;
    if (source.sizes() != like.sizes() || source.scalar_type() != like.scalar_type()) {
      throw Error(ExitCode::kCheckpoint, "optimizer state " + name + ": expected " +
                                             describe(like) + ", got " + describe(source) +
                                             ": it belongs to another model");
    }
    left.erase(found);
  };
  for (const Parameter& parameter : parameters_)
    for (const char* const moment : kMoments) check(moment + parameter.name, parameter.tensor);
  check("step", step_);
  if (!left.empty()) {
    throw Error(ExitCode::kCheckpoint,
                "optimizer state holds " + left.begin()->first + ", which this model lacks");
  }
}

void AdamW::load_state(const NamedTensors& state) {
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> whole;
  if (place_.leads()) {
    check_state(state);
    whole.insert(state.begin(), state.end());
    step_.copy_(whole.at("step"));
  }
  std::vector<at::Tensor> of_all{step_};
  for (Parameter& parameter : parameters_) {
    for (size_t i = 0; i < kMoments.size(); ++i) {
      at::Tensor& own = parameter.pieces.front().moments[i];
      if (sharded_) {
        hand_out(place_.leads() ? whole.at(kMoments[i] + parameter.name) : at::Tensor(), parameter,
                 i);
      } else {
        if (place_.leads()) own.copy_(whole.at(kMoments[i] + parameter.name));
        of_all.push_back(own);
      }
    }
  }
  if (group_ != nullptr) group_->broadcast(of_all);
}

}  // namespace xlstm::train
