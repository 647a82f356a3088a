// The mLSTM operators on CUDA: the kernels of cuda/mlstm where they take a call, else the generic path in ATen calls.
// Built without nvcc (no XLSTM_CUDA), or with XLSTM_CUDA_KERNELS=off in the environment, all calls are generic.
// On compute capability 9.0 the kernels for sm_90a (cuda/mlstm/hopper) run where they cover a problem and are faster;
// XLSTM_HOPPER=0, read when a device is first used, takes those for sm_80 instead. Which path runs, and why, is logged once per
// reason at c10's level INFO: TORCH_CPP_LOG_LEVEL=INFO shows it.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/cpu/mlstm_params.h"
#include "csrc/ops/cuda_device.h"
#include "csrc/ops/mlstm_generic.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/mlstm_kernels.h"
#endif

namespace xlstm::ops {
namespace {

#ifdef XLSTM_CUDA

/// Whether the kernels take a call, with a ring of so many tokens; logs the answer.
bool use_kernels(const MlstmSizes& sizes, const at::Tensor& q, int64_t ring_tokens = 1) {
  const cuda::DeviceLimits& limits = device_limits(q.device());
  std::string lack = cuda_kernels_lack(q.device());
  if (lack.empty()) lack = mlstm_kernels_lack(sizes, q.scalar_type(), limits, ring_tokens);
  if (lack.empty() && limits.hopper)
    log_once("mlstm: the kernels for sm_90a where they are faster");
  return takes_kernels("mlstm", lack);
}

MlstmDevice current_device(const at::Tensor& q) {
  return {device_limits(q.device()), current_stream(q.device())};
}

#else

void log_generic(at::Device device) { takes_kernels("mlstm", cuda_kernels_lack(device)); }

#endif

/// No tokens or no heads: nothing is computed.
bool is_empty(const MlstmSizes& sizes) {
  return sizes.time == 0 || sizes.num_sequences == 0 || sizes.num_heads == 0;
}

/// The states pass through.
MlstmResults empty_forward(const MlstmArguments& a, const MlstmSizes& sizes) {
  MlstmResults results = empty_mlstm_results(a, sizes, true);
  auto& [h, c, n, m, product] = results;
  const bool sigmoid = is_sigmoid_input_gate("mlstm_chunkwise", a.input_gate);
  const auto fill = [](at::Tensor& state, const OptionalTensor& initial) {
    if (initial) {
      state.copy_(*initial);
    } else {
      state.zero_();
    }
  };
  fill(c, a.c0);
  fill(n, a.n0);
  fill(m, sizes.time == 0 && sigmoid ? std::nullopt : a.m0);
  m.clamp_min_(cpu::kMinLogInput);
  return results;
}

MlstmGradients empty_backward(const MlstmBackwardArguments& a, const MlstmSizes& sizes) {
  MlstmGradients gradients = empty_mlstm_gradients(a.in, sizes);
  const auto [dc, dn] = mlstm_state_gradients(a, sizes);
  const auto fill = [](at::Tensor& gradient, const OptionalTensor& final) {
    if (gradient.numel() == 0) return;
    if (final) {
      gradient.copy_(*final);
    } else {
      gradient.zero_();
    }
  };
  fill(std::get<5>(gradients), dc);
  fill(std::get<6>(gradients), dn);
  return gradients;
}

MlstmResults run_forward(const MlstmArguments& a, [[maybe_unused]] bool with_product) {
  const MlstmSizes sizes = check_mlstm_arguments(a);
  const c10::DeviceGuard guard(a.q.device());
  if (is_empty(sizes)) return empty_forward(a, sizes);
#ifdef XLSTM_CUDA
  if (use_kernels(sizes, a.q))
    return mlstm_kernels_forward(a, sizes, current_device(a.q), with_product);
#else
  log_generic(a.q.device());
#endif
  return mlstm_generic_forward(a);
}

MlstmOutputs mlstm_chunkwise_cuda(const MlstmArguments& a) {
  const auto [h, c, n, m, product] = run_forward(a, false);
  return {h, c, n, m};
}

MlstmResults mlstm_chunkwise_forward_cuda(const MlstmArguments& a) { return run_forward(a, true); }

MlstmGradients mlstm_chunkwise_backward_cuda(const MlstmBackwardArguments& a) {
  const MlstmSizes sizes = check_mlstm_backward_arguments(a);
  const c10::DeviceGuard guard(a.in.q.device());
  if (is_empty(sizes)) return empty_backward(a, sizes);
#ifdef XLSTM_CUDA
  if (use_kernels(sizes, a.in.q)) return mlstm_kernels_backward(a, sizes, current_device(a.in.q));
#else
  log_generic(a.in.q.device());
#endif
  return mlstm_generic_backward(a);
}

at::Tensor mlstm_step_cuda(const MlstmStepArguments& a) {
  const MlstmSizes sizes = check_mlstm_step_arguments(a);
  const c10::DeviceGuard guard(a.q.device());
  if (is_empty(sizes)) return at::empty(a.v.sizes(), a.v.options());
#ifdef XLSTM_CUDA
  if (use_kernels(sizes, a.q)) return mlstm_kernels_step(a, sizes, current_device(a.q));
#else
  log_generic(a.q.device());
#endif
  return mlstm_generic_step(a);
}

at::Tensor mlstm_step_lazy_cuda(const MlstmLazyArguments& a) {
  const MlstmSizes sizes = check_mlstm_lazy_arguments(a);
  const c10::DeviceGuard guard(a.q.device());
  if (is_empty(sizes)) return at::empty(a.v.sizes(), a.v.options());
#ifdef XLSTM_CUDA
  if (use_kernels(sizes, a.q, a.ring.keys.size(2)))
    return mlstm_kernels_step_lazy(a, sizes, current_device(a.q));
#else
  log_generic(a.q.device());
#endif
  return mlstm_generic_step_lazy(a);
}

void mlstm_fold_cuda(const MlstmFoldArguments& a) {
  const MlstmSizes sizes = check_mlstm_fold_arguments(a);
  const c10::DeviceGuard guard(a.c.device());
  if (is_empty(sizes)) return;
#ifdef XLSTM_CUDA
  if (use_kernels(sizes, a.ring.keys, a.ring.keys.size(2)))
    return mlstm_kernels_fold(a, sizes, current_device(a.c));
#else
  log_generic(a.c.device());
#endif
  mlstm_generic_fold(a);
}

}  // namespace

bool mlstm_lazy_moves_less(int64_t dqk, int64_t dv, int64_t element_bytes) {
  constexpr int64_t kTokens = MlstmRing::kTokens;
  const int64_t state = 4 * dqk * dv, ring = kTokens * (dqk + dv) * element_bytes;
  return state + 2 * state / kTokens + ring < 2 * state;
}

bool mlstm_step_lazy_pays(const at::Tensor& k, const at::Tensor& v) {
  const int64_t dqk = k.size(2), dv = v.size(2);
  if (!mlstm_lazy_moves_less(dqk, dv, k.element_size())) return false;
  constexpr int64_t kOutOfCaches = 1 << 20;  // bytes of a head's C, of which a model has hundreds
  if (k.is_cpu()) return 4 * dqk * dv >= kOutOfCaches;
#ifdef XLSTM_CUDA
  const MlstmSizes sizes{k.size(0), 1, k.size(1), dqk, dv, k.size(0)};
  return k.is_cuda() && use_kernels(sizes, k, MlstmRing::kTokens);
#else
  return false;
#endif
}

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("mlstm_chunkwise", mlstm_kernel<mlstm_chunkwise_cuda>);
  m.impl("mlstm_chunkwise_forward", mlstm_kernel<mlstm_chunkwise_forward_cuda>);
  m.impl("mlstm_chunkwise_backward", mlstm_backward_kernel<mlstm_chunkwise_backward_cuda>);
  m.impl("mlstm_step", mlstm_step_kernel<mlstm_step_cuda>);
  m.impl("mlstm_step_lazy", mlstm_lazy_kernel<mlstm_step_lazy_cuda>);
  m.impl("mlstm_fold", mlstm_fold_kernel<mlstm_fold_cuda>);
}

}  // namespace xlstm::ops
