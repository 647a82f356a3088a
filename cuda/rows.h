#pragma once
// Tensors that are rows of channels.
#include "cuda/tensors.h"

namespace xlstm::cuda {

/// Row r starts at data + (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride numbers; its channels lie side
/// by side.
struct RowView {
  void* data = nullptr;
  int64_t inner_rows = 1, inner_stride = 0, outer_stride = 0;
};

}  // namespace xlstm::cuda
