#pragma once
// Argument checks shared by the operators: errors name the operator, the argument, what was expected and what came. Sizes
// may be symbolic, so that Meta kernels can use them, too.
#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>

#include <initializer_list>
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
                        c10::SymIntArrayRef expected, std::string_view meaning) {
  TORCH_CHECK(tensor.sym_sizes() == expected, op, ": ", name, ": expected ", meaning, " = ",
              expected, ", got ", tensor.sym_sizes());
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

/// (B,T) bool; nothing to check where it is absent.
inline void check_reset(std::string_view op, const std::optional<at::Tensor>& reset,
                        const c10::SymInt& batch, const c10::SymInt& time) {
  if (!reset) return;
  check_shape(op, "reset", *reset, {batch, time}, "(B,T)");
  check_dtype(op, "reset", *reset, at::kBool);
}

/// (N+1) int32 or int64 for a batch of one packed row.
inline void check_cu_seqlens(std::string_view op, const at::Tensor& cu_seqlens,
                             const c10::SymInt& batch) {
  check_rank(op, "cu_seqlens", cu_seqlens, 1);
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kInt || cu_seqlens.scalar_type() == at::kLong, op,
              ": cu_seqlens: expected int32 or int64, got ", cu_seqlens.scalar_type());
  TORCH_CHECK(cu_seqlens.sym_size(0) >= 1, op,
              ": cu_seqlens: expected at least one entry (0), got none");
  TORCH_CHECK(batch == 1, op, ": cu_seqlens: expected B = 1 (one packed row), got B = ", batch);
}

inline void check_device(std::string_view op, std::string_view name, const at::Tensor& tensor,
                         at::Device expected) {
  TORCH_CHECK(tensor.device() == expected, op, ": ", name, ": expected device ", expected, ", got ",
              tensor.device());
}

/// An argument as errors call it; null where it is absent.
struct NamedTensor {
  std::string_view name;
  const at::Tensor* tensor;

  NamedTensor(std::string_view argument, const at::Tensor& given)
      : name(argument), tensor(&given) {}
  NamedTensor(std::string_view argument, const std::optional<at::Tensor>& given)
      : name(argument), tensor(given ? &*given : nullptr) {}
};

/// All that are there.
inline void check_floating(std::string_view op, std::initializer_list<NamedTensor> arguments) {
  for (const auto& [name, tensor] : arguments)
    if (tensor != nullptr) check_floating(op, name, *tensor);
}

/// A kernel takes addresses of another device for its own. The dispatcher lets them through: a call with one CUDA tensor is
/// a call of the CUDA kernel, and one with a Meta tensor is a call of the Meta kernel.
inline void check_devices(std::string_view op, at::Device expected,
                          std::initializer_list<NamedTensor> arguments) {
  for (const auto& [name, tensor] : arguments)
    if (tensor != nullptr) check_device(op, name, *tensor, expected);
}

}  // namespace xlstm::ops
