#pragma once
// Small modules shared by all blocks. Every parameter is float32 on `device` when built; Module::to changes that.
// Modules with memory take and return their state: forward(x, state, reset) -> (y, state), always new tensors.
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/nn/linear.h"

namespace xlstm::nn {

/// Tensors of one module in a fixed order. Empty: the state before the first token.
using State = std::vector<at::Tensor>;
using Result = std::pair<at::Tensor, State>;

class Norm;

/// A residual stream x (B,T,D). `fused`: what is added last waits for the norm that reads the stream next, which makes the
/// addition in its own pass.
class Residual {
 public:
  explicit Residual(at::Tensor x, bool fused = true) : x_(std::move(x)), fused_(fused) {}
  void add(const at::Tensor& branch);
  at::Tensor normed(const Norm& norm);
  at::Tensor sum();
  /// y takes the stream's place.
  void replace(at::Tensor y);

 private:
  at::Tensor x_, waiting_;  ///< the latter undefined where nothing waits
  bool fused_;
};

/// What the options of all blocks begin with; not every kind uses all of it.
struct BlockOptions {
  int64_t dim = 0;  ///< model width D
  double norm_eps = 1e-5;
  double dropout = 0;       ///< on what is added to the residual stream
  bool fused = true;        ///< several steps in one operator where there is one
  int64_t block_index = 0;  ///< position in the model; this and num_blocks decide first weights
  int64_t num_blocks = 1;   ///< of the whole model
};

/// The parameters of a block that has its own memory for them during its passes alone (nn::checkpoint()), as where each of
/// several processes holds a part of them.
class TransientParameters {
 public:
  virtual ~TransientParameters() = default;
  enum class Pass { kForward, kBackward };
  /// Before a pass: makes the parameters' memory and fills it. Calls may nest. What the pass of the model comes to next may be
  /// fetched ahead.
  virtual void fetch(Pass pass) = 0;
  /// After it.
  virtual void release() = 0;
  /// Takes the gradients of a backward pass, one for each of the block's parameters, undefined where it reached none. The
  /// parameters' own grad() stays undefined.
  virtual void take_gradients(const std::vector<at::Tensor>& gradients) = 0;
};

/// A residual block of a causal model.
class Block : public torch::nn::Module {
 public:
  /// Adds to the stream x (B,T,D), T >= 0, and returns the new state; reset (B,T) bool: the state is empty before that
  /// token. `state` is not modified.
  virtual State advance(Residual& x, const State& state,
                        const std::optional<at::Tensor>& reset) = 0;
  /// The block by itself.
  Result forward(const at::Tensor& x, const State& state, const std::optional<at::Tensor>& reset,
                 bool fused = true);
  /// Parameters that forward uses and another module owns.
  virtual std::vector<at::Tensor> outer_parameters() const { return {}; }
  /// Null where the parameters always have memory. Otherwise the block runs by nn::checkpoint() alone.
  std::shared_ptr<TransientParameters> transient;
};

/// First weights. These leave tensors on the meta device alone, and those that draw (all but linspace_init_) every tensor
/// while a SkipDrawing lives. Nothing else in modules draws weights.
void normal_init_(at::Tensor& tensor, double std);
/// N(0, 2 / (5 dim)): "Transformers without Tears", arXiv 1910.05895.
void small_init_(at::Tensor& tensor, int64_t dim);
/// N(0, (2 / (num_blocks sqrt(dim)))^2): the down-projections.
void wang_init_(at::Tensor& tensor, int64_t dim, int64_t num_blocks);
void uniform_init_(at::Tensor& tensor, double low, double high);
/// Between -bound and bound.
void uniform_init_(at::Tensor& tensor, double bound);
/// gain times a matrix with orthonormal rows or columns, whichever are fewer.
void orthogonal_init_(at::Tensor& tensor, double gain);
/// Evenly spaced from `first` to `last` along the last dimension.
void linspace_init_(at::Tensor& tensor, double first, double last);

/// For models that this thread makes in order to load their weights: large ones take longer to draw than to read, and a
/// caller's random stream does not notice.
class SkipDrawing {
 public:
  SkipDrawing();
  ~SkipDrawing();
  static bool lives();  ///< on this thread
  SkipDrawing(const SkipDrawing&) = delete;
  SkipDrawing& operator=(const SkipDrawing&) = delete;

