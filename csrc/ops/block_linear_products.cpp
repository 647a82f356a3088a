#include "csrc/ops/block_linear_products.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <vector>

#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

constexpr std::string_view kOp = "block_linear";

/// (...,NB*W) as one matrix per block, (NB,rows,W).
at::Tensor by_block(const at::Tensor& tensor, int64_t blocks, int64_t width) {
  return tensor.reshape({-1, blocks, width}).transpose(0, 1);
}

std::vector<int64_t> sizes_with(const at::Tensor& x, int64_t channels) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = channels;
  return sizes;
}

}  // namespace

void check_block_linear_devices(const at::Tensor& x, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  check_devices(kOp, x.device(), {{"weight", weight}, {"bias", bias}});
}

void check_block_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
  check_block_linear_devices(x, weight, bias);
  TORCH_CHECK(weight.dim() == 3, kOp, ": weight: expected (NB,O,I), got shape ", weight.sizes());
  const int64_t in = weight.size(0) * weight.size(2), out = weight.size(0) * weight.size(1);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == in, kOp,
              ": x: expected a last dimension of NB*I = ", in, " for weight of shape ",
              weight.sizes(), ", got shape ", x.sizes());
  check_dtype(kOp, "weight", weight, x.scalar_type());
  if (!bias) return;
  check_shape(kOp, "bias", *bias, {out}, "(NB*O)");
  check_dtype(kOp, "bias", *bias, x.scalar_type());
}

void check_block_linear_gradient(const at::Tensor& dy, const at::Tensor& x,
                                 const at::Tensor& weight) {
  check_block_linear(x, weight, {});
  check_device(kOp, "dy", dy, x.device());
  const std::vector<int64_t> expected = sizes_with(x, weight.size(0) * weight.size(1));
  check_shape(kOp, "dy", dy, c10::fromIntArrayRefSlow(expected), "(...,NB*O)");
}

at::Tensor block_linear_products(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias) {
  const int64_t blocks = weight.size(0), out = weight.size(1), in = weight.size(2);
  at::Tensor y = at::empty(sizes_with(x, blocks * out), x.options());
  if (y.numel() == 0) return y;
  if (in == 0) {
    y.zero_();
  } else {
    by_block(y, blocks, out).copy_(at::bmm(by_block(x, blocks, in), weight.transpose(1, 2)));
  }
  return bias ? y.add_(*bias) : y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> block_linear_products_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, bool has_bias) {
  const int64_t blocks = weight.size(0), out = weight.size(1), in = weight.size(2);
  at::Tensor dx = at::empty(x.sizes(), x.options()),
             dweight = at::empty(weight.sizes(), x.options());
  at::Tensor dbias = at::empty({has_bias ? blocks * out : 0}, x.options());
  if (dy.numel() == 0 || x.numel() == 0) {
    dx.zero_(), dweight.zero_();
  } else {
    const at::Tensor upstream = by_block(dy, blocks, out);
    by_block(dx, blocks, in).copy_(at::bmm(upstream, weight));
    dweight = at::bmm(upstream.transpose(1, 2), by_block(x, blocks, in)).contiguous();
  }
  if (has_bias) dbias = dy.reshape({-1, blocks * out}).sum(0);
  return {dx, dweight, dbias};
}

}  // namespace xlstm::ops
