#include "csrc/ops/mlstm_step_inputs_kernels.h"

#include <ATen/ops/empty.h>

#include <vector>

#include "csrc/ops/kernel_tensors.h"
#include "cuda/mlstm/mlstm_step_inputs.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using Params = cuda::MlstmStepInputsParams;

/// The parameters as the kernel reads them, kept alive for a call.
class Packed {
 public:
  const void* operator()(const OptionalTensor& parameter) {
    return parameter ? (*this)(*parameter) : nullptr;
  }
  const void* operator()(const Tensor& parameter) {
    tensors_.push_back(packed(parameter));
    return tensors_.back().const_data_ptr();
  }

 private:
  std::vector<Tensor> tensors_;
};

/// x, or a packed copy where its rows cannot be moved 16 bytes at a time.
Tensor movable_rows(const Tensor& x, cuda::Dtype dtype) {
  const bool movable =
      x.stride(1) == 1 && cuda::mlstm_step_inputs_aligned(x.const_data_ptr(), x.stride(0), dtype);
  return movable ? x : packed(x);
}

}  // namespace

std::string mlstm_step_inputs_kernels_lack(const MlstmStepInputsArguments& a,
                                           const MlstmStepInputsSizes& sizes,
                                           const cuda::DeviceLimits& limits) {
  const at::ScalarType type = a.x.scalar_type();
  const MlstmInputParameters& p = a.parameters;
  if (type == at::kDouble) return "float64";
  if (p.conv_weight.scalar_type() != type || (p.conv_bias && p.conv_bias->scalar_type() != type))
    return "a convolution of another type";
  if (!cuda::mlstm_step_inputs_supported(sizes.channels, sizes.block_size, sizes.num_heads,
                                         kernel_dtype(type), limits))
    return std::to_string(sizes.channels) + " channels in blocks of " +
           std::to_string(sizes.block_size) + " with " + std::to_string(sizes.num_heads) + " heads";
  return "";
}

MlstmStepInputsResults mlstm_step_inputs_kernels_forward(const MlstmStepInputsArguments& a,
                                                         const MlstmStepInputsSizes& sizes,
                                                         cuda::Stream stream) {
  const MlstmInputParameters& given = a.parameters;
  const cuda::Dtype dtype = kernel_dtype(a.x.scalar_type());
  const Tensor x = movable_rows(a.x, dtype), window = packed(a.window);
  const auto empty = [&](int64_t width) { return at::empty({sizes.batch, width}, x.options()); };
  const Tensor conv = empty(sizes.channels), q = empty(sizes.channels), k = empty(sizes.channels),
               v = empty(sizes.channels), igate = empty(sizes.num_heads),
               fgate = empty(sizes.num_heads);
  Packed pointer;
  Params p;
  p.dtype = dtype;
  p.batch = static_cast<int32_t>(sizes.batch), p.channels = static_cast<int32_t>(sizes.channels);
  p.num_heads = static_cast<int32_t>(sizes.num_heads);
  p.width = static_cast<int32_t>(sizes.width);
  p.block_size = static_cast<int32_t>(sizes.block_size);
  p.x = x.const_data_ptr(), p.x_batch = x.stride(0);
  p.conv_weight = pointer(given.conv_weight), p.conv_bias = pointer(given.conv_bias);
  p.window = kernel_data(window), p.a = kernel_data(conv);
  p.q = {pointer(given.q_weight), pointer(given.q_bias), kernel_data(q)};
  p.k = {pointer(given.k_weight), pointer(given.k_bias), kernel_data(k)};
  p.v = {pointer(given.v_weight), pointer(given.v_bias), kernel_data(v)};
  p.igate = {pointer(given.igate_weight), pointer(given.igate_bias), kernel_data(igate)};
  p.fgate = {pointer(given.fgate_weight), pointer(given.fgate_bias), kernel_data(fgate)};
  run_kernels("mlstm_step_inputs", [&] { cuda::launch_mlstm_step_inputs(p, stream); });
  if (!window.is_same(a.window)) a.window.copy_(window);
  return {conv, q, k, v, igate, fgate};
}

}  // namespace xlstm::ops
