#include "train/carried_state.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "csrc/core/error.h"
#include "csrc/nn/no_dropout.h"
#include "train/autocast.h"

namespace xlstm::train {
namespace {

int64_t bytes_of(const models::ModelState& state) {
  int64_t bytes = 0;
  for (const auto& block : state)
    for (const at::Tensor& tensor : block) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

std::string name_of(size_t block, size_t i) {
  return std::to_string(block) + "." + std::to_string(i);
}

/// The size of `tensor` with so many sequences.
std::vector<int64_t> sizes_of(const at::Tensor& tensor, int64_t sequences) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.front() = sequences;
  return sizes;
}

std::string text_of(at::ScalarType type, at::IntArrayRef sizes) {
  std::ostringstream text;
  text << type << " " << sizes;
  return text.str();
}

constexpr const char* kOther = ": they belong to another model, batch or train.dtype";

}  // namespace

models::ModelState empty_state(models::LanguageModel& model, int64_t sequences, bool bfloat16) {
  const at::NoGradGuard no_grad;
  const nn::NoDropout no_dropout;
  const at::Tensor weight = model.head_weight();
  const AutocastGuard autocast(weight.device().type(), bfloat16);
  const int64_t features = model.options().input_features;
  const at::Tensor none = features > 0
                              ? at::zeros({sequences, 0, features}, weight.options())
                              : at::zeros({sequences, 0}, weight.options().dtype(at::kLong));
  return model.hidden(none).second;
}

CarriedState::CarriedState(models::LanguageModel& model, const config::Config& config,
                           ProcessGroup* group)
    : group_(group),
      place_(group != nullptr ? group->place() : ProcessPlace{}),
      sequences_(config.train.global_batch_size / place_.size) {
  const bool bfloat16 = config.train.dtype == "bfloat16";
  state_ = empty_state(model, sequences_, bfloat16);
  empty_ = empty_state(model, 1, bfloat16);
}

/// Calls function(block, tensor's number, tensor) in order.
template <class Function>
void CarriedState::for_each(const Function& function) const {
  for (size_t block = 0; block < state_.size(); ++block)
    for (size_t i = 0; i < state_[block].size(); ++i) function(block, i, state_[block][i]);
}

models::ModelState CarriedState::rows(int64_t first, int64_t count) const {
  models::ModelState part(state_.size());
  for_each([&](size_t block, size_t, const at::Tensor& tensor) {
    part[block].push_back(tensor.narrow(0, first, count));
  });
  return part;
}

void CarriedState::store(int64_t first, const models::ModelState& next, const at::Tensor& loss) {
  const at::NoGradGuard no_grad;
  const at::Tensor finite = at::isfinite(loss);
  for_each([&](size_t block, size_t i, const at::Tensor& tensor) {
    const at::Tensor& from = next[block][i];
    at::Tensor to = tensor.narrow(0, first, from.size(0));
    at::where_out(to, finite, from, empty_[block][i]);
  });
}

NamedTensors CarriedState::tensors() const {
  NamedTensors all;
  for_each([&](size_t block, size_t i, const at::Tensor& tensor) {
    if (!place_.leads()) {
      group_->send(tensor.to(at::kCPU).contiguous(), 0);
      return;
    }
    at::Tensor whole =
        at::empty(sizes_of(tensor, place_.size * sequences_), tensor.options().device(at::kCPU));
    whole.narrow(0, 0, sequences_).copy_(tensor);
    for (int64_t rank = 1; rank < place_.size; ++rank)
      group_->receive(whole.narrow(0, first_of(rank), sequences_), rank);
    all.emplace_back(name_of(block, i), whole);
  });
  return all;
}

void CarriedState::load(const NamedTensors& tensors) {
  const at::NoGradGuard no_grad;
  if (place_.leads()) check(tensors);
  const std::map<std::string, at::Tensor> all(tensors.begin(), tensors.end());
  for_each([&](size_t block, size_t i, const at::Tensor& tensor) {
    if (!place_.leads()) {
      const at::Tensor part = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
      group_->receive(part, 0);
      tensor.copy_(part);
      return;
    }
    const at::Tensor& whole = all.at(name_of(block, i));
    tensor.copy_(whole.narrow(0, 0, sequences_));
    for (int64_t rank = 1; rank < place_.size; ++rank)
      group_->send(whole.narrow(0, first_of(rank), sequences_).contiguous(), rank);
  });
}

void CarriedState::check(const NamedTensors& tensors) const {
  std::map<std::string, at::Tensor> left(tensors.begin(), tensors.end());
  for_each([&](size_t block, size_t i, const at::Tensor& tensor) {
    const std::string name = name_of(block, i);
    const auto found = left.find(name);
    if (found == left.end())
      throw Error(ExitCode::kCheckpoint, "carried states lack " + name + kOther);
    const auto sizes = sizes_of(tensor, place_.size * sequences_);
    const at::Tensor& given = found->second;
    if (given.sizes() != sizes || given.scalar_type() != tensor.scalar_type())
      throw Error(ExitCode::kCheckpoint, "carried state " + name + ": expected " +
                                             text_of(tensor.scalar_type(), at::IntArrayRef(sizes)) +
                                             ", got " +
                                             text_of(given.scalar_type(), given.sizes()) + kOther);
    left.erase(found);
  });
  if (!left.empty())
    throw Error(ExitCode::kCheckpoint, "carried states hold " + left.begin()->first + kOther);
}

int64_t CarriedState::bytes() const { return bytes_of(state_); }

int64_t state_bytes(const models::ModelOptions& options, int64_t sequences) {
  const at::NoGradGuard no_grad;
  const auto blocks = models::make_block_stack(options, at::kMeta);
  blocks->eval();
  const auto none = at::zeros({1, 0, options.embedding_dim}, at::kMeta);
  return bytes_of(blocks->forward(none).second) * sequences;
}

}  // namespace xlstm::train