 private:
  bool before_;
};

/// Block-diagonal linear map; weight (num_blocks, out, in) of each block, square blocks: one block is a full matrix.
/// Starts at zero.
class BlockLinear : public torch::nn::Module {
 public:
  BlockLinear(int64_t features, int64_t num_blocks, bool with_bias, at::Device device);
  at::Tensor forward(const at::Tensor& x) const;
  at::Tensor weight, bias;  ///< bias (features), undefined when absent
};

/// Norm over the last dimension; weight starts at one, bias at zero.
class Norm : public torch::nn::Module {
 public:
  /// kind "layer" | "rms".
  Norm(int64_t features, double eps, std::string kind, at::Device device, bool with_bias = false);
  /// x (...,D) -> (...,D).
  at::Tensor forward(const at::Tensor& x) const;
  at::Tensor weight, bias;  ///< bias undefined when absent
  const double eps;
  const std::string kind;
};

/// SiLU of a depthwise causal convolution; weight (C,W), bias (C); initialised as torch.nn.Conv1d. `fused`: SiLU within
/// the operator of the convolution.
class CausalConv1d : public torch::nn::Module {
 public:
  CausalConv1d(int64_t channels, int64_t kernel_size, bool fused, at::Device device);
  /// x (B,T,C), window (B,W-1,C) or undefined -> y (B,T,C) and the new window.
  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& window,
                                            const std::optional<at::Tensor>& reset) const;
  at::Tensor weight, bias;
  const bool fused;
};
/// CausalConv1d::forward of a layer that may have none (null): then x itself and a window without tokens (B,0,C).
std::pair<at::Tensor, at::Tensor> convolved(const std::shared_ptr<CausalConv1d>& conv,
                                            const at::Tensor& x, const at::Tensor& window,
                                            const std::optional<at::Tensor>& reset);

struct FeedForwardOptions {
  int64_t dim = 0;
  int64_t hidden_dim = 0;
  int64_t num_blocks = 1;       ///< of the whole model, for the initialisation
  std::string act_fn = "gelu";  ///< "gelu" (erf) | "silu" | "relu" | "relu2" (ReLU squared)
  bool bias = false;
  bool gated = true;
};

/// Gated MLP down(act(gate) * up): proj_up.weight holds the gate's rows first. Without gate down(act(up)).
class FeedForward : public torch::nn::Module {
 public:
  FeedForward(const FeedForwardOptions& options, at::Device device);
  at::Tensor forward(const at::Tensor& x) const;

 private:
  const std::string act_fn_;
  const bool gated_;
  std::shared_ptr<Linear> proj_up_, proj_down_;
};

/// act(x) for "gelu" | "silu" | "relu" | "relu2". Throws c10::Error for another name.
at::Tensor activation(const at::Tensor& x, const std::string& act_fn);
/// Input and forget gate pre-activations by one product: x (...,I) -> two (...,NH) views of one tensor. `Gate` has a
/// weight (NH,I) and a bias (NH).
template <class Gate>
std::pair<at::Tensor, at::Tensor> gate_pair(const at::Tensor& x, const Gate& igate,
                                            const Gate& fgate) {
  const auto gates =
      at::linear(x, at::cat({igate.weight, fgate.weight}), at::cat({igate.bias, fgate.bias}))
          .chunk(2, -1);
  return {gates[0], gates[1]};
}
struct GatedNormOptions {
  double eps = 1e-5;
  std::string kind = "layer";  ///< "layer" | "rms"
  std::string act = "silu";    ///< "silu" | "sigmoid"
  bool fused = true;           ///< ops::headwise_norm in one pass, else in steps
};
/// (norm(h) * weight + bias + skip_weight * skip) * act(gate), the norm over each head: h (B,T,NH,DV), skip and gate
/// (B,T,NH*DV), the others (NH*DV); but for h and gate undefined where absent.
at::Tensor gated_norm(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& gate, const GatedNormOptions& options,
                      const at::Tensor& skip = {}, const at::Tensor& skip_weight = {});
/// Dropout in training mode with p > 0, otherwise x itself.
at::Tensor apply_dropout(const at::Tensor& x, double p, bool training);
/// True when one token is to be decoded and nothing needs a gradient: the step operators may be used.
bool is_decode_step(const at::Tensor& x, const std::optional<at::Tensor>& reset);
/// While one lives, decoding steps of this thread write the new state over the given one where they can, instead of
/// into a copy: for a caller that owns its state and does not look back. What comes back may be the same tensors, and
/// mLSTM cells may let their states lag behind a ring of tokens (mlstm_cell), where `lazy_fold` says so or, if it is
/// absent, ops::mlstm_step_lazy_pays.
class InPlaceStateGuard {
 public:
  explicit InPlaceStateGuard(std::optional<bool> lazy_fold = {});
  ~InPlaceStateGuard();
  InPlaceStateGuard(const InPlaceStateGuard&) = delete;
  InPlaceStateGuard& operator=(const InPlaceStateGuard&) = delete;
  /// The innermost one that lives on this thread, or null.
  static const InPlaceStateGuard* current();
  std::optional<bool> lazy_fold() const { return lazy_fold_; }

 private:
  const InPlaceStateGuard* before_;
  std::optional<bool> lazy_fold_;
};
/// A tensor as an optional argument of an operator: absent where it is undefined.
std::optional<at::Tensor> given(const at::Tensor& tensor);
/// What a decoding step may write to: the tensor itself under an InPlaceStateGuard, else a copy of it.
at::Tensor writable_state(const at::Tensor& state);
/// Throws c10::Error unless `state` is empty or holds `expected` tensors; `who` names the module.
void check_state(const State& state, size_t expected, const char* who);
/// state[i], undefined where the state is empty.
at::Tensor state_at(const State& state, size_t i);
/// given() of it.
std::optional<at::Tensor> optional_state(const State& state, size_t i);

}  // namespace xlstm::nn
