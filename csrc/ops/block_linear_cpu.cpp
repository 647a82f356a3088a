#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/block_linear.h"
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
  TORCH_CHECK(weight.dim() == 3, "block_linear: weight: expected (NB,O,I), got shape ",
              weight.sizes());
  cpu::BlockLinearParams p;
  p.blocks = weight.size(0);
  p.out = weight.size(1);
  p.in = weight.size(2);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == p.blocks * p.in,
              "block_linear: x: expected a last dimension of NB*I = ", p.blocks * p.in,
              " for weight of shape ", weight.sizes(), ", got shape ", x.sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "block_linear: weight: expected x's dtype ",
              x.scalar_type(), ", got ", weight.scalar_type());
  p.dtype = dtype_code(x, "block_linear: x");
  p.rows = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) p.rows *= x.size(d);
  return p;
}

bool by_matrix_unit(const at::Tensor& x, const cpu::BlockLinearParams& p) {
  const bool small = p.in <= cpu::kSmallBlock && p.out <= cpu::kSmallBlock;
  return !small && p.rows > 0 && has_matrix_unit(x.scalar_type());
}

// (rows, blocks * width) as one matrix per block, (blocks, rows, width).
at::Tensor by_block(const at::Tensor& tensor, int64_t rows, int64_t blocks, int64_t width) {
  return tensor.reshape({rows, blocks, width}).transpose(0, 1);
}

at::Tensor block_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias) {
  cpu::BlockLinearParams p = make_params(x, weight);
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const at::Tensor weights = parameter(weight, accumulate), biases = parameter(bias, accumulate);
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.blocks * p.out,
                "block_linear: bias: expected shape (NB*O) = (", p.blocks * p.out, "), got ",
                bias->sizes());
    TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "block_linear: bias: expected x's dtype ",
                x.scalar_type(), ", got ", bias->scalar_type());
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = p.blocks * p.out;
  at::Tensor y = at::empty(sizes, x.options());
  if (by_matrix_unit(x, p)) {
    by_block(y, p.rows, p.blocks, p.out)
        .copy_(at::bmm(by_block(x, p.rows, p.blocks, p.in), weight.transpose(1, 2)));
    return bias ? y.add_(*bias) : y;
  }
  at::Tensor rows = x;
  p.x = rows_for(rows, p);
  p.weight = weights.const_data_ptr();
  p.bias = data_or_null(biases);
  p.y = y.mutable_data_ptr();
  cpu::block_linear(p);
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> matrix_unit_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, bool has_bias,
    const cpu::BlockLinearParams& p) {
  const at::Tensor dy_blocks = by_block(dy, p.rows, p.blocks, p.out);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  by_block(dx, p.rows, p.blocks, p.in).copy_(at::bmm(dy_blocks, weight));
  at::Tensor dweight =
      at::bmm(dy_blocks.transpose(1, 2), by_block(x, p.rows, p.blocks, p.in)).contiguous();
  at::Tensor dbias =
      has_bias ? dy.reshape({p.rows, p.blocks * p.out}).sum(0) : at::empty({0}, x.options());
  return {dx, dweight, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> block_linear_backward_cpu(const at::Tensor& dy,
                                                                         const at::Tensor& x,
                                                                         const at::Tensor& weight,
                                                                         bool has_bias) {
  cpu::BlockLinearParams p = make_params(x, weight);
  const at::ScalarType type = x.scalar_type();
  if (by_matrix_unit(x, p)) return matrix_unit_backward(dy.to(type), x, weight, has_bias, p);
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
