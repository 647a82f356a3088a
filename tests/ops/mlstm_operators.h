#pragma once
// The internal mLSTM operators, through the dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>

#include "csrc/ops/mlstm_arguments.h"

namespace xlstm::test {

inline ops::MlstmResults forward_operator(const ops::MlstmArguments& a) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("xlstm::mlstm_chunkwise_forward", "")
                      .typed<decltype(ops::mlstm_kernel<forward_operator>)>();
  return op.call(a.q, a.k, a.v, a.igate, a.fgate, a.c0, a.n0, a.m0, a.reset, a.cu_seqlens,
                 a.input_gate, a.normalize, a.scale, a.eps, a.chunk_size);
}

inline ops::MlstmGradients backward_operator(const ops::MlstmBackwardArguments& a) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("xlstm::mlstm_chunkwise_backward", "")
                      .typed<decltype(ops::mlstm_backward_kernel<backward_operator>)>();
  const ops::MlstmArguments& in = a.in;
  return op.call(a.dh, a.dc, a.dn, in.q, in.k, in.v, in.igate, in.fgate, in.c0, in.n0, in.m0, a.h,
                 a.product, in.reset, in.cu_seqlens, in.input_gate, in.normalize, in.scale, in.eps,
                 in.chunk_size);
}

}  // namespace xlstm::test
