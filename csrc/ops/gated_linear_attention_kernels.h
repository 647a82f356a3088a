#pragma once
// Gated linear attention on the kernels of cuda/gated: scratch memory from torch's allocator, no synchronisation. Arguments
// are checked already; the tensors' device is the current one.
#include <string>
#include <tuple>
#include <vector>

#include "csrc/ops/gated_linear_attention_chunks.h"
#include "cuda/tensors.h"

namespace xlstm::ops {

/// Why no kernel takes a call; empty: the kernels do. The tensors of a call are float32 and contiguous, whatever the
/// operator was given; float64 stays float64.
std::string gated_linear_attention_kernels_lack(const GatedChunks& in);

/// Results as those of gated_linear_attention_chunks; in.length is ignored.
std::tuple<at::Tensor, at::Tensor> gated_linear_attention_kernels(const GatedChunks& in,
                                                                  cuda::Stream stream);
std::vector<at::Tensor> gated_linear_attention_kernels_backward(const GatedChunks& in,
                                                                const at::Tensor& dh,
                                                                const at::Tensor& dstate,
                                                                cuda::Stream stream);

}  // namespace xlstm::ops
