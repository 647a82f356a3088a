#pragma once
// Tensor maps of (B,T,NH,D) operands for the sm_90a kernels, and which operands can have one. Host only.
#include "cuda/mlstm/mlstm_params.h"
#include "cuda/prim/tensor_map.h"

namespace xlstm::cuda {

/// Whether the copy engine can read the operand: bfloat16, rows of adjacent numbers, address and strides multiples of 16
/// bytes, no stride 0 along a dimension of more than one element.
inline bool tensor_map_covers(const Operand& x, const Chunks& chunks) {
  const int64_t rows = chunks.cu_seqlens == nullptr ? chunks.num_sequences : 1;
  const auto walks = [](int64_t stride, int64_t size) { return size == 1 || stride > 0; };
  return x.dtype == Dtype::kBFloat16 && x.vector && walks(x.time, chunks.time) &&
         walks(x.head, chunks.num_heads) && walks(x.batch, rows);
}

/// Dimensions (D, NH, T, B); a box is 64 tokens of 64 columns of one head.
inline prim::TensorMap operand_tensor_map(const Operand& x, const Chunks& chunks) {
  const int64_t sizes[] = {x.width, chunks.num_heads, chunks.time,
                           chunks.cu_seqlens == nullptr ? chunks.num_sequences : 1};
  const int64_t strides[] = {1, x.head, x.time, x.batch};
  prim::TensorMapSpec spec;
  spec.base = x.data;
  spec.rank = 4;
  for (int i = 0; i < 4; ++i) {
    spec.dims[i] = static_cast<prim::u64>(sizes[i]);
    // A stride that is never walked need not be legal; 16 bytes are.
    if (i > 0) spec.strides[i] = sizes[i] == 1 ? 16 : static_cast<prim::u64>(2 * strides[i]);
  }
  spec.box[0] = spec.box[2] = 64;
  spec.box[1] = spec.box[3] = 1;
  return prim::make_tensor_map(spec);
}

/// Dimensions (columns, rows, matrices) of states one behind the other; a box is box_rows x 64.
inline prim::TensorMap state_tensor_map(const void* states, int32_t rows, int32_t columns,
                                        int64_t matrices, prim::u32 box_rows) {
  prim::TensorMapSpec spec;
  spec.base = const_cast<void*>(states);
  spec.rank = 3;
  spec.dims[0] = static_cast<prim::u64>(columns);
  spec.dims[1] = static_cast<prim::u64>(rows);
  spec.dims[2] = static_cast<prim::u64>(matrices);
  spec.strides[1] = 2 * spec.dims[0];
  spec.strides[2] = 2 * spec.dims[0] * spec.dims[1];
  spec.box[0] = 64;
  spec.box[1] = box_rows;
  spec.box[2] = 1;
  return prim::make_tensor_map(spec);
}

}  // namespace xlstm::cuda
