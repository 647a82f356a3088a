#pragma once
// H3 (arXiv 2212.14052), as compared with in arXiv 2405.04517.
#include "csrc/nn/mixer_block.h"
#include "csrc/nn/ssm.h"

namespace xlstm::nn {

/// Two state space models between the products of q, k and v, by heads of width DH:
///   s = diagonal_ssm(shift_ssm(k) v^T),  y = W_o (s^T q).
/// D * DH sequences go through the diagonal SSM: the authors' language models have heads of width 1 to 8.
/// State: that of the shift SSM (B,N-1,D) and of the diagonal one (B,NH,DH*DH,N).
class H3 : public Mixer {
 public:
  H3(const MixerOptions& options, int64_t state_size, at::Device device);
  Result forward(const at::Tensor& x, const State& state,
                 const std::optional<at::Tensor>& reset) override;

 private:
  const MixerOptions options_;
  const int64_t state_size_;
  std::shared_ptr<Linear> q_, k_, v_, out_;
  std::shared_ptr<ShiftSsm> shift_;
  std::shared_ptr<DiagonalSsm> diagonal_;
};

}  // namespace xlstm::nn
