#include "train/gradient_sums.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

namespace xlstm::train {
namespace {

c10::Stream current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace

/// Called once in a pass, when a parameter has all of its gradient: what a recomputed block finds goes through its inputs.
class GradientSums::Hook : public torch::autograd::PostAccumulateGradHook {
 public:
  Hook(GradientSums& sums, Bucket& bucket) : sums_(sums), bucket_(bucket) {}
  void operator()(const at::Tensor& parameter) override {
    // A sum follows the stream that is current where it begins. What another stream computes is summed behind the pass,
    // which waits for all of them.
    if (current_stream(parameter.device()) == sums_.stream_) sums_.arrived(bucket_);
  }

 private:
  GradientSums& sums_;
  Bucket& bucket_;
};

GradientSums::GradientSums(const std::vector<at::Tensor>& parameters, ProcessGroup& group,
                           int64_t bucket_bytes)
    : group_(group) {
  std::vector<at::Tensor> bucket;
  int64_t bytes = 0;
  const auto close = [&] {
    if (!bucket.empty()) buckets_.push_back({TensorRow(std::exchange(bucket, {})), 0});
    bytes = 0;
  };
  for (size_t i = parameters.size(); i-- > 0;) {
    const auto size = static_cast<int64_t>(parameters[i].nbytes());
    if (bytes + size > bucket_bytes ||
        (!bucket.empty() && bucket.front().scalar_type() != parameters[i].scalar_type()))
      close();
    bucket.push_back(parameters[i]);
    bytes += size;
  }
  close();
}

GradientSums::Scope::Scope(GradientSums* sums) : sums_(sums) {
  if (sums_ == nullptr || sums_->buckets_.empty()) return;
  TORCH_INTERNAL_ASSERT(sums_->under_way_.empty(), "sums that nobody has waited for");
  sums_->stream_ = current_stream(sums_->buckets_.front().parameters.tensors().front().device());
  for (Bucket& bucket : sums_->buckets_) {
    bucket.missing = bucket.parameters.tensors().size();
    for (const at::Tensor& parameter : bucket.parameters.tensors())
      torch::autograd::impl::set_post_acc_grad_hooks(parameter,
                                                     std::make_unique<Hook>(*sums_, bucket));
  }
}

GradientSums::Scope::~Scope() {
  if (sums_ == nullptr) return;
  for (const Bucket& bucket : sums_->buckets_)
    for (const at::Tensor& parameter : bucket.parameters.tensors())
      torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
}

void GradientSums::arrived(Bucket& bucket) {
  --bucket.missing;
  while (begun_ < buckets_.size() && buckets_[begun_].missing == 0) begin_next();
}

/// The gradients move into a row of their own: what autograd has given may share memory with what it still reads.
void GradientSums::begin_next() {
  const at::NoGradGuard no_grad;
  const TensorRow& parameters = buckets_[begun_++].parameters;
  const at::Tensor row = at::empty({parameters.elements()},
                                   parameters.tensors().front().options().requires_grad(false));
  for (size_t i = 0; i < parameters.tensors().size(); ++i) {
    at::Tensor& gradient = parameters.tensors()[i].mutable_grad();
    const at::Tensor place = parameters.place(i, row);
    if (!gradient.defined()) {
      place.zero_();
      continue;
    }
    place.copy_(gradient);
    gradient = place;
  }
  under_way_.push_back(group_.begin_sum(row));
}

void GradientSums::finish(const at::Tensor& also) {
  while (begun_ < buckets_.size()) begin_next();
  under_way_.push_back(group_.begin_sum(also));
  begun_ = 0;
  for (const auto& wait : std::exchange(under_way_, {})) wait();
}

}  // namespace xlstm::train
