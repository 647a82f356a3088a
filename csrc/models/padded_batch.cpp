#include "csrc/models/padded_batch.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <array>

namespace xlstm::models {

PaddedBatch::PaddedBatch(const at::Tensor& lengths, int64_t batch, int64_t length, bool has_state,
                         at::Device device) {
  TORCH_CHECK_VALUE(!has_state,
                    "lengths: expected no state: sequences with padding behind them "
                    "begin from the empty one");
  TORCH_CHECK_VALUE(
      lengths.dim() == 1 && lengths.size(0) == batch && lengths.scalar_type() == at::kLong,
      "lengths: expected (", batch, ") int64, got ", lengths.sizes(), " ", lengths.scalar_type());
  const at::Tensor known = lengths.to(at::kCPU).contiguous();
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t tokens = known.const_data_ptr<int64_t>()[row];
    TORCH_CHECK_VALUE(tokens >= 1 && tokens <= length, "lengths: expected 1 to ", length,
                      ", the length of the batch, got ", tokens, " for sequence ", row);
    full_ = full_ && tokens == length;
  }
  positions_ = at::arange(length, at::TensorOptions().dtype(at::kLong).device(device));
  padding_ = known.neg().add(length).to(device).unsqueeze(1);
}

/// y[b,t] = x[b, from[b,t]], zero where that is no position.
at::Tensor PaddedBatch::shifted(const at::Tensor& x, const at::Tensor& from) const {
  if (full_) return x;
  at::Tensor index = from.clamp(0, from.size(1) - 1), outside = from.ne(index);
  for (int64_t dim = 2; dim < x.dim(); ++dim) {
    index = index.unsqueeze(-1);
    outside = outside.unsqueeze(-1);
  }
  return x.gather(1, index.expand(x.sizes())).masked_fill(outside, 0);
}

at::Tensor PaddedBatch::ends_aligned(const at::Tensor& x) const {
  return shifted(x, positions_.sub(padding_));
}

at::Tensor PaddedBatch::starts_aligned(const at::Tensor& y) const {
  return shifted(y, positions_.add(padding_));
}

std::optional<at::Tensor> PaddedBatch::reset(const std::optional<at::Tensor>& reset) const {
  const std::array<int64_t, 2> expected{padding_.size(0), positions_.size(0)};
  TORCH_CHECK_VALUE(
      !reset || (reset->sizes() == at::IntArrayRef(expected) && reset->scalar_type() == at::kBool),
      "reset: expected (", expected[0], ",", expected[1], ") bool, got ", reset->sizes(), " ",
      reset->scalar_type());
  if (full_) return reset;
  const at::Tensor first = positions_.eq(padding_);
  return reset ? first.logical_or(ends_aligned(*reset)) : first;
}

}  // namespace xlstm::models
