#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "csrc/models/model_options.h"
#include "csrc/nn/hgrn.h"

namespace xlstm::models {

/// State of one block: its tensors in a fixed order (mLSTM: conv window, C, n, m; sLSTM: conv window, y, c, n, m;
/// 7B block: C, n, m). An empty vector is the state before the first token.
using BlockState = std::vector<at::Tensor>;
/// One entry per block; an empty vector is the state before the first token.
using ModelState = std::vector<BlockState>;

/// Throws c10::Error unless the state is of so many sequences, or empty.
void check_sequences(const ModelState& state, int64_t batch);

/// What the residual stream holds behind blocks that a caller names before the call, which fills it in.
struct BlockOutputs {
  /// Throws c10::IndexError for a position that is not from 0 to num_blocks - 1.
  void check(int64_t num_blocks) const;

  std::vector<int64_t> blocks;      ///< positions, in any order
  std::vector<at::Tensor> vectors;  ///< (B,T,D) of each, in the same order
};

/// Where the tokens before and behind those of a pass are computed elsewhere: takes the state that each block begins with, and
/// gives the one it ends with, to autograd as to the reader.
class StateRelay {
 public:
  virtual ~StateRelay() = default;
  /// Of so many sequences; empty at their beginning.
  virtual BlockState receive(int64_t block, int64_t sequences) = 0;
  virtual void send(int64_t block, const BlockState& state) = 0;
};

/// The blocks of a model and the norm behind them: vectors in, vectors out. Parts: lower_bounds (hgrn, hgrn2), blocks,
/// out_norm (with the option add_out_norm). Of the options those of embedding and head do not count.
class BlockStack : public torch::nn::Module {
 public:
  /// Takes options that have been checked; make_block_stack checks them.
  BlockStack(const ModelOptions& options, at::Device device);

  /// x (B,T,D), T >= 0 -> (B,T,D) and the state after the last token, always new tensors. reset (B,T) bool: the state is
  /// empty before that token. lengths (B) int64: see read_padded. outputs: what is wanted of single blocks, or null.
  std::pair<at::Tensor, ModelState> forward(const at::Tensor& x, const ModelState& state = {},
                                            const std::optional<at::Tensor>& reset = {},
                                            const std::optional<at::Tensor>& lengths = {},
                                            BlockOutputs* outputs = nullptr);
  /// Throws c10::Error unless the state has an entry for each block or none, of so many sequences, and reset is bool of the
  /// size (batch, length).
  void check(int64_t batch, int64_t length, const ModelState& state,
             const std::optional<at::Tensor>& reset) const;
  const ModelOptions& options() const { return options_; }
  /// Null where a pass has the state that it is given. Not owned.
  StateRelay* relay = nullptr;

 private:
  /// Throws c10::Error where what a block was given is no state of its own for vectors like x.
  void explain(size_t position, const BlockState& state, const at::Tensor& x);

  const ModelOptions options_;
  std::shared_ptr<nn::LowerBounds> bounds_;  ///< hgrn, hgrn2
  std::vector<std::shared_ptr<nn::Block>> blocks_;
  std::shared_ptr<nn::Norm> out_norm_;  ///< null without
};

/// Builds and initialises a stack, as make_language_model does.
std::shared_ptr<BlockStack> make_block_stack(const ModelOptions& options,
                                             at::Device device = at::kCPU);

}  // namespace xlstm::models
