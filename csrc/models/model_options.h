#pragma once
// What a language model looks like: plain values, no torch header (the configuration layer reads them).
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::models {

struct ModelOptions {
  /// "xlstm": blocks of arXiv 2405.04517; "xlstm_large": the 7B block of arXiv 2503.13427; the others of model_kinds.h:
  /// what they are compared with
  std::string kind = "xlstm";
  int64_t vocab_size = 256;
  /// > 0: reads real vectors of this width instead of tokens; with vocab_size 1 predicts numbers, too
  int64_t input_features = 0;
  int64_t embedding_dim = 128;
  int64_t num_blocks = 4;
  int64_t num_heads = 4;
  bool tie_weights = false;          ///< the head shares the embedding's weight
  double embedding_init_std = 0;     ///< of its first weights; 0: sqrt(2 / (5 embedding_dim))
  double output_logit_soft_cap = 0;  ///< c * tanh(logits / c); 0: none (7B: 30)
  double dropout = 0;
  bool add_embedding_dropout = false;
  bool add_out_norm = true;               ///< norm after the last block
  double norm_eps = 1e-5;                 ///< pre-norms, out norm, head-wise norms (7B: 1e-6)
  bool activation_checkpointing = false;  ///< recompute each block in the backward pass
  int64_t chunk_size = 0;   ///< mLSTM chunk length; 0: automatic; changes rounding alone
  bool fused = true;        ///< operators that do several steps at once; changes rounding alone
  double mlstm_eps = 1e-6;  ///< epsilon of the mLSTM normaliser
  struct Lora {
    int64_t rank = 0;  ///< > 0: low-rank adapters of the linear maps are trained, and nothing else
    double alpha = 16;
    std::string base = "float32";  ///< of the weights beside them | "bfloat16" | "int8"
  } lora;

  // kind "gpt"
  int64_t max_positions = 2048;  ///< learned positions; longer sequences are an error

  // kind "h3"
  int64_t state_size =
      64;  ///< taps of the shift SSM; the diagonal one has half as many complex states

  // kind "hyena"
  int64_t filter_length =
      2048;  ///< tokens over which the filter's slowest wave turns once; no limit

  // kind "xlstm"
  std::vector<int64_t> slstm_at;  ///< 0-based positions of sLSTM blocks; all others are mLSTM
  bool bias = false;  ///< biases of all up- and down-projections and of the mLSTM's q, k and v
  struct Mlstm {
    std::string up_projection = "pre";  ///< "pre": within the block; "post": a feed-forward behind
    double proj_factor = 2.0;
    int64_t round_proj_up_to_multiple_of = 64;
    int64_t conv1d_kernel_size = 4;  ///< 0: no convolution
    int64_t qkv_proj_blocksize = 4;
    std::string input_gate = "exp";  ///< "exp" | "sigmoid"
    bool normalize = true;
    /// What a gate's pre-activation is: "input": W x + b; "bias": b, learned; "fixed": b as it starts
    std::string igate = "input";
    std::string fgate = "input";
    std::string igate_bias_init = "normal";    ///< N(0, 0.1^2) | "zeros"
    std::string fgate_bias_init = "linspace";  ///< 3 to 6 over the heads | "open": f = 1
  } mlstm;
  struct Slstm {
    int64_t conv1d_kernel_size = 4;                     ///< 0: no convolution
    std::string cell = "slstm";                         ///< "slstm" | "slstm_expf" | "lstm"
    std::string gate_proj = "headwise";                 ///< W of the four gates; | "dense"
    std::string bias_init = "powerlaw_blockdependent";  ///< | "small_init" | "zeros" | "standard"
    std::string recurrent_weight_init = "zeros";        ///< | "standard"
    bool recompute =
        false;  ///< compute the gates again in the backward pass: same values, less memory with bfloat16
    double recurrent_clip =
        0;  ///< bound of each entry of the gradient through the recurrence; 0: none
    bool recurrent_cut = false;  ///< no gradient through the recurrence: changes training
  } slstm;
  struct FeedForward {
    double proj_factor = 1.3;  ///< sLSTM block; rounded up to a multiple (7B: 2.667, SwiGLU)
    int64_t round_up_to_multiple_of = 64;
    std::string act_fn = "gelu";  ///< "gelu" (erf) | "silu" | "relu" | "relu2" (ReLU squared)
    bool gated = true;            ///< down(act(gate) * up) or down(act(up))
  } feed_forward;

  // kind "xlstm_large"
  double qk_dim_factor = 0.5;
  double v_dim_factor = 1.0;
  double gate_soft_cap = 15.0;  ///< input and forget gate pre-activations; 0: none
};

/// The same model with every weight in float32, of as many elements as it has numbers.
inline ModelOptions unrounded(ModelOptions options) {
  options.lora.base = "float32";
  return options;
}

/// Whether the outputs are numbers, judged by their squared error; else they are logits of tokens.
inline bool predicts_numbers(const ModelOptions& options) {
  return options.input_features > 0 && options.vocab_size == 1;
}

}  // namespace xlstm::models
