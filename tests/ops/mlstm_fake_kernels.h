#pragma once
// A stand-in for the kernels behind cuda/mlstm/mlstm.h on CPU memory: reads and writes every view and pointer of a call
// and computes with csrc/ops/mlstm_generic.h. It shows that the glue in csrc/ops/mlstm_kernels.cpp hands over the right
// addresses, strides and options; the kernels themselves are tested in tests/simt.

namespace xlstm::test {

/// What the next launch does: nothing special, or fail.
inline bool fail_launch = false;

}  // namespace xlstm::test
