#pragma once
// State space models over whole sequences: what H3 (arXiv 2212.14052) is made of.
#include "csrc/nn/layers.h"

namespace xlstm::nn {

/// The shift SSM with B = e_1, a convolution over N tokens: y_t = sum_{j<N} taps_j x_{t-j} + skip x_t. taps (D,N).
/// A sequence by FFT, one token directly. State: the last N-1 inputs (B,N-1,D).
class ShiftSsm : public torch::nn::Module {
 public:
  ShiftSsm(int64_t dim, int64_t state_size, at::Device device);
  /// x (B,T,D) float32 or float64, T > 0; window undefined for the empty state.
  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& window,
                                            const std::optional<at::Tensor>& reset) const;

 private:
  const int64_t state_size_;
  at::Tensor taps_, skip_;
};

/// S4D (arXiv 2206.11893) with the bilinear transform; one SSM of N/2 complex states for each of NH heads, applied to M
/// sequences per head:  h_t = A h_{t-1} + B u_t,  y_t = 2 Re(C . h_t) + skip u_t,
/// A = (1 + dt a / 2) / (1 - dt a / 2), B = dt b / (1 - dt a / 2), a = -e^{log_decay} + i frequency, dt = e^{log_step}.
/// A sequence by FFT, one token by the recurrence. State: h (B,NH,M,N), real and imaginary parts in turn.
class DiagonalSsm : public torch::nn::Module {
 public:
  DiagonalSsm(int64_t num_heads, int64_t state_size, at::Device device);
  /// u (B,NH,M,T) float32 or float64, T > 0; h undefined for the empty state.
  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& u, const at::Tensor& h,
                                            const std::optional<at::Tensor>& reset) const;

 private:
  struct Discrete;  ///< A, B and C of a call
  void init();

  const int64_t state_size_;
  at::Tensor log_step_, skip_;        ///< (NH)
  at::Tensor log_decay_, frequency_;  ///< (NH,N/2)
  at::Tensor input_, output_;         ///< b, C (NH,N/2,2): real and imaginary parts
};

}  // namespace xlstm::nn
