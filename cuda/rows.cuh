#pragma once
// Where rows of channels lie.
#include "cuda/prim/prim.h"
#include "cuda/rows.h"

namespace xlstm::cuda {

/// Where a row begins, in numbers.
DEVICE_FUNCTION int64_t row_offset(const RowView& view, int64_t row) {
  if (row < view.inner_rows) return row * view.inner_stride;
  return row / view.inner_rows * view.outer_stride + row % view.inner_rows * view.inner_stride;
}

/// A row and those behind it at the inner stride: where it begins, in numbers, and how many they are, itself included.
struct RowRun {
  int64_t at, rows;
};
DEVICE_FUNCTION RowRun row_run(const RowView& view, int64_t row) {
  const int64_t outer = row < view.inner_rows ? 0 : row / view.inner_rows,
                inner = row - outer * view.inner_rows;
  return {outer * view.outer_stride + inner * view.inner_stride, view.inner_rows - inner};
}

}  // namespace xlstm::cuda
