#pragma once
// Head-wise norm with skip and gate, y = (norm(x) * weight + bias + skip_weight * skip) * act(gate), and its gradients.
// x may be a sum that the same pass makes: of a residual stream and what a branch adds to it.
// Statistics and sums in float32. No allocation, no synchronisation.
#include "cuda/rows.h"

namespace xlstm::cuda {

/// (NH*DH) packed, of any type; data null where absent.
struct NormParameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

struct HeadwiseNormInputs {
  int64_t rows = 0;
  int32_t heads = 1, dim = 0;     ///< NH and DH, the width that is normalised
  Dtype dtype = Dtype::kFloat32;  ///< of all rows
  float eps = 0;
  bool rms = false;           ///< else layer norm
  bool sigmoid_gate = false;  ///< else SiLU
  RowView x;
  int64_t x_head = 0;  ///< from one head of x to the next
  RowView skip, gate;  ///< data null where absent; heads packed
  NormParameter weight, bias, skip_weight;
  int32_t num_multiprocessors =
      DeviceLimits{}.num_multiprocessors;  ///< decides how rows are shared out
};

struct NormTerm {
  RowView rows;  ///< heads packed
  Dtype dtype = Dtype::kFloat32;
};

struct HeadwiseNormForward {
  HeadwiseNormInputs in;
  void* y = nullptr;       ///< packed
  NormTerm terms[2] = {};  ///< where present, in.x becomes their sum: packed, in.dtype
};

struct HeadwiseNormBackward {
  HeadwiseNormInputs in;
  RowView dy;
  RowView dsum;  ///< further gradient of x, heads packed; data null where absent
  void *dx = nullptr, *dskip = nullptr, *dgate = nullptr;  ///< packed; of what is present
  void *dweight = nullptr, *dbias = nullptr,
       *dskip_weight = nullptr;  ///< in their parameters' types; of what is present
  float* partials = nullptr;     ///< headwise_norm_partials() numbers of scratch memory
};

void headwise_norm_forward(const HeadwiseNormForward& call, Stream stream);
int64_t headwise_norm_partials(const HeadwiseNormInputs& in);
void headwise_norm_backward(const HeadwiseNormBackward& call, Stream stream);

}  // namespace xlstm::cuda
