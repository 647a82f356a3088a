#pragma once
#include "csrc/nn/layers.h"
#include "csrc/ops/mlstm.h"

namespace xlstm::nn {

/// Pre-activation of a sigmoid gate that is 1 in float64, too.
constexpr double kOpenGate = 100;

/// How a gate of the mLSTM comes about (the ablations of arXiv 2405.04517, table 2).
struct HeadGateOptions {
  std::string source = "input";  ///< "input": W x + b; "bias": b, learned; "fixed": b as it starts
  /// "normal": N(0, 0.1^2); "zeros"; "linspace": 3 to 6 over the heads; "open": so high that a sigmoid of it is 1
  std::string bias_init = "zeros";
};

/// Pre-activations of a gate with one number per head. weight (NH,I) and bias (NH) are parameters where the source needs
/// them, otherwise undefined. They start at zero: the owner calls init() when it is the bias' turn to be drawn.
class HeadGate : public torch::nn::Module {
 public:
  HeadGate(int64_t in_features, int64_t num_heads, const HeadGateOptions& options,
           at::Device device);
  void init();
  bool reads_input() const { return weight.defined(); }
  /// x (B,T,I) -> (B,T,NH). Where the gate does not read its input, only sizes, type and device of x count.
  at::Tensor forward(const at::Tensor& x) const;
  at::Tensor weight, bias;

 private:
  const HeadGateOptions options_;
  const int64_t num_heads_;
};

struct MlstmBlockOptions : BlockOptions {
  int64_t inner_dim =
      0;  ///< width u after the up-projection: a multiple of num_heads and of qkv_block_size
  int64_t num_heads = 4;
  int64_t conv_kernel_size = 4;  ///< 0: no convolution and no SiLU in front of q and k
  int64_t qkv_block_size = 4;
  bool bias = false;  ///< of proj_up, proj_down and q, k, v
  std::string input_gate = "exp";
  bool normalize = true;
  HeadGateOptions igate{"input", "normal"}, fgate{"input", "linspace"};
  double mlstm_eps = 1e-6;
  int64_t chunk_size = 0;
};

/// mLSTM with pre-up-projection (arXiv 2405.04517, figure 11):
///   [x, z] = up(u);  a = SiLU(conv(x));  q, k from a, v from x by block-diagonal maps;  i, f from (q, k, v)
///   y = down((headnorm(mlstm(q, k, v, i, f)) + skip * a) * SiLU(z))
/// State: conv window (B,W-1,u) ((B,0,u) without convolution), C, n, m.
class MlstmLayer : public torch::nn::Module {
 public:
  MlstmLayer(const MlstmBlockOptions& options, at::Device device);
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset);

 private:
  /// Whether ops::mlstm_gated computes gates and cell: where products are cheap and memory is not, and under autocast,
  /// which would round the pre-activations.
  bool gates_join_cell(const at::Tensor& q, const std::optional<at::Tensor>& reset) const;
  /// Whether ops::mlstm_step_inputs does what comes before the cell: of one token after a window, with both gates from
  /// (q, k, v) and projections of more than one block; not under autocast, whose types it does not have.
  bool inputs_are_a_step(const at::Tensor& x, const at::Tensor& window,
                         const std::optional<at::Tensor>& reset) const;
  ops::MlstmInputParameters input_parameters() const;
  /// What the cell and the norm behind it read, and what the next call takes.
  struct CellInputs {
    at::Tensor a, q, k, v;    ///< (B,T,u)
    at::Tensor igate, fgate;  ///< (B,T,NH) pre-activations; undefined where gates_join_cell
    at::Tensor window;        ///< of the convolution, behind the last token
  };
  /// Of inner features x (B,T,u), which follow those in `window`.
  CellInputs cell_inputs(const at::Tensor& x, const at::Tensor& window,
                         const std::optional<at::Tensor>& reset) const;
  /// Gate pre-activations (B,T,NH) from (q, k, v), the images of a and x.
  std::pair<at::Tensor, at::Tensor> gates(const at::Tensor& a, const at::Tensor& x,
                                          const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v) const;

  const MlstmBlockOptions options_;
  std::shared_ptr<Linear> proj_up_, proj_down_;
  std::shared_ptr<HeadGate> igate_, fgate_;
  std::shared_ptr<CausalConv1d> conv_;  ///< null without convolution
  std::shared_ptr<BlockLinear> q_proj_, k_proj_, v_proj_;
  std::shared_ptr<Norm> out_norm_;
  at::Tensor skip_;
};

/// x + mlstm(norm(x)).
class MlstmBlock : public Block {
 public:
  MlstmBlock(const MlstmBlockOptions& options, at::Device device);
  State advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) override;

 private:
  std::shared_ptr<Norm> norm_;
  std::shared_ptr<MlstmLayer> mlstm_;
};

struct MlstmCellOptions {
  std::string input_gate = "exp";
  bool normalize = true;
  double eps = 1e-6;
  int64_t chunk_size = 0;
  std::optional<double> scale = {};  ///< applied to q; default DQK^-1/2
};

/// The cell as every block uses it: a step operator where nothing needs a gradient, else the sequence operator.
/// q,k (B,T,NH,DQK) v (B,T,NH,DV) igate,fgate (B,T,NH); `cell` empty for the empty state.
/// Returns h (B,T,NH,DV) and {c, n, m}. Under an InPlaceStateGuard, whose owner keeps the state to itself, decoding steps
/// may return {c, n, m, keys, values, gates, count} instead: a state that lags behind an ops::MlstmRing. Given to any
/// other call, it is folded first.
Result mlstm_cell(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& igate, const at::Tensor& fgate, const State& cell,
                  const std::optional<at::Tensor>& reset, const MlstmCellOptions& options);
/// Throws c10::Error unless `state` is empty or holds a state of mlstm_cell and `others` more tensors.
void check_mlstm_state(const State& state, size_t others, const char* who);

}  // namespace xlstm::nn
