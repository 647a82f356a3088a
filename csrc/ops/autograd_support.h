#pragma once
// Small helpers of the operators' Autograd kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <optional>
#include <string_view>
#include <type_traits>

#include "csrc/ops/common.h"

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

inline bool requires_grad(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}
inline bool requires_grad(const OptionalTensor& tensor) {
  return tensor.has_value() && requires_grad(*tensor);
}

/// Forward mode (torch.func.jvp, torch.autograd.forward_ad) would give zeros in silence: it is an error.
inline void refuse_tangent(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.defined() || !tensor._fw_grad(/*level=*/0).defined(),
                              "xlstm: forward-mode derivatives (jvp) are not implemented");
}
inline void refuse_tangent(const OptionalTensor& tensor) {
  if (tensor.has_value()) refuse_tangent(*tensor);
}

/// True where this call must be recorded for a backward pass.
template <class... Tensors>
bool recording(const Tensors&... tensors) {
  (refuse_tangent(tensors), ...);
  return c10::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

/// Absent tensors travel through save_for_backward as undefined ones.
inline at::Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.has_value() ? *tensor : at::Tensor();
}
inline OptionalTensor or_absent(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

/// The ADInplaceOrView kernel of an operator that writes to some arguments, below which `call` runs: as with torch's own, a
/// graph that saved one of them sees that it was written, in inference mode too, and tensors made there stay there.
template <class F>
auto write_in_place(std::string_view op, std::initializer_list<NamedTensor> written,
                    const F& call) {
  for (const auto& [name, tensor] : written)
    TORCH_CHECK(c10::InferenceMode::is_enabled() || !tensor->is_inference(), op, ": ", name,
                ": made in inference mode and written outside it; clone() it first");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto mark = [&written] {
    for (const auto& [name, tensor] : written)
      if (!tensor->is_inference()) torch::autograd::impl::bump_version(*tensor);
  };
  if constexpr (std::is_void_v<decltype(call())>) {
    call();
    mark();
  } else {
    auto result = call();
    mark();
    return result;
  }
}

/// In the backward of a Function: an ordinary backward pass skips the Autograd kernels; one with
/// create_graph goes through them, where the backward operators are registered as having no
/// derivative of their own.
class BelowAutogradUnlessRecording {
 public:
  BelowAutogradUnlessRecording() {
    if (!c10::GradMode::is_enabled()) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

}  // namespace xlstm::ops
