#pragma once
// Checked arguments of the mLSTM operators, for any device.
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace xlstm::ops {

struct MlstmArguments {
  at::Tensor q, k, v, igate, fgate;
  std::optional<at::Tensor> c0, n0, m0, reset, cu_seqlens;
  std::string_view input_gate;
  bool normalize;
  std::optional<double> scale;
  double eps;
  int64_t chunk_size;
};

struct MlstmSizes {
  int64_t batch = 0, time = 0, num_heads = 0, dqk = 0, dv = 0;
  int64_t num_sequences = 0;  // B, or N with cu_seqlens
};

/// Throws c10::Error naming the argument where a rank, size, dtype, device or value is wrong.
MlstmSizes check_mlstm_arguments(const MlstmArguments& a);

/// The same for one token: tensors without T, states that are written.
MlstmSizes check_mlstm_step_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& igate, const at::Tensor& fgate,
                                      const at::Tensor& c, const at::Tensor& n, const at::Tensor& m,
                                      std::string_view input_gate);

/// True for "sigmoid", false for "exp"; anything else is an error.
bool is_sigmoid_input_gate(std::string_view op, std::string_view input_gate);

/// The scale of q: DQK^-1/2 where absent.
double mlstm_scale(const std::optional<double>& scale, int64_t dqk);

}  // namespace xlstm::ops
