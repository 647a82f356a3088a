#pragma once
// Causal convolutions over whole sequences (H3, Hyena), by FFT in O(T log T).
#include <ATen/core/Tensor.h>

#include <optional>

namespace xlstm::nn {

/// y_t = sum of kernel_{t-s} u_s over the tokens s <= t of t's document. u (B,...,T) float32 or float64, kernel (...,K) of
/// the same type, K >= 1, broadcast over u; reset (B,T) bool: a document starts there. Returns (B,...,T).
/// With `reset` each document is transformed by itself, in batches of similar lengths (at most twice the tokens), so that
/// no rounding crosses a border; this reads `reset` on the host and so cannot be recorded in a CUDA graph.
at::Tensor long_convolution(const at::Tensor& u, const at::Tensor& kernel,
                            const std::optional<at::Tensor>& reset);

/// Index of the last token at which a document starts (B) int64, 0 where none does; length T > 0.
at::Tensor last_start(const at::Tensor& reset);

/// x (B,T,...) with the tokens before first (B) zeroed.
at::Tensor without_past(const at::Tensor& x, const at::Tensor& first);

}  // namespace xlstm::nn
