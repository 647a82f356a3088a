#pragma once
// Arguments of headwise_norm and residual_norm, checked for any device.
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

struct HeadwiseNormArguments {
  const at::Tensor& x;
  const OptionalTensor &weight, &bias, &skip, &skip_weight, &gate;
  double eps;
  std::string_view kind, gate_activation = "silu";
  std::string_view op = "headwise_norm";  ///< as errors call it

  bool is_rms() const { return kind == "rms"; }
  bool is_sigmoid() const { return gate_activation == "sigmoid"; }
};

/// dx, dweight, dbias, dskip, dskip_weight, dgate
using HeadwiseNormGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// The norm of a sum (...,D) as the head-wise norm of one head: no skip, no gate. Keeps what that refers to.
class SumNorm {
 public:
  SumNorm(const at::Tensor& sum, const OptionalTensor& weight, const OptionalTensor& bias,
          double eps, std::string_view kind)
      : sum_(sum.unsqueeze(-2)), arguments_{sum_,  weight, bias, none_,  none_,
                                            none_, eps,    kind, "silu", "residual_norm"} {}
  SumNorm(const SumNorm&) = delete;
  SumNorm& operator=(const SumNorm&) = delete;
  const HeadwiseNormArguments& arguments() const { return arguments_; }

 private:
  const OptionalTensor none_;
  const at::Tensor sum_;
  const HeadwiseNormArguments arguments_;
};

/// sum, y
using ResidualNormResult = std::tuple<at::Tensor, at::Tensor>;
/// dx, dweight, dbias
using ResidualNormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// A sum's memory, packed, in the type that x and branch promote to. Throws as the checks below.
at::Tensor empty_residual_sum(const at::Tensor& x, const at::Tensor& branch);
/// Gradients of the head-wise norm of a sum, as residual_norm_backward returns them.
ResidualNormGradients residual_gradients(const at::Tensor& sum, const HeadwiseNormGradients& g);

/// Throws c10::Error naming the argument whose device is not x's.
void check_headwise_norm_devices(const HeadwiseNormArguments& a);
/// Throw c10::Error naming the argument where a rank, size, dtype, device or value is wrong.
void check_headwise_norm(const HeadwiseNormArguments& a);
/// A tensor of rows, (...,NH*DH) of x.
void check_headwise_rows(const HeadwiseNormArguments& a, const at::Tensor& tensor,
                         std::string_view name);

/// (...,NH*DH)
at::DimVector headwise_norm_sizes(const at::Tensor& x);

}  // namespace xlstm::ops
