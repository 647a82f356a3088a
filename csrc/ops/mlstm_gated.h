#pragma once
#include "csrc/ops/mlstm.h"

namespace xlstm::ops {

/// mlstm_chunkwise whose gates are linear in q, k and v, whose heads lie side by side there:
///   [igate, fgate] = [q, k, v] weight^T + bias
/// weight (2*NH, NH*(2*DQK+DV)), bias (2*NH), both with the input gate first. Weights are rounded to q's dtype; sums and
/// pre-activations are float32 (float64 for float64). The rest as of mlstm_chunkwise, autocast too. In memory [q, k, v] is
/// never one, and the gates' share of dq, dk and dv is added where those lie.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlstm_gated(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& weight,
    const at::Tensor& bias, const std::optional<at::Tensor>& c0 = {},
    const std::optional<at::Tensor>& n0 = {}, const std::optional<at::Tensor>& m0 = {},
    const MlstmOptions& options = {});

}  // namespace xlstm::ops
