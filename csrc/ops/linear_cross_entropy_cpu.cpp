#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/ops/common.h"
#include "csrc/ops/cpu/gemm.h"
#include "csrc/ops/cpu/linear_cross_entropy_params.h"
#include "csrc/ops/linear_cross_entropy.h"
#include "csrc/ops/linear_cross_entropy_blocks.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The rows that count, as matrices in the dtype of accumulation. Ignored rows are left out:
// whatever they hold reaches neither the loss nor a gradient.
class Rows {
 public:
  Rows(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
       int64_t ignore_index)
      : total_(target.numel()), width_(x.size(-1)), vocab_(weight.size(0)) {
    dtype_code(x, "linear_cross_entropy: x");
    const at::ScalarType accumulate = accumulate_type(x.scalar_type());
    collect(target.contiguous(), ignore_index);
    x_ = x.reshape({total_, width_});
    if (!all_counted()) x_ = x_.index_select(0, positions_);
    matrix_unit_ = has_matrix_unit(x.scalar_type());
    accumulate_ = x.options().dtype(accumulate);
    x_ = matrix(matrix_unit_ ? x_ : x_.to(accumulate));
    weight_ = matrix(matrix_unit_ ? weight : weight.to(accumulate));
  }

  int64_t count() const { return targets_.numel(); }
  int64_t width() const { return width_; }
  int64_t vocab() const { return vocab_; }
  bool all_counted() const { return count() == total_; }
  at::TensorOptions accumulate() const { return accumulate_; }
  /// Whether x and weight stay in their dtype, for at::mm; else they are in that of accumulation.
  bool matrix_unit() const { return matrix_unit_; }
  const at::Tensor& x() const { return x_; }
  const at::Tensor& weight() const { return weight_; }
  const int64_t* targets() const { return targets_.const_data_ptr<int64_t>(); }

  at::Tensor select(const at::Tensor& per_row) const {
    const at::Tensor flat = per_row.reshape({total_});
    return all_counted() ? flat.contiguous() : flat.index_select(0, positions_);
  }
  /// Puts counted rows back to their places, zero in the others.
  at::Tensor spread(const at::Tensor& counted) const {
    if (all_counted()) return counted;
    std::vector<int64_t> sizes = counted.sizes().vec();
    sizes[0] = total_;
    return at::zeros(sizes, counted.options()).index_copy_(0, positions_, counted);
  }

 private:
  void collect(const at::Tensor& target, int64_t ignore_index) {
    const int64_t* values = target.const_data_ptr<int64_t>();
    std::vector<int64_t> positions;
    int64_t ignored = 0;
    for (int64_t i = 0; i < total_; ++i) {
      if (values[i] == ignore_index) {
        ++ignored;
        continue;
      }
      TORCH_CHECK(values[i] >= 0 && values[i] < vocab_,
                  "linear_cross_entropy: target: expected 0 to ", vocab_ - 1, " or ignore_index ",
                  ignore_index, ", got ", values[i], " at position ", i);
    }
    targets_ = target.reshape({total_});
    if (ignored == 0) return;
    positions_ = at::empty({total_ - ignored}, target.options());
    int64_t* position = positions_.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < total_; ++i)
      if (values[i] != ignore_index) *position++ = i;
    targets_ = targets_.index_select(0, positions_);
  }

  // A GEMM takes any leading dimension, but unit stride along the columns.
  static at::Tensor matrix(const at::Tensor& tensor) {
    const bool fits =
        (tensor.size(1) <= 1 || tensor.stride(1) == 1) &&
        (tensor.size(0) <= 1 || tensor.stride(0) >= std::max<int64_t>(1, tensor.size(1)));
    return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
  }

  int64_t total_, width_, vocab_;
  bool matrix_unit_ = false;
  at::TensorOptions accumulate_;
  at::Tensor x_, weight_, targets_, positions_;
};

// What one sweep over the blocks of rows computes; undefined tensors are not wanted.
struct Results {
  at::Tensor loss;     // (rows), Acc
  at::Tensor dx;       // (rows, D), Acc
  at::Tensor dweight;  // (V, D), Acc
};

// Rows per block: logits of at most 32 MB unless that left too little work per product.
int64_t block_rows(int64_t rows, int64_t vocab) {
  const int64_t most =
      std::clamp<int64_t>((int64_t(1) << 23) / std::max<int64_t>(1, vocab), 64, 1024);
  const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::max<int64_t>(1, (rows + blocks - 1) / blocks);
}

