#pragma once
// What the CPU, CUDA and Meta sides of the sLSTM operators share: argument checks and result sizes.
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/ops/cpu/slstm_params.h"

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

/// y, y_last, c, n, m and, for the backward, gates (B,NH,T,S,DH) and checkpoints (B,NH,ceil(T/16),K,DH).
using SlstmResults =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// dwx, dr, db, dy0, dc0, dn0
using SlstmGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct SlstmArguments {
  const at::Tensor &wx, &r, &b;
  const OptionalTensor &y0, &c0, &n0, &m0, &reset, &cu_seqlens;
  std::string_view cell;
};

/// "slstm", "slstm_expf" or "lstm"; anything else is an error.
cpu::SlstmCell slstm_cell(std::string_view name);

/// float64 -> float64, all others -> float32.
at::ScalarType slstm_state_type(at::ScalarType type);

/// Shapes, dtypes and devices of all arguments (not the values of cu_seqlens); symbolic sizes are fine.
void check_slstm_arguments(const SlstmArguments& a);

/// Empty results of the right sizes, contiguous; undefined gates and checkpoints unless `saved`.
SlstmResults empty_slstm_results(const SlstmArguments& a, bool saved);

/// The axes of wx in the order of its memory: where the gate axis stands in (B,T,NH,DH): 0 (4,B,T,NH,DH),
/// 2 (B,T,4,NH,DH), 3 (B,T,NH,4,DH) or 4 (B,T,NH,DH,4). The gradient gets the same order.
int64_t slstm_gate_dim(const at::Tensor& wx);

/// Empty (B,T,4,NH,DH) with the gate axis at `gate_dim` of the memory. `gates` gives batch, heads, time and size.
at::Tensor empty_slstm_dwx(const at::Tensor& gates, at::ScalarType dtype, int64_t gate_dim);

}  // namespace xlstm::ops
