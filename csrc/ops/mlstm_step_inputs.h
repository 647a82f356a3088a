#pragma once
// mlstm_step_inputs: its arguments, checked for any device, and the operators that it stands for.
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "csrc/ops/mlstm.h"

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

struct MlstmStepInputsArguments {
  static constexpr std::string_view kName = "mlstm_step_inputs";
  const at::Tensor& x;
  const MlstmInputParameters& parameters;
  at::Tensor& window;
};

/// a, q, k, v, igate, fgate
using MlstmStepInputsResults =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct MlstmStepInputsSizes {
  int64_t batch = 0, channels = 0, num_heads = 0;
  int64_t width = 0, block_size = 0;  // W, S
};

/// Throws c10::Error naming the argument whose device is not x's.
void check_mlstm_step_inputs_devices(const MlstmStepInputsArguments& a);
/// Throws c10::Error naming the argument where a rank, size, dtype, device or value is wrong.
MlstmStepInputsSizes check_mlstm_step_inputs(const MlstmStepInputsArguments& a);

/// One operator after the other. Arguments are checked already.
MlstmStepInputsResults mlstm_step_inputs_generic(const MlstmStepInputsArguments& a);

/// kFunction, which takes MlstmStepInputsArguments, as the dispatcher calls it.
template <auto kFunction>
MlstmStepInputsResults mlstm_step_inputs_kernel(
    const at::Tensor& x, const at::Tensor& conv_weight, const OptionalTensor& conv_bias,
    const at::Tensor& q_weight, const OptionalTensor& q_bias, const at::Tensor& k_weight,
    const OptionalTensor& k_bias, const at::Tensor& v_weight, const OptionalTensor& v_bias,
    const at::Tensor& igate_weight, const at::Tensor& igate_bias, const at::Tensor& fgate_weight,
    const at::Tensor& fgate_bias, at::Tensor& window) {
  const MlstmInputParameters parameters{conv_weight,  conv_bias,  q_weight,     q_bias,
                                        k_weight,     k_bias,     v_weight,     v_bias,
                                        igate_weight, igate_bias, fgate_weight, fgate_bias};
  return kFunction({x, parameters, window});
}

}  // namespace xlstm::ops
