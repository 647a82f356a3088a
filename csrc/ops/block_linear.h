#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace xlstm::ops {

/// Block-diagonal linear map ("head-wise linear"): x (...,NB*I) weight (NB,O,I) bias (NB*O) -> (...,NB*O),
/// y[..., b*O+o] = sum_i weight[b,o,i] x[..., b*I+i]. Small blocks (the paper's 4x4) run vectorised, large ones as GEMMs.
at::Tensor block_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias = {});

}  // namespace xlstm::ops
