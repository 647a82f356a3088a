#include "csrc/ops/converted_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <vector>

namespace xlstm::ops {
namespace {

using at::Tensor;

/// How many of the `out` rows are converted at once for a product with x.
int64_t rows_at_once(const Tensor& x, int64_t out, int64_t in) {
  constexpr int64_t kBlock = 1 << 20;  // elements
  if (!x.is_cpu()) return out;
  return std::max<int64_t>(64, kBlock / std::max<int64_t>(1, in));
}

/// x's sizes with another last one.
std::vector<int64_t> sizes_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

}  // namespace

Tensor converted_linear(const Tensor& x, int64_t out, const std::optional<Tensor>& bias,
                        const ConvertedRows& rows) {
  const int64_t block = rows_at_once(x, out, x.size(-1));
  if (out <= block) return at::linear(x, rows(0, out), bias);
  Tensor y = at::empty(sizes_with_last(x, out), x.options());
  for (int64_t o = 0; o < out; o += block) {
    const int64_t count = std::min(block, out - o);
    const auto added = bias ? std::optional<Tensor>(bias->narrow(0, o, count)) : std::nullopt;
    y.narrow(-1, o, count).copy_(at::linear(x, rows(o, count), added));
  }
  return y;
}

Tensor converted_linear_backward(const Tensor& dy, int64_t in, const ConvertedRows& rows) {
  const int64_t out = dy.size(-1), block = rows_at_once(dy, out, in);
  // Half precision would round the sum behind each block.
  if (out <= block || at::isReducedFloatingType(dy.scalar_type()))
    return at::matmul(dy, rows(0, out));
  const Tensor flat = dy.reshape({-1, out});
  Tensor dx = at::empty({flat.size(0), in}, dy.options());
  for (int64_t o = 0; o < out; o += block) {
    const int64_t count = std::min(block, out - o);
    dx.addmm_(flat.narrow(1, o, count), rows(o, count), /*beta=*/o == 0 ? 0 : 1);
  }
  return dx.view(sizes_with_last(dy, in));
}

}  // namespace xlstm::ops
