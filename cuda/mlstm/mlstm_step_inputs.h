#pragma once
// What the cell of a decoding mLSTM layer reads, of one token: the convolution's step, the block-diagonal projections and the
// gates, in one launch.
#include "cuda/tensors.h"

namespace xlstm::cuda {

/// Everything is of `dtype`, contiguous where no stride is given, and begins at a multiple of 16 bytes. Per batch row, with W
/// the width and S the size of a block:
///   a = silu(conv_bias + sum_j conv_weight[:, j] window[j]),  window[W-1] = x, then shifted by one
///   q[b S + o] = bias[b S + o] + sum_i weight[b][o][i] a[b S + i];  k likewise;  v of x in place of a
///   gate = bias + weight [q, k, v]
/// a, q, k and v are rounded to dtype before they are read again.
struct MlstmStepInputsParams {
  struct Projection {
    const void* weight = nullptr;  ///< (C/S,S,S)
    const void* bias = nullptr;    ///< (C); null: none
    void* out = nullptr;           ///< (B,C)
  };
  struct Gate {
    const void* weight = nullptr;  ///< (NH,3C)
    const void* bias = nullptr;    ///< (NH)
    void* out = nullptr;           ///< (B,NH)
  };

  Dtype dtype = Dtype::kFloat32;
  int32_t batch = 0, channels = 0, num_heads = 0;
  int32_t width = 0;                  ///< W, 2 to 8
  int32_t block_size = 0;             ///< S
  const void* x = nullptr;            ///< (B,C)
  int64_t x_batch = 0;                ///< stride in numbers
  const void* conv_weight = nullptr;  ///< (C,W)
  const void* conv_bias = nullptr;    ///< (C); null: none
  void* window = nullptr;             ///< (B,W-1,C), shifted in place
  void* a = nullptr;                  ///< (B,C)
  Projection q, k, v;
  Gate igate, fgate;
};

/// Whether the kernel takes C channels in blocks of S and NH heads: S of 2, 4 or 8, channels that can be moved 16 bytes at a
/// time, and q, k and v of a row in the shared memory of a block.
bool mlstm_step_inputs_supported(int64_t channels, int64_t block_size, int64_t num_heads,
                                 Dtype dtype, const DeviceLimits& device);
/// Whether x, with that stride of its rows, can be moved so.
bool mlstm_step_inputs_aligned(const void* x, int64_t x_batch, Dtype dtype);

void launch_mlstm_step_inputs(const MlstmStepInputsParams& params, Stream stream);

}  // namespace xlstm::cuda
