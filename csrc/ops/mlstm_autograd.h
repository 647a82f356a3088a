#pragma once
// What Functions around mlstm_chunkwise_forward share.
#include <torch/csrc/autograd/custom_function.h>

#include "csrc/ops/mlstm_arguments.h"

namespace xlstm::ops {

/// The operators mlstm_chunkwise_forward and mlstm_chunkwise_backward, through the dispatcher.
MlstmResults mlstm_forward_op(const MlstmArguments& a);
MlstmGradients mlstm_backward_op(const MlstmBackwardArguments& a);

/// Keeps in a node the arguments of mlstm_forward_op, h and product of its results, and `others`.
void save_mlstm(torch::autograd::AutogradContext* ctx, const MlstmArguments& a, const at::Tensor& h,
                const at::Tensor& product, const torch::autograd::variable_list& others = {});

struct SavedMlstm {
  MlstmArguments in;
  at::Tensor h, product;
  torch::autograd::variable_list others;

  /// Gradients of q, k, v, igate, fgate, c0, n0 and m0, undefined where those are absent. `grads`: of h, c and n,
  /// undefined where there is none.
  torch::autograd::variable_list gradients(const torch::autograd::variable_list& grads) const;
};
/// What save_mlstm kept; not to outlive the node.
SavedMlstm saved_mlstm(torch::autograd::AutogradContext* ctx);

}  // namespace xlstm::ops
