#pragma once
// Argument checks shared by the operators: errors name the operator, the argument, what was expected and what came.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

namespace xlstm::ops {

inline void check_rank(std::string_view op, std::string_view name, const at::Tensor& tensor,
                       int64_t rank) {
  TORCH_CHECK(tensor.dim() == rank, op, ": ", name, ": expected ", rank, " dimensions, got ",
              tensor.dim());
}

/// `meaning` spells the shape in letters, "(B,T,NH)".
inline void check_shape(std::string_view op, std::string_view name, const at::Tensor& tensor,
                        at::IntArrayRef expected, std::string_view meaning) {
  TORCH_CHECK(tensor.sizes() == expected, op, ": ", name, ": expected ", meaning, " = ", expected,
              ", got ", tensor.sizes());
}

inline void check_dtype(std::string_view op, std::string_view name, const at::Tensor& tensor,
                        at::ScalarType expected) {
  TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", name, ": expected dtype ", expected,
              ", got ", tensor.scalar_type());
}

inline void check_floating(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op,
      ": ", name, ": expected float32, float64, bfloat16 or float16, got ", type);
}

inline void check_device(std::string_view op, std::string_view name, const at::Tensor& tensor,
                         at::Device expected) {
  TORCH_CHECK(tensor.device() == expected, op, ": ", name, ": expected device ", expected, ", got ",
              tensor.device());
}

}  // namespace xlstm::ops
