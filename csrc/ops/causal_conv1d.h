#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// Depthwise causal convolution: y_t = act(bias + sum_j weight[:, j] x_{t-W+1+j}), act = SiLU where silu, else identity.
/// x (B,T,C) weight (C,W) 2 <= W <= 8, bias (C), state0 (B,W-1,C): the inputs before the first token, oldest first (zero
/// where absent). reset (B,T) bool: the window is empty before that token. cu_seqlens (N+1) integers: B must be 1, states
/// are (N,W-1,C). Returns y (B,T,C) and the state: the last W-1 inputs (zeros before a reset), in x's dtype. cu_seqlens that
/// do not rise from 0 to T are an error on the CPU. On CUDA nothing looks at them, which would wait for the device: there
/// the first counts as 0, the last as T, others beyond as the nearer of both, one that falls as the one before.
std::tuple<at::Tensor, at::Tensor> causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias = {},
                                                 const std::optional<at::Tensor>& state0 = {},
                                                 const std::optional<at::Tensor>& reset = {},
                                                 const std::optional<at::Tensor>& cu_seqlens = {},
                                                 bool silu = false);

/// One token: x (B,C); shifts state (B,W-1,C) in place; returns y (B,C). weight, bias, silu as above. No gradient.
at::Tensor causal_conv1d_step(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, at::Tensor& state,
                              bool silu = false);

}  // namespace xlstm::ops
