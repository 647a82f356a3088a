#include "train/sharded_weights.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "train/tensor_row.h"

namespace xlstm::train {

/// The sum of gradients that is on its way, while the next block computes its own.
class ShardedWeights::Reduction {
 public:
  void begin(ProcessGroup::Wait wait, std::function<void()> then) {
    wait_ = std::move(wait);
    then_ = std::move(then);
  }
  void finish() {
    if (!wait_) return;
    std::exchange(wait_, nullptr)();
    std::exchange(then_, nullptr)();
  }

 private:
  std::function<void()> wait_, then_;
};

/// The parameters of one block in a row, of which each process holds as many elements.
class ShardedWeights::Unit : public nn::TransientParameters {
 public:
  Unit(std::vector<at::Tensor> parameters, ProcessGroup& group, Reduction& reduction)
      : group_(group), reduction_(reduction), parameters_(std::move(parameters)) {
    const at::NoGradGuard no_grad;
    const int64_t processes = group.place().size;
    share_ = TensorRow::aligned((parameters_.elements() + processes - 1) / processes);
    whole_ = zeros(processes * share_);
    for (size_t i = 0; i < parameters_.tensors().size(); ++i) {
      const at::Tensor here = parameters_.place(i, whole_);
      here.copy_(parameter(i));
      parameter(i).set_data(here);
    }
    own_ = own_part().clone();
    drop();
  }

  /// Of parameter i.
  std::vector<HeldPart> parts(size_t i) {
    std::vector<HeldPart> parts;
    const int64_t first = parameters_.begin(i), last = first + parameter(i).numel();
    for (int64_t owner = first / share_; owner * share_ < last; ++owner) {
      const int64_t begin = std::max(first, owner * share_),
                    end = std::min(last, (owner + 1) * share_);
      HeldPart part{owner, begin - first, end - first, {}};
      if (owner == group_.place().rank) {
        part.weights = own_.slice(0, begin - owner * share_, end - owner * share_);
        if (end - begin == last - first) part.weights = part.weights.view(parameter(i).sizes());
        held_.emplace_back(i, part.weights);
      }
      parts.push_back(std::move(part));
    }
    return parts;
  }

  void fetch(Pass pass) override {
    if (fetched_ == 0) {
      start();
      if (const auto wait = std::exchange(arriving_, nullptr)) wait();
      if (Unit* const next = pass == Pass::kForward ? after : before) next->start();
    }
    ++fetched_;
  }

  void release() override {
    if (--fetched_ == 0) drop();
  }

  /// What was fetched ahead and not used goes.
  void forget() {
    if (fetched_ == 0) drop();
  }

  /// What the fetched weights are by now is held.
  void keep_changes() {
    const at::NoGradGuard no_grad;
    own_.copy_(own_part());
  }

  void take_gradients(const std::vector<at::Tensor>& gradients) override {
    const at::NoGradGuard no_grad;
    reduction_.finish();
    const at::Tensor all = zeros(whole_.numel()), sum = at::empty({share_}, own_.options());
    std::vector<bool> reached;
    for (size_t i = 0; i < gradients.size(); ++i) {
      reached.push_back(gradients[i].defined());
      if (reached.back()) parameters_.place(i, all).copy_(gradients[i]);
    }
    reduction_.begin(group_.reduce_scatter(sum, all), [this, sum, reached] { add(sum, reached); });
  }

  void zero_grad() {
    gradient_ = at::Tensor();
    for (auto& [i, weights] : held_) weights.mutable_grad() = at::Tensor();
  }

  Unit *before = nullptr, *after = nullptr;  ///< in the model; null at its ends