int64_t leading(const at::Tensor& matrix) {
  return matrix.size(0) > 1 ? matrix.stride(0) : std::max<int64_t>(1, matrix.size(1));
}

// The three products of one block of rows, in float32 or float64 by BLAS.
template <class A>
class BlasProducts {
 public:
  explicit BlasProducts(const Rows& rows)
      : width_(rows.width()),
        vocab_(rows.vocab()),
        x_(rows.x().const_data_ptr<A>()),
        weight_(rows.weight().const_data_ptr<A>()),
        x_stride_(leading(rows.x())),
        weight_stride_(leading(rows.weight())) {}

  void logits(int64_t first, const at::Tensor& block) const {
    cpu::gemm<A>(Op::kNone, Op::kTranspose, block.size(0), vocab_, width_, A(1), x(first),
                 x_stride_, weight_, weight_stride_, A(0), block.mutable_data_ptr<A>(), vocab_);
  }
  void input_grad(int64_t first, const at::Tensor& block, const at::Tensor& dx) const {
    cpu::gemm<A>(Op::kNone, Op::kNone, block.size(0), width_, vocab_, A(1),
                 block.const_data_ptr<A>(), vocab_, weight_, weight_stride_, A(0),
                 dx.mutable_data_ptr<A>() + first * width_, width_);
  }
  void weight_grad(int64_t first, const at::Tensor& block, const at::Tensor& dweight) const {
    cpu::gemm<A>(Op::kTranspose, Op::kNone, vocab_, width_, block.size(0), A(1),
                 block.const_data_ptr<A>(), vocab_, x(first), x_stride_, first == 0 ? A(0) : A(1),
                 dweight.mutable_data_ptr<A>(), width_);
  }

 private:
  using Op = cpu::Op;
  const A* x(int64_t first) const { return x_ + first * x_stride_; }

  int64_t width_, vocab_;
  const A *x_, *weight_;
  int64_t x_stride_, weight_stride_;
};

// The same by the matrix unit: factors in bfloat16, sums over blocks in float32.
class MatrixUnitProducts {
 public:
  explicit MatrixUnitProducts(const Rows& rows) : x_(rows.x()), weight_(rows.weight()) {}

  void logits(int64_t first, const at::Tensor& block) const {
    block.copy_(at::mm(x(first, block), weight_.t()));
  }
  void input_grad(int64_t first, const at::Tensor& block, const at::Tensor& dx) const {
    dx.narrow(0, first, block.size(0)).copy_(at::mm(block.to(weight_.scalar_type()), weight_));
  }
  void weight_grad(int64_t first, const at::Tensor& block, const at::Tensor& dweight) const {
    const at::Tensor part = at::mm(block.to(x_.scalar_type()).t(), x(first, block));
    if (first == 0) {
      dweight.copy_(part);
    } else {
      dweight.add_(part);
    }
  }

 private:
  at::Tensor x(int64_t first, const at::Tensor& block) const {
    return x_.narrow(0, first, block.size(0));
  }

  at::Tensor x_, weight_;
};

template <class A, class Products>
void sweep(const Rows& rows, double soft_cap, double scale, const at::Tensor& row_scales,
           const Results& results) {
  const Products products(rows);
  const int64_t count = rows.count(), step = block_rows(count, rows.vocab());
  const at::Tensor logits = at::empty({std::min(step, count), rows.vocab()}, rows.accumulate());
  cpu::SoftmaxCrossEntropyParams p;
  p.dtype = std::is_same_v<A, double> ? cpu::Dtype::kDouble : cpu::Dtype::kFloat;
  p.vocab = rows.vocab();
  p.soft_cap = soft_cap;
  p.scale = scale;
  p.gradient = results.dx.defined() || results.dweight.defined();
  p.logits = logits.mutable_data_ptr();
  for (int64_t first = 0; first < count; first += step) {
    p.rows = std::min(step, count - first);
    const at::Tensor block = logits.narrow(0, 0, p.rows);
    products.logits(first, block);
    p.targets = rows.targets() + first;
    p.loss = results.loss.defined() ? results.loss.mutable_data_ptr<A>() + first : nullptr;
    p.row_scales = row_scales.defined() ? row_scales.const_data_ptr<A>() + first : nullptr;
    cpu::softmax_cross_entropy(p);
    if (results.dx.defined()) products.input_grad(first, block, results.dx);
    if (results.dweight.defined()) products.weight_grad(first, block, results.dweight);
  }
}

