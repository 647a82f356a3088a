#pragma once
// The mLSTM, one token after another in float64, with its gradients by the chain rule through the recurrence. Written
// from the definition alone (arXiv 2405.04517, eq. 19-27; the stabiliser is a constant of the backward pass).
#include <cstdint>
#include <vector>

namespace xlstm::reference {

struct MlstmInput {
  int64_t length = 0, dqk = 0, dv = 0;
  std::vector<double> q, k, v, igate, fgate;  // (T,DQK), (T,DQK), (T,DV), (T), (T)
  std::vector<double> c0, n0;                 // (DQK,DV), (DQK)
  double m0 = 0;
  std::vector<bool> reset;  // (T): the state is empty before that token; may be empty: none
  bool sigmoid_input_gate = false, normalize = true;
  double scale = 1, eps = 0;
};

struct MlstmOutput {
  std::vector<double> h, c, n;
  std::vector<double> norm;     // (T): what the numerator of h is divided by
  std::vector<double> product;  // (T): scale q . n
  double m = 0;
};

struct MlstmGradients {
  std::vector<double> q, k, v, igate, fgate, c0, n0;
};

/// One head of one sequence.
MlstmOutput mlstm_forward(const MlstmInput& in);

/// Gradients of sum(dh h) + sum(dc c) + sum(dn n).
MlstmGradients mlstm_backward(const MlstmInput& in, const std::vector<double>& dh,
                              const std::vector<double>& dc, const std::vector<double>& dn);

}  // namespace xlstm::reference
