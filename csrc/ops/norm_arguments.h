#pragma once
// Arguments of headwise_norm, checked for any device.
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
  std::string_view kind, gate_activation;

  bool is_rms() const { return kind == "rms"; }
  bool is_sigmoid() const { return gate_activation == "sigmoid"; }
};

/// dx, dweight, dbias, dskip, dskip_weight, dgate
using HeadwiseNormGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Throw c10::Error naming the argument where a rank, size, dtype, device or value is wrong.
void check_headwise_norm(const HeadwiseNormArguments& a);
/// A tensor of rows, (...,NH*DH) of x.
void check_headwise_rows(const at::Tensor& tensor, const at::Tensor& x, std::string_view name);

/// (...,NH*DH)
at::DimVector headwise_norm_sizes(const at::Tensor& x);

}  // namespace xlstm::ops
