#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace xlstm::ops {

/// The tensors of a call, of one accumulation type, all but reset differentiable. Meaning: gated_linear_attention.h.
struct GatedChunks {
  at::Tensor q, k, v, g, u, state0, reset;  ///< u, state0, reset undefined where absent
  double scale = 1;
  int64_t length = 16;  ///< of a chunk
};

/// h and the last state in ATen calls, on any device; rows of the batch in slabs of bounded memory. All results are
/// contiguous.
std::tuple<at::Tensor, at::Tensor> gated_linear_attention_chunks(const GatedChunks& in);
/// Gradients of q, k, v, g, u, state0 (undefined for an absent one): each slab is computed again with a graph, also below
/// the Autograd kernels.
std::vector<at::Tensor> gated_linear_attention_chunks_backward(const GatedChunks& in,
                                                               const at::Tensor& dh,
                                                               const at::Tensor& dstate);

}  // namespace xlstm::ops
