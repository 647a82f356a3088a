#pragma once
// The matrix products of the sLSTM around its recurrence, in ATen calls: for the generic path and the CUDA kernels.
// Operands are rounded to the dtype of wx, sums and results are float32 (float64 for float64). Nothing is read back from
// the device.
#include <utility>

#include "csrc/ops/slstm_arguments.h"

namespace xlstm::ops {

/// y_{t-1} of every token, (B,T,NH,DH) in y's dtype: y0 or zero at the start of a sequence, zero after a reset. In memory
/// the heads come first, as the products want them.
at::Tensor slstm_previous_y(const at::Tensor& y, const OptionalTensor& y0,
                            const OptionalTensor& reset, const OptionalTensor& cu_seqlens);

/// r (4,NH,DH_out,DH_in) as (NH, 4*DH_out, DH_in), in `dtype`, contiguous.
at::Tensor slstm_recurrent_rows(const at::Tensor& r, at::ScalarType dtype);

/// wx + r y_{t-1} + b of all tokens at once, (B,T,4,NH,DH). Needs wx and b.
at::Tensor slstm_preactivations(const SlstmBackwardArguments& a, const at::Tensor& previous_y);

/// dr = sum over tokens of dwx_t y_{t-1}^T, and db = sum of dwx_t; in a fixed order.
std::pair<at::Tensor, at::Tensor> slstm_parameter_gradients(const at::Tensor& dwx,
                                                            const at::Tensor& previous_y);

}  // namespace xlstm::ops
