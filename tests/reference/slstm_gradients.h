#pragma once
// Gradients of the sLSTM and LSTM in float64 by backpropagation through time, straight from the equations with m constant.
// tests/simt/kernels_slstm_pointwise.cpp holds it against differences of the oracle in slstm_reference.h.
#include "tests/reference/slstm_reference.h"

namespace xlstm::reference {

/// Gradients of the results; y (B,T,NH,DH), the others (N,NH,DH), in units of the final e^m.
struct SlstmLoss {
  std::vector<double> y, y_last, c, n;
  double clip = 0;  ///< what y_{t-1} gets through the recurrence lies in [-clip, clip]; 0: anywhere
  bool cut = false;  ///< y_{t-1} gets nothing through the recurrence
};

/// Shapes as in SlstmProblem; those of absent initial states are computed as well (as if they were zero).
struct SlstmGradients {
  std::vector<double> wx, r, b, y0, c0, n0;
};

SlstmGradients slstm_gradients(const SlstmProblem& problem, const SlstmLoss& loss);

}  // namespace xlstm::reference
