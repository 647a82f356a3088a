#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "csrc/models/block_stack.h"

namespace xlstm::models {

/// A batch of B sequences of unequal lengths, each of which begins at position 0 and has padding behind it up to T. A
/// recurrent model reads them so that all end at T and begin from the empty state: then the state behind position T is
/// each sequence's own. What the padding holds is not read, and gets no gradient.
class PaddedBatch {
 public:
  /// lengths (B) int64, from 1 to T; where they are not on the CPU, their device is waited for. Throws c10::ValueError.
  PaddedBatch(const at::Tensor& lengths, int64_t batch, int64_t length, at::Device device);

  /// x (B,T,...) -> the same sequences, ending at T, behind zeros.
  at::Tensor ends_aligned(const at::Tensor& x) const;
  /// What ends_aligned did, undone: y (B,T,...) with zeros in place of the padding.
  at::Tensor starts_aligned(const at::Tensor& y) const;
  /// (B,T) bool, true at the first token of each sequence once their ends are aligned, and where `reset` (B,T) bool is;
  /// `reset` itself where there is no padding. Throws c10::ValueError for another one.
  std::optional<at::Tensor> reset(const std::optional<at::Tensor>& reset) const;

 private:
  at::Tensor shifted(const at::Tensor& x, const at::Tensor& from) const;

  at::Tensor positions_, padding_;  ///< (T) 0 to T - 1; (B,1) how much padding there is
  bool full_ = true;                ///< there is none
};

/// The state of some sequences of a batch: rows (N) int64, on any device.
ModelState rows_of(const ModelState& state, const at::Tensor& rows);

/// What rows_of took apart: the states of several parts as one, whose sequence order[i] is the i-th of the parts in a row.
ModelState joined(const std::vector<ModelState>& parts, const std::vector<int64_t>& order);

/// Vectors (B,T,D) of inputs (B,T,...), and the state behind them.
using Pass = std::function<std::pair<at::Tensor, ModelState>(
    const at::Tensor& inputs, const ModelState& state, const std::optional<at::Tensor>& reset,
    BlockOutputs* outputs)>;

/// What `pass` gives of sequences of these lengths, from the state, which may be empty: vectors, those of `outputs` among them,
/// are 0 in the padding, and the state is the one behind each sequence's own end. From the empty state one pass as a
/// PaddedBatch; from another one a pass for each length that there is, where a length may be 0: the sequence's state stays. In a
/// model whose state grows these would be of different sizes: c10::ValueError.
std::pair<at::Tensor, ModelState> read_padded(const Pass& pass, const at::Tensor& inputs,
                                              const ModelState& state,
                                              const std::optional<at::Tensor>& reset,
                                              const at::Tensor& lengths, bool state_grows,
                                              BlockOutputs* outputs);

}  // namespace xlstm::models
