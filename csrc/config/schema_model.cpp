#include "csrc/config/schema_fields.h"
#include "csrc/models/model_kinds.h"

namespace xlstm::config {
namespace {

std::vector<std::string> kind_choices() {
  std::vector<std::string> choices;
  for (const models::ModelKind& kind : models::kModelKinds) choices.emplace_back(kind.name);
  return choices;
}

bool has_slstm(const Config& config) { return !config.model.slstm_at.empty(); }

bool has_mlstm(const Config& config) {
  const auto& model = config.model;
  return model.kind == "xlstm_large" ||
         (model.kind == "xlstm" && static_cast<int64_t>(model.slstm_at.size()) < model.num_blocks);
}

/// Settings, or all of a section, that models without something take all the same, since configurations share them. Heads
/// are none of these: comparisons give all kinds the same number.
struct Rule {
  std::string_view name;
  Condition condition;
};
constexpr Rule kRules[] = {
    {"model.add_embedding_dropout",
     {[](const Config& config) { return config.model.dropout > 0; }, "model.dropout is 0"}},
    {"model.chunk_size",
     {[](const Config& config) {
        const std::string& kind = config.model.kind;
        return has_mlstm(config) || kind == "linear_attention" || kind == "retnet";
      },
      "there is no mLSTM cell"}},
    {"model.mlstm_eps",
     {[](const Config& config) { return has_mlstm(config) && config.model.mlstm.normalize; },
      "there is no mLSTM cell with a normaliser"}},
    {"model.lora.alpha",
     {[](const Config& config) { return config.model.lora.rank > 0; }, "model.lora.rank is 0"}},
    {"model.mlstm", {has_mlstm, "there is no mLSTM block"}},
    {"model.slstm", {has_slstm, "there is no sLSTM block"}},
    {"model.feed_forward",
     {[](const Config& config) {
        const auto& model = config.model;
        return model.kind != "xlstm" || has_slstm(config) || model.mlstm.up_projection == "post";
      },
      "there is no block with a feed-forward layer"}},
};

std::vector<Field> with_conditions(std::vector<Field> fields) {
  for (Field& field : fields)
    for (const Rule& rule : kRules)
      if (field.name == rule.name || parent_of(field.name) == rule.name)
        field.has_effect = rule.condition;
  return fields;
}

}  // namespace

/// All of them identities of a run, unless it is said beside one that it may change.
std::vector<Field> model_fields() {
  return with_conditions({
      XLSTM_FIELD(
          model.kind, one_of(kind_choices()),
          "xlstm: blocks of arXiv 2405.04517; xlstm_large: the 7B block of arXiv 2503.13427; the "
          "others: what they are compared with"),
      XLSTM_FIELD(model.vocab_size, integers(1, kMaxSize), "token ids are 0 .. vocab_size-1"),
      XLSTM_FIELD(model.input_features, integers(0, kMaxSize),
                  "reads real vectors of this width instead of tokens, as the tasks nns and "
                  "rgb_image ask for; predicts one number if vocab_size is 1; 0: tokens"),
      XLSTM_FIELD(model.embedding_dim, integers(1, kMaxSize), "width of the residual stream"),
      XLSTM_FIELD(model.num_blocks, integers(1, 10000), "residual blocks"),
      XLSTM_FIELD(model.num_heads, integers(1, 65536), "heads of every cell"),
      XLSTM_FIELD(model.tie_weights, any(), "the output head shares the embedding's weight"),
      may_change(XLSTM_FIELD(model.embedding_init_std, at_least(0),
                             "standard deviation of the embedding's first weights; 0: "
                             "sqrt(2 / (5 embedding_dim))")),
      XLSTM_FIELD(model.output_logit_soft_cap, at_least(0), "c in c*tanh(logits/c); 0: none"),
      may_change(XLSTM_FIELD(model.dropout, at_least_below(0, 1),
                             "probability of dropping a value in training")),
      may_change(
          XLSTM_FIELD(model.add_embedding_dropout, any(), "dropout behind the embedding too")),
      XLSTM_FIELD(model.add_out_norm, any(), "norm after the last block"),
      XLSTM_FIELD(model.norm_eps, above(0), "epsilon of all norms"),
      may_change(XLSTM_FIELD(model.activation_checkpointing, any(),
                             "recompute each block in the backward pass: less memory, more time")),
      may_change(XLSTM_FIELD(
          model.chunk_size, integers(0, 65536),
          "length of an mLSTM chunk; 0: automatic; never changes the result beyond rounding")),
      may_change(XLSTM_FIELD(
          model.fused, any(),
          "false: convolution, SiLU, norm, skip, gate, head and loss one after the other "
          "instead of in fused operators, to compare with; all logits are held; "
          "changes the result by rounding alone")),
      XLSTM_FIELD(model.mlstm_eps, at_least(0), "epsilon of the mLSTM normaliser"),
      XLSTM_FIELD(model.lora.rank, integers(0, 65536),
                  "low-rank adapters (LoRA) of this rank beside the large linear maps, and they "
                  "alone are trained; wants train.init_from; 0: none"),
      XLSTM_FIELD(model.lora.alpha, above(0), "they count alpha / rank"),
      XLSTM_FIELD(model.lora.base, one_of({"float32", "bfloat16", "int8"}),
                  "what the weights beside them, which nothing trains, are kept in; int8: 8 bits, "
                  "one scale per row (QLoRA); the adapters are float32"),
      XLSTM_FIELD(model.max_positions, integers(1, kMaxSize),
                  "kind gpt: learned positions, the longest sequence"),
      XLSTM_FIELD(model.state_size, integers(2, 65536),
                  "kind h3: states of each SSM, an even number (embedding_dim^2 / num_heads "
                  "sequences go through them)"),
      XLSTM_FIELD(model.filter_length, integers(1, kMaxSize),
                  "kind hyena: the filter's unit of time in tokens, as long as what it is trained "
                  "on; longer sequences work"),
      XLSTM_FIELD(model.slstm_at, integers(0, 9999),
                  "kind xlstm: 0-based positions of the sLSTM blocks"),
      XLSTM_FIELD(model.bias, any(),
                  "kind xlstm: biases of all up- and down-projections and of q, k, v"),
      XLSTM_FIELD(model.qk_dim_factor, above_up_to(0, 1000),
                  "kind xlstm_large: width of queries and keys / embedding_dim"),
      XLSTM_FIELD(model.v_dim_factor, above_up_to(0, 1000),
                  "kind xlstm_large: width of values / embedding_dim"),
      XLSTM_FIELD(model.gate_soft_cap, at_least(0),
                  "kind xlstm_large: soft cap of the gates' pre-activations; 0: none"),
      XLSTM_FIELD(
          model.mlstm.up_projection, one_of({"pre", "post"}),
          "pre: the block widens in front of the cell; post: q, k, v, o at embedding_dim by "
          "full matrices, and a feed-forward layer behind"),
      XLSTM_FIELD(model.mlstm.proj_factor, above_up_to(0, 1000),
                  "width of the up-projection / embedding_dim"),
      XLSTM_FIELD(model.mlstm.round_proj_up_to_multiple_of, integers(1, kMaxSize),
                  "that width is rounded up to this"),
      XLSTM_FIELD(model.mlstm.conv1d_kernel_size, zero_or_integers(2, 8),
                  "window of the causal convolution; 0: no convolution"),
      XLSTM_FIELD(model.mlstm.qkv_proj_blocksize, integers(1, kMaxSize),
                  "block size of the block-diagonal projections to q, k and v"),
      XLSTM_FIELD(model.mlstm.input_gate, one_of({"exp", "sigmoid"}),
                  "activation of the input gate"),
      XLSTM_FIELD(model.mlstm.normalize, any(), "divide by the normaliser state"),
      XLSTM_FIELD(model.mlstm.igate, one_of({"input", "bias", "fixed"}),
                  "input gate before its activation: input: W x + b; bias: b, learned; fixed: b as "
                  "it starts"),
      XLSTM_FIELD(model.mlstm.igate_bias_init, one_of({"normal", "zeros"}),
                  "its b: normal: N(0, 0.1^2); zeros (the one that fixed takes)"),
      XLSTM_FIELD(model.mlstm.fgate, one_of({"input", "bias", "fixed"}),
                  "forget gate before its sigmoid, as igate"),
      XLSTM_FIELD(
          model.mlstm.fgate_bias_init, one_of({"linspace", "open"}),
          "its b: linspace: 3 to 6 over the heads; open: nothing is forgotten (fixed only)"),
      XLSTM_FIELD(model.slstm.conv1d_kernel_size, zero_or_integers(2, 8),
                  "window of the causal convolution; 0: no convolution"),
      XLSTM_FIELD(model.slstm.cell, one_of({"slstm", "slstm_expf", "lstm"}),
                  "slstm; slstm_expf: exponential forget gate; lstm: the classic cell"),
      XLSTM_FIELD(
          model.slstm.gate_proj, one_of({"headwise", "dense"}),
          "matrices from the input to the four gates: headwise: block-diagonal; dense: full"),
      may_change(XLSTM_FIELD(model.slstm.bias_init,
                             one_of({"powerlaw_blockdependent", "small_init", "zeros", "standard"}),
                             "initialisation of the forget gate's bias")),
      may_change(XLSTM_FIELD(model.slstm.recurrent_weight_init, one_of({"zeros", "standard"}),
                             "initialisation of the recurrent weights")),
      may_change(
          XLSTM_FIELD(model.slstm.recompute, any(),
                      "compute the gates again in the backward pass: same values, less memory with "
                      "bfloat16, more time")),
      may_change(
          XLSTM_FIELD(model.slstm.recurrent_clip, at_least(0),
                      "bound of every entry of the gradient that flows back through the recurrent "
                      "weights into the previous output (often 10); 0: none")),
      may_change(
          XLSTM_FIELD(model.slstm.recurrent_cut, any(),
                      "no gradient flows back through the recurrent weights (they still learn)")),
      XLSTM_FIELD(model.feed_forward.proj_factor, above_up_to(0, 1000),
                  "width of the feed-forward layer / embedding_dim"),
      XLSTM_FIELD(model.feed_forward.round_up_to_multiple_of, integers(1, kMaxSize),
                  "that width is rounded up to this"),
      XLSTM_FIELD(model.feed_forward.act_fn, one_of({"gelu", "silu", "relu", "relu2"}),
                  "kind xlstm: activation (the others have a fixed one); relu2: ReLU squared"),
      XLSTM_FIELD(model.feed_forward.gated, any(),
                  "kind xlstm: act(gate) * up in front of the last matrix; false: act(up)"),
  });
}

}  // namespace xlstm::config
