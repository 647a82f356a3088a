#pragma once
// Arguments of the mLSTM operators, checked for any device, and the step between them and the dispatcher, which passes
// the arguments of a schema one by one.
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "csrc/ops/mlstm.h"

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

struct MlstmArguments {
  at::Tensor q, k, v, igate, fgate;
  OptionalTensor c0, n0, m0, reset, cu_seqlens;
  std::string_view input_gate;
  bool normalize;
  std::optional<double> scale;
  double eps;
  int64_t chunk_size;
};

struct MlstmBackwardArguments {
  OptionalTensor dh, dc, dn;
  MlstmArguments in;
  at::Tensor h, product;  // of mlstm_chunkwise_forward
};

struct MlstmStepArguments {
  static constexpr std::string_view kName = "mlstm_step";
  const at::Tensor &q, &k, &v, &igate, &fgate;
  at::Tensor &c, &n, &m;
  std::string_view input_gate;
  bool normalize;
  std::optional<double> scale;
  double eps;
};

struct MlstmLazyArguments : MlstmStepArguments {
  static constexpr std::string_view kName = "mlstm_step_lazy";
  MlstmRing& ring;
};

struct MlstmFoldArguments {
  static constexpr std::string_view kName = "mlstm_fold";
  at::Tensor &c, &n, &m;
  MlstmRing& ring;
  std::string_view input_gate;
};

/// h, c, n, m
using MlstmOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// h, c, n, m, product
using MlstmResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// dq, dk, dv, digate, dfgate, dc0, dn0
using MlstmGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct MlstmSizes {
  int64_t batch = 0, time = 0, num_heads = 0, dqk = 0, dv = 0;
  int64_t num_sequences = 0;  // B, or N with cu_seqlens
};

/// Throws c10::Error naming the argument whose device is not that of the first one.
void check_mlstm_devices(const MlstmArguments& a);
void check_mlstm_devices(const MlstmBackwardArguments& a);
void check_mlstm_devices(const MlstmStepArguments& a,
                         std::string_view op = MlstmStepArguments::kName);
void check_mlstm_devices(const MlstmLazyArguments& a);
void check_mlstm_devices(const MlstmFoldArguments& a);

/// Throws c10::Error naming the argument where a rank, size, dtype, device or value is wrong.
MlstmSizes check_mlstm_arguments(const MlstmArguments& a);
MlstmSizes check_mlstm_backward_arguments(const MlstmBackwardArguments& a);
/// The same for one token: tensors without T, states that are written.
MlstmSizes check_mlstm_step_arguments(const MlstmStepArguments& a,
                                      std::string_view op = MlstmStepArguments::kName);
MlstmSizes check_mlstm_lazy_arguments(const MlstmLazyArguments& a);
MlstmSizes check_mlstm_fold_arguments(const MlstmFoldArguments& a);

/// True for "sigmoid", false for "exp"; anything else is an error.
bool is_sigmoid_input_gate(std::string_view op, std::string_view input_gate);

/// The scale of q: DQK^-1/2 where absent.
double mlstm_scale(const std::optional<double>& scale, int64_t dqk);

/// Empty h, c, n, m and, where wanted, product; on q's device.
MlstmResults empty_mlstm_results(const MlstmArguments& a, const MlstmSizes& sizes, bool product);

/// Empty gradients; dc0 and dn0 have size 0 where c0 and n0 are absent.
MlstmGradients empty_mlstm_gradients(const MlstmArguments& a, const MlstmSizes& sizes);

/// Gradients of the final states, contiguous: both or, where neither came, none.
std::pair<OptionalTensor, OptionalTensor> mlstm_state_gradients(const MlstmBackwardArguments& a,
                                                                const MlstmSizes& sizes);

// ---- kernels as the dispatcher calls them -------------------------------------------------------------------------

/// kFunction takes MlstmArguments.
template <auto kFunction>
std::invoke_result_t<decltype(kFunction), const MlstmArguments&> mlstm_kernel(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& igate,
    const at::Tensor& fgate, const OptionalTensor& c0, const OptionalTensor& n0,
    const OptionalTensor& m0, const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
    std::string_view input_gate, bool normalize, std::optional<double> scale, double eps,
    int64_t chunk_size) {
  return kFunction({q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens, input_gate, normalize,
                    scale, eps, chunk_size});
}

/// kFunction takes MlstmBackwardArguments.
template <auto kFunction>
MlstmGradients mlstm_backward_kernel(
    const OptionalTensor& dh, const OptionalTensor& dc, const OptionalTensor& dn,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& igate,
    const at::Tensor& fgate, const OptionalTensor& c0, const OptionalTensor& n0,
    const OptionalTensor& m0, const at::Tensor& h, const at::Tensor& product,
    const OptionalTensor& reset, const OptionalTensor& cu_seqlens, std::string_view input_gate,
    bool normalize, std::optional<double> scale, double eps, int64_t chunk_size) {
  return kFunction({dh,
                    dc,
                    dn,
                    {q, k, v, igate, fgate, c0, n0, m0, reset, cu_seqlens, input_gate, normalize,
                     scale, eps, chunk_size},
                    h,
                    product});
}

/// kFunction takes MlstmStepArguments.
template <auto kFunction>
at::Tensor mlstm_step_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                             at::Tensor& n, at::Tensor& m, std::string_view input_gate,
                             bool normalize, std::optional<double> scale, double eps) {
  return kFunction({q, k, v, igate, fgate, c, n, m, input_gate, normalize, scale, eps});
}

/// kFunction takes MlstmLazyArguments.
template <auto kFunction>
at::Tensor mlstm_lazy_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                             at::Tensor& n, at::Tensor& m, at::Tensor& keys, at::Tensor& values,
                             at::Tensor& gates, at::Tensor& count, std::string_view input_gate,
                             bool normalize, std::optional<double> scale, double eps) {
  MlstmRing ring{keys, values, gates, count};
  return kFunction({{q, k, v, igate, fgate, c, n, m, input_gate, normalize, scale, eps}, ring});
}

/// kFunction takes MlstmFoldArguments.
template <auto kFunction>
void mlstm_fold_kernel(at::Tensor& c, at::Tensor& n, at::Tensor& m, const at::Tensor& keys,
                       const at::Tensor& values, const at::Tensor& gates, at::Tensor& count,
                       std::string_view input_gate) {
  MlstmRing ring{keys, values, gates, count};
  kFunction({c, n, m, ring, input_gate});
}

}  // namespace xlstm::ops