 private:
  void start() {
    if (is_here_) return;
    const at::NoGradGuard no_grad;
    c10::StorageImpl& storage = *whole_.storage().unsafeGetStorageImpl();
    const size_t bytes = static_cast<size_t>(whole_.numel()) * whole_.element_size();
    storage.set_data_ptr_noswap(storage.allocator()->allocate(bytes));
    storage.set_nbytes(bytes);
    arriving_ = group_.all_gather(whole_, own_);
    is_here_ = true;
  }
  /// The memory goes, the tensors stay: the parameters, and what autograd has saved of them, find the next memory by
  /// themselves.
  void drop() {
    if (const auto wait = std::exchange(arriving_, nullptr)) wait();
    c10::StorageImpl& storage = *whole_.storage().unsafeGetStorageImpl();
    storage.set_data_ptr_noswap(at::DataPtr(nullptr, storage.device()));
    storage.set_nbytes(size_t{0});
    is_here_ = false;
  }
  void add(const at::Tensor& sum, const std::vector<bool>& reached) {
    const at::NoGradGuard no_grad;
    if (gradient_.defined()) {
      gradient_.add_(sum);
      return;
    }
    gradient_ = sum;
    for (auto& [i, weights] : held_)
      if (reached[i])
        weights.mutable_grad() =
            gradient_.narrow(0, weights.storage_offset(), weights.numel()).view_as(weights);
  }
  at::Tensor zeros(int64_t elements) const {
    return at::zeros({elements}, parameter(0).options().requires_grad(false));
  }
  const at::Tensor& parameter(size_t i) const { return parameters_.tensors()[i]; }
  at::Tensor own_part() const { return whole_.narrow(0, group_.place().rank * share_, share_); }

  ProcessGroup& group_;
  Reduction& reduction_;
  TensorRow parameters_;
  int64_t share_ = 0;          ///< elements that a process holds
  at::Tensor whole_;           ///< the row, whose memory comes and goes; parts of equal size
  at::Tensor own_, gradient_;  ///< of this process; the latter undefined without gradients
  std::vector<std::pair<size_t, at::Tensor>> held_;  ///< number of a parameter, what of it is here
  int64_t fetched_ = 0;
  bool is_here_ = true;  ///< or on its way
  ProcessGroup::Wait arriving_;
};

ShardedWeights::ShardedWeights(models::LanguageModel& model, ProcessGroup& group)
    : reduction_(std::make_unique<Reduction>()) {
  for (const auto& module : model.modules(/*include_self=*/false)) {
    const auto block = std::dynamic_pointer_cast<nn::Block>(module);
    if (!block) continue;
    const std::vector<at::Tensor> parameters = block->parameters();
    auto unit = std::make_shared<Unit>(parameters, group, *reduction_);
    for (size_t i = 0; i < parameters.size(); ++i)
      parts_[parameters[i].unsafeGetTensorImpl()] = unit->parts(i);
    block->transient = unit;
    if (!units_.empty()) {
      unit->before = units_.back().get();
      units_.back()->after = unit.get();
    }
    blocks_.push_back(block);
    units_.push_back(std::move(unit));
  }
}

ShardedWeights::~ShardedWeights() {
  for (const auto& block : blocks_) block->transient = nullptr;
}

const std::vector<HeldPart>* ShardedWeights::parts(const at::Tensor& parameter) const {
  const auto found = parts_.find(parameter.unsafeGetTensorImpl());
  return found == parts_.end() ? nullptr : &found->second;
}

void ShardedWeights::finish_gradients() {
  reduction_->finish();
  for (const auto& unit : units_) unit->forget();
}

void ShardedWeights::zero_grad() {
  for (const auto& unit : units_) unit->zero_grad();
}

ShardedWeights::Whole::Whole(ShardedWeights* weights) : weights_(weights) {
  if (weights == nullptr) return;
  for (const auto& unit : weights->units_)
    fetched_.emplace_back(unit, nn::TransientParameters::Pass::kForward);
}

void ShardedWeights::Whole::keep_changes() {
  if (weights_ == nullptr) return;
  for (const auto& unit : weights_->units_) unit->keep_changes();
}

}  // namespace xlstm::train
