#pragma once
// Hyena (arXiv 2302.10866) of order 2, as compared with in arXiv 2405.04517.
#include "csrc/nn/mixer_block.h"

namespace xlstm::nn {

/// The implicit filter: a small network of the distance t alone, damped by a decay of its own for each channel,
///   k_t = W_3 sin(freq W_2' sin(freq W_1' sin(freq W_0' z_t))) e^{-delta t / L},  W' x = W x + b, all of width 64,
///   z_t = (t/L, cos(2 pi f t / L), -sin(2 pi f t / L)) for 16 frequencies f from 1e-4 to 15.
/// L scales time and is no limit. The features are computed, where the authors store a row of them for each position.
class HyenaFilter : public torch::nn::Module {
 public:
  HyenaFilter(int64_t dim, int64_t length, at::Device device);
  /// k of the distances first .. first+count-1: (count,D) float32 or float64.
  at::Tensor forward(int64_t first, int64_t count) const;

 private:
  const int64_t dim_, length_;
  std::vector<std::shared_ptr<Linear>> layers_;
  at::Tensor frequency_;  ///< (64), of all three sines
};

/// x1, x2, v = conv3(W_in x);  z = x2 v;  y = W_out (x1 (k * z + skip z)), * the causal convolution over all of the past.
/// A sequence by FFT. The state keeps what the convolution reads, as attention does: the last tokens of conv3 (B,2,3D), z of
/// all tokens (B,S,D), and k of as many distances (B,S,D), the same memory for each sequence, so that decoding a token costs
/// S D multiplications and one row of the filter. That k is only read without gradients; whatever is given more than one
/// token computes it again.
class Hyena : public Mixer {
 public:
  Hyena(const MixerOptions& options, int64_t filter_length, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;

 private:
  const MixerOptions options_;
  std::shared_ptr<Linear> in_, out_;
  at::Tensor conv_weight_, conv_bias_, skip_;  ///< (3D,3), (3D), (D)
  std::shared_ptr<HyenaFilter> filter_;
};

}  // namespace xlstm::nn
