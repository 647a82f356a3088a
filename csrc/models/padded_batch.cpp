#include "csrc/models/padded_batch.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <map>
#include <utility>
#include <vector>

namespace xlstm::models {

namespace {

/// On the CPU. Throws c10::ValueError unless they are (B) int64, each from `least` to the length of the batch.
at::Tensor checked_lengths(const at::Tensor& lengths, int64_t batch, int64_t length,
                           int64_t least) {
  TORCH_CHECK_VALUE(
      lengths.dim() == 1 && lengths.size(0) == batch && lengths.scalar_type() == at::kLong,
      "lengths: expected (", batch, ") int64, got ", lengths.sizes(), " ", lengths.scalar_type());
  const at::Tensor known = lengths.to(at::kCPU).contiguous();
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t tokens = known.const_data_ptr<int64_t>()[row];
    TORCH_CHECK_VALUE(tokens >= least && tokens <= length, "lengths: expected ", least, " to ",
                      length, ", the length of the batch, got ", tokens, " for sequence ", row);
  }
  return known;
}

void check_reset(const std::optional<at::Tensor>& reset, int64_t batch, int64_t length) {
  const std::array<int64_t, 2> expected{batch, length};
  TORCH_CHECK_VALUE(
      !reset || (reset->sizes() == at::IntArrayRef(expected) && reset->scalar_type() == at::kBool),
      "reset: expected (", batch, ",", length, ") bool, got ", reset->sizes(), " ",
      reset->scalar_type());
}

/// Rows of several tensors as one, whose row order[i] is the i-th of theirs in a row.
at::Tensor in_order(const std::vector<at::Tensor>& parts, const std::vector<int64_t>& order) {
  const at::Tensor whole = at::cat(parts);
  return whole.index_select(0, at::tensor(order, at::kLong).argsort().to(whole.device()));
}

/// Vectors and states of parts of a batch, put together.
class Parts {
 public:
  /// y (b,t,D), t <= length, of these rows of the batch.
  void add(at::Tensor y, ModelState state, std::vector<at::Tensor> outputs,
           const std::vector<int64_t>& rows) {
    y_.push_back(std::move(y));
    states_.push_back(std::move(state));
    outputs_.push_back(std::move(outputs));
    order_.insert(order_.end(), rows.begin(), rows.end());
  }
  at::Tensor vectors(int64_t length) const { return padded(y_, length); }
  at::Tensor output(size_t k, int64_t length) const {
    std::vector<at::Tensor> of_parts;
    for (const auto& part : outputs_) of_parts.push_back(part[k]);
    return padded(of_parts, length);
  }
  ModelState state() const { return joined(states_, order_); }

 private:
  at::Tensor padded(std::vector<at::Tensor> parts, int64_t length) const {
    for (at::Tensor& part : parts)
      part = at::constant_pad_nd(part, {0, 0, 0, length - part.size(1)});
    return in_order(parts, order_);
  }

  std::vector<at::Tensor> y_;
  std::vector<ModelState> states_;
  std::vector<std::vector<at::Tensor>> outputs_;
  std::vector<int64_t> order_;  ///< the row of the batch of each of theirs
};

}  // namespace

ModelState rows_of(const ModelState& state, const at::Tensor& rows) {
  ModelState part = state;
  for (BlockState& block : part)
    for (at::Tensor& tensor : block) tensor = tensor.index_select(0, rows.to(tensor.device()));
  return part;
}

ModelState joined(const std::vector<ModelState>& parts, const std::vector<int64_t>& order) {
  ModelState whole = parts.front();
  for (size_t block = 0; block < whole.size(); ++block)
    for (size_t i = 0; i < whole[block].size(); ++i) {
      std::vector<at::Tensor> of_parts;
      for (const ModelState& part : parts) of_parts.push_back(part[block][i]);
      whole[block][i] = in_order(of_parts, order);
    }
  return whole;
}

PaddedBatch::PaddedBatch(const at::Tensor& lengths, int64_t batch, int64_t length,
                         at::Device device) {
  const at::Tensor known = checked_lengths(lengths, batch, length, 1);
  full_ = known.eq(length).all().item<bool>();
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
  check_reset(reset, padding_.size(0), positions_.size(0));
  if (full_) return reset;
  const at::Tensor first = positions_.eq(padding_);
  return reset ? first.logical_or(ends_aligned(*reset)) : first;
}

std::pair<at::Tensor, ModelState> read_padded(const Pass& pass, const at::Tensor& inputs,
                                              const ModelState& state,
                                              const std::optional<at::Tensor>& reset,
                                              const at::Tensor& lengths, bool state_grows,
                                              BlockOutputs* outputs) {
  const int64_t batch = inputs.size(0), length = inputs.size(1);
  if (state.empty()) {
    const PaddedBatch padded(lengths, batch, length, inputs.device());
    auto [y, next] = pass(padded.ends_aligned(inputs), {}, padded.reset(reset), outputs);
    if (outputs)
      for (at::Tensor& vectors : outputs->vectors) vectors = padded.starts_aligned(vectors);
    return {padded.starts_aligned(y), std::move(next)};
  }
  check_sequences(state, batch);
  check_reset(reset, batch, length);
  const at::Tensor known = checked_lengths(lengths, batch, length, 0);
  std::map<int64_t, std::vector<int64_t>> rows_with;
  for (int64_t row = 0; row < batch; ++row)
    rows_with[known.const_data_ptr<int64_t>()[row]].push_back(row);
  if (rows_with.empty() || rows_with.begin()->first == length)
    return pass(inputs, state, reset, outputs);
  TORCH_CHECK_VALUE(!state_grows,
                    "lengths: expected one length for all sequences, since they go on from a "
                    "state and it grows with every token; read those of each length by themselves");
  Parts parts;
  for (const auto& [tokens, rows] : rows_with) {
    const at::Tensor index = at::tensor(rows, at::kLong).to(inputs.device());
    const auto own = [&, count = tokens](const at::Tensor& x) {
      return x.narrow(1, 0, count).index_select(0, index);
    };
    std::optional<at::Tensor> own_reset;
    if (reset) own_reset = own(*reset);
    auto [y, next] = pass(own(inputs), rows_of(state, index), own_reset, outputs);
    parts.add(std::move(y), std::move(next), outputs ? outputs->vectors : std::vector<at::Tensor>{},
              rows);
  }
  if (outputs)
    for (size_t k = 0; k < outputs->vectors.size(); ++k)
      outputs->vectors[k] = parts.output(k, length);
  return {parts.vectors(length), parts.state()};
}

}  // namespace xlstm::models
