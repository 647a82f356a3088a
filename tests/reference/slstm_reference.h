#pragma once
// Oracle for the sLSTM and LSTM: one unit at a time in long double, straight from the equations, with no stabiliser
// tricks beyond m itself. Gradients by central differences of it, which need no formula of a backward pass.
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::reference {

using Real = long double;

/// All tensors contiguous: wx (B,T,4,NH,DH), r (4,NH,DH,DH), b (4,NH,DH), states (N,NH,DH) or empty, reset (B,T) or
/// empty, cu_seqlens or empty (then N = B).
struct SlstmProblem {
  std::string cell;
  int64_t batch, time, heads, dh;
  std::vector<Real> wx, r, b, y0, c0, n0, m0;
  std::vector<char> reset;
  std::vector<int64_t> cu_seqlens;
};

struct SlstmSolution {
  std::vector<Real> y, y_last, c, n, m;  // y (B,T,NH,DH)
};

SlstmSolution slstm(const SlstmProblem& problem);

}  // namespace xlstm::reference
