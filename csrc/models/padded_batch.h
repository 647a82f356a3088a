#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace xlstm::models {

/// A batch of B sequences of unequal lengths, each of which begins at position 0 and has padding behind it up to T. A
/// recurrent model reads them so that all end at T and begin from the empty state: then the state behind position T is
/// each sequence's own. What the padding holds is not read, and gets no gradient.
class PaddedBatch {
 public:
  /// lengths (B) int64, from 1 to T; where they are not on the CPU, their device is waited for. Throws c10::ValueError, also
  /// where the caller has a state.
  PaddedBatch(const at::Tensor& lengths, int64_t batch, int64_t length, bool has_state,
              at::Device device);

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

}  // namespace xlstm::models
