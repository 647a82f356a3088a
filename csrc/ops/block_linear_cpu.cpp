#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/block_linear.h"
#include "csrc/ops/block_linear_products.h"
#include "csrc/ops/cpu/block_linear_params.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Large blocks are GEMMs with one leading dimension; small ones take any two strides of rows.
cpu::Rows rows_for(at::Tensor& tensor, const cpu::BlockLinearParams& p) {
  const bool small = p.in <= cpu::kSmallBlock && p.out <= cpu::kSmallBlock;
  cpu::Rows rows = rows_of(tensor);
  const bool one_stride = rows.inner_rows >= p.rows && rows.inner_stride >= tensor.size(-1);
  if (!small && p.rows > 1 && !one_stride) {
    tensor = tensor.contiguous();
    rows = rows_of(tensor);
    if (rows.inner_stride < tensor.size(-1)) {  // strides of an expanded tensor count as contiguous
      tensor = tensor.clone(at::MemoryFormat::Contiguous);
      rows = rows_of(tensor);
    }
  }
  return rows;
}

cpu::BlockLinearParams make_params(const at::Tensor& x, const at::Tensor& weight) {
  cpu::BlockLinearParams p;
  p.blocks = weight.size(0);
  p.out = weight.size(1);
  p.in = weight.size(2);
  p.dtype = dtype_code(x, "block_linear: x");
  p.rows = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) p.rows *= x.size(d);
  return p;
}

bool by_matrix_unit(const at::Tensor& x, const cpu::BlockLinearParams& p) {
  const bool small = p.in <= cpu::kSmallBlock && p.out <= cpu::kSmallBlock;
  return !small && p.rows > 0 && has_matrix_unit(x.scalar_type());
}

at::Tensor block_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias) {
  check_block_linear(x, weight, bias);
  cpu::BlockLinearParams p = make_params(x, weight);
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const at::Tensor weights = parameter(weight, accumulate), biases = parameter(bias, accumulate);
  if (by_matrix_unit(x, p)) return block_linear_products(x, weight, bias);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = p.blocks * p.out;
  at::Tensor y = at::empty(sizes, x.options());
  at::Tensor rows = x;
  p.x = rows_for(rows, p);
  p.weight = weights.const_data_ptr();
  p.bias = data_or_null(biases);
  p.y = y.mutable_data_ptr();
  cpu::block_linear(p);
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> block_linear_backward_cpu(const at::Tensor& dy,
                                                                         const at::Tensor& x,
                                                                         const at::Tensor& weight,
                                                                         bool has_bias) {
  check_block_linear_gradient(dy, x, weight);
  cpu::BlockLinearParams p = make_params(x, weight);
  const at::ScalarType type = x.scalar_type();
  if (by_matrix_unit(x, p)) return block_linear_products_backward(dy.to(type), x, weight, has_bias);
  const at::Tensor weights = parameter(weight, accumulate_type(type));
  at::Tensor x_rows = x, dy_rows = dy.to(type);
  p.x = rows_for(x_rows, p);
  p.dy = rows_for(dy_rows, p);
  p.weight = weights.const_data_ptr();
  at::Tensor dx = at::empty(x.sizes(), x.options());
  const auto accumulate = x.options().dtype(accumulate_type(type));
  at::Tensor dweight = at::empty(weight.sizes(), accumulate);
  at::Tensor dbias = at::empty({has_bias ? p.blocks * p.out : 0}, accumulate);
  const RowBlocks blocks = row_blocks(p.rows, 32);
  p.block_count = blocks.count;
  p.block_rows = blocks.rows;
  p.partial_size = cpu::block_linear_partial_size(p.blocks, p.in, p.out);
  const at::Tensor partials = at::empty({blocks.count, p.partial_size}, accumulate);
  p.partials = partials.mutable_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = has_bias ? dbias.mutable_data_ptr() : nullptr;
  cpu::block_linear_backward(p);
  return {dx, dweight.to(type), dbias.to(type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("block_linear", block_linear_cpu);
  m.impl("block_linear_backward", block_linear_backward_cpu);
}

}  // namespace xlstm::ops