void run_sweep(const Rows& rows, double soft_cap, double scale, const at::Tensor& row_scales,
               const Results& results) {
  if (rows.count() == 0) {
    if (results.dweight.defined()) results.dweight.zero_();
    return;
  }
  if (rows.matrix_unit()) {
    sweep<float, MatrixUnitProducts>(rows, soft_cap, scale, row_scales, results);
  } else if (rows.x().scalar_type() == at::kDouble) {
    sweep<double, BlasProducts<double>>(rows, soft_cap, scale, row_scales, results);
  } else {
    sweep<float, BlasProducts<float>>(rows, soft_cap, scale, row_scales, results);
  }
}

at::Tensor reduced(const Rows& rows, const at::Tensor& loss, const at::Tensor& target,
                   std::string_view reduction) {
  if (reduction == "none") return rows.spread(loss).reshape(target.sizes());
  const double sum = loss.sum(at::kDouble).item<double>();
  const bool mean = reduction == "mean" && rows.count() > 0;
  return at::empty({}, loss.options()).fill_(mean ? sum / static_cast<double>(rows.count()) : sum);
}

// Gradients are for an upstream gradient of one, in the dtype of accumulation: scaled by the
// backward pass and only then rounded, so that a loss scale saves float16 gradients from underflow.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward_cpu(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
    double soft_cap, std::string_view reduction, bool need_dx, bool need_dweight) {
  check_linear_cross_entropy(x, weight, target, soft_cap, reduction);
  TORCH_CHECK(
      reduction != "none" || !(need_dx || need_dweight),
      "linear_cross_entropy_forward: reduction: \"none\" has its gradients in the backward");
  const Rows rows(x, weight, target, ignore_index);
  const auto accumulate = rows.accumulate();
  Results results;
  results.loss = at::empty({rows.count()}, accumulate);
  if (need_dx) results.dx = at::empty({rows.count(), rows.width()}, accumulate);
  if (need_dweight) results.dweight = at::empty(weight.sizes(), accumulate);
  const bool mean = reduction == "mean" && rows.count() > 0;
  run_sweep(rows, soft_cap, mean ? 1.0 / static_cast<double>(rows.count()) : 1.0, {}, results);
  return {reduced(rows, results.loss, target, reduction),
          need_dx ? rows.spread(results.dx).view(x.sizes()) : at::empty({0}, accumulate),
          need_dweight ? results.dweight : at::empty({0}, accumulate)};
}

at::Tensor linear_cross_entropy_cpu(const at::Tensor& x, const at::Tensor& weight,
                                    const at::Tensor& target, int64_t ignore_index, double soft_cap,
                                    std::string_view reduction) {
  return std::get<0>(linear_cross_entropy_forward_cpu(x, weight, target, ignore_index, soft_cap,
                                                      reduction, false, false));
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
    const OptionalTensor& dx, const OptionalTensor& dweight, int64_t ignore_index, double soft_cap,
    std::string_view reduction) {
  check_linear_cross_entropy(x, weight, target, soft_cap, reduction);
  const at::ScalarType type = x.scalar_type();
  if (reduction != "none") {
    const auto scaled = [&](const OptionalTensor& unit) {
      return unit ? at::mul(*unit, grad).to(type) : at::empty({0}, x.options());
    };
    return {scaled(dx), scaled(dweight)};
  }
  check_shape("linear_cross_entropy", "grad", grad, target.sym_sizes(), "target's shape");
  const Rows rows(x, weight, target, ignore_index);
  const auto accumulate = rows.accumulate();
  Results results;
  results.dx = at::empty({rows.count(), rows.width()}, accumulate);
  results.dweight = at::empty(weight.sizes(), accumulate);
  run_sweep(rows, soft_cap, 1.0, rows.select(grad.to(accumulate.dtype().toScalarType())), results);
  return {rows.spread(results.dx).view(x.sizes()).to(type), results.dweight.to(type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CPU, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_cpu);
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward_cpu);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_cpu);
}

}  // namespace xlstm::ops
