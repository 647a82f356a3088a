#pragma once
// Products with a matrix that is kept in another dtype than it is multiplied in, and needs no gradient. A CPU converts blocks
// of its rows, one after the other: memory of a whole large one would be the system's anew each time, which costs more than
// the conversion, and a block is still in the cache when it is multiplied.
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>

namespace xlstm::ops {

/// Rows [first, first + count) of a matrix (O,I), converted: (count,I).
using ConvertedRows = std::function<at::Tensor(int64_t first, int64_t count)>;

/// x (...,I) times the transpose of the matrix, + bias (O) -> (...,out); rows and bias in x's dtype.
at::Tensor converted_linear(const at::Tensor& x, int64_t out, const std::optional<at::Tensor>& bias,
                            const ConvertedRows& rows);
/// Its gradient with respect to x: dy (...,O) times the matrix -> (...,in); rows in dy's dtype.
at::Tensor converted_linear_backward(const at::Tensor& dy, int64_t in, const ConvertedRows& rows);

}  // namespace xlstm::ops
