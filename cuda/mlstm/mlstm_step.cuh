#pragma once
// What the decoding steps share.
#include "cuda/mlstm/mlstm.h"
#include "cuda/mlstm/mlstm_gates.cuh"
#include "cuda/mlstm/mlstm_params.h"
#include "cuda/mlstm/mlstm_rows.cuh"

namespace xlstm::cuda {

/// (B,NH,D) numbers of one head.
struct StepRow {
  const View& view;
  int64_t base;
  Dtype dtype;
  DEVICE_FUNCTION StepRow(const View& x, const StepParams& p, int item, Dtype type)
      : view(x), base(item / p.num_heads * x.batch + item % p.num_heads * x.head), dtype(type) {}
  DEVICE_FUNCTION float operator[](int i) const {
    return load_number(view.data, base + i * view.inner, dtype);
  }
};

/// Four neighbouring numbers of a row of C; those from `width` on are neither read nor written.
template <bool kVector>
DEVICE_FUNCTION void load_four(const float* from, int width, float (&c)[4]) {
  if constexpr (kVector) {
    Piece<float> four;
    four.load(from, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = four[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = i < width ? from[i] : 0.0F;
  }
}
template <bool kVector>
DEVICE_FUNCTION void store_four(float* to, int width, const float (&c)[4]) {
  if constexpr (kVector) {
    Piece<float> four;
    four.set(c);
    four.store(to, 0);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < width) to[i] = c[i];
  }
}

inline StepParams step_params(const MlstmProblem& problem, const MlstmStep& call) {
  StepParams p;
  p.call = call;
  p.batch = static_cast<int32_t>(problem.batch);
  p.num_heads = static_cast<int32_t>(problem.num_heads);
  p.dqk = static_cast<int32_t>(problem.dqk);
  p.dv = static_cast<int32_t>(problem.dv);
  p.dtype = problem.dtype;
  p.igate_dtype = problem.igate_dtype;
  p.fgate_dtype = problem.fgate_dtype;
  p.sigmoid_input_gate = problem.sigmoid_input_gate;
  p.normalize = problem.normalize;
  p.scale = problem.scale;
  p.eps = problem.eps;
  return p;
}

}  // namespace xlstm::cuda
