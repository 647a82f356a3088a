#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace xlstm::train {

/// Places of tensors of one type in a row of memory, which travels at once.
class TensorRow {
 public:
  /// The places begin at multiples of this many elements, where kernels find them aligned as memory of their own is.
  static constexpr int64_t kAlignment = 64;
  static int64_t aligned(int64_t elements) {
    return (elements + kAlignment - 1) / kAlignment * kAlignment;
  }

  explicit TensorRow(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const at::Tensor& tensor : tensors_) {
      begins_.push_back(elements_);
      elements_ += aligned(tensor.numel());
    }
  }

  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  /// Of the whole row, with what lies between the tensors.
  int64_t elements() const { return elements_; }
  int64_t begin(size_t i) const { return begins_[i]; }
  /// What is in the place of tensor i, in its shape.
  at::Tensor place(size_t i, const at::Tensor& row) const {
    return row.narrow(0, begins_[i], tensors_[i].numel()).view(tensors_[i].sizes());
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<int64_t> begins_;
  int64_t elements_ = 0;
};

}  // namespace xlstm::train
