#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>

namespace xlstm::ops {

/// The linear recurrence over a block of tokens in about 3 sqrt(T) elementwise calls of ATen: what operators run on where
/// they have no kernel. From zero h_t = keep_t h_{t-1} + x_t or, reverse, h_t = keep_{t+1} h_{t+1} + x_t. x (B,T,...) may be
/// overwritten, the trailing sizes of keep (B,T,...) may be 1. reset (B,T) bool, may be undefined: nothing passes between a
/// token and the one before it, NaN included.
at::Tensor scan_block(const at::Tensor& x, const at::Tensor& keep, const at::Tensor& reset,
                      bool reverse);

/// to += keep * from; where `cut` is defined and true, nothing is added.
void add_passed(const at::Tensor& to, const at::Tensor& keep, const at::Tensor& from,
                const at::Tensor& cut);

/// reset[:, t] of (B,T), to be broadcast over `rank` - 1 trailing dimensions; undefined where reset is.
at::Tensor reset_of_token(const at::Tensor& reset, int64_t t, int64_t rank);

/// f(first token, tokens) for the blocks of a sequence, the last of which may be shorter.
template <class F>
void each_block(int64_t time, int64_t block, const F& f) {
  for (int64_t first = 0; first < time; first += block) f(first, std::min(block, time - first));
}
template <class F>
void each_block_backwards(int64_t time, int64_t block, const F& f) {
  for (int64_t first = (time - 1) / block * block; time > 0 && first >= 0; first -= block)
    f(first, std::min(block, time - first));
}

}  // namespace xlstm::ops
