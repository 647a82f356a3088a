#include "train/activation_memory.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>

#include "csrc/models/language_model.h"
#include "csrc/models/model_kinds.h"
#include "train/schedule.h"

namespace xlstm::train {
namespace {

/// Numbers that the backward pass of a block waits for, per token.
struct Kept {
  double wide = 0;    ///< float32 whatever train.dtype is: the residual stream, gates, states, FFTs
  double narrow = 0;  ///< in train.dtype
  /// bfloat16 alone: autocast casts a float32 input anew for each product that reads it, and all but one of the copies
  /// come on top of what float32 keeps.
  double copies = 0;

  Kept operator+(const Kept& other) const {
    return {wide + other.wide, narrow + other.narrow, copies + other.copies};
  }
};

/// What the counts depend on. D, F: embedding_dim, width of the feed-forward layer.
struct Sizes {
  Sizes(const config::Config& config, bool on_gpu)
      : model(config.model),
        kind(models::kind_named(config.model.kind)),
        bf16(config.train.dtype == "bfloat16"),
        gpu(on_gpu),
        documents(config.data.reset_state_at_document),
        stepwise(config.model.fused ? 0 : 1),
        length(static_cast<double>(config.data.seq_len)),
        dim(static_cast<double>(config.model.embedding_dim)),
        heads(static_cast<double>(config.model.num_heads)) {
    const auto built = models::make_language_model(models::unrounded(config.model), at::kMeta);
    for (const auto& item : built->named_parameters()) {
      if (item.value().dim() != 2) continue;
      // blocks.3.ffn.proj_up.weight -> ffn.proj_up.weight; blocks of one name are alike
      const size_t number = item.key().find('.'), name = item.key().find('.', number + 1);
      if (name != std::string::npos) weights[item.key().substr(name + 1)] = item.value();
    }
  }
  double inputs_of(const std::string& weight) const {
    return static_cast<double>(weights.at(weight).size(1));
  }
  double outputs_of(const std::string& weight) const {
    return static_cast<double>(weights.at(weight).size(0));
  }
  bool drops() const { return model.dropout > 0; }

  const models::ModelOptions& model;
  const models::ModelKind& kind;
  const bool bf16, gpu, documents;
  const double stepwise;  ///< 1 where a fused operator's steps are taken one by one and keep more
  const double length, dim, heads;
  std::map<std::string, at::Tensor> weights;
};

// Feed-forward layers with the norm in front of them; `hidden`: their weight behind the activation.

Kept swiglu(const Sizes& s, const char* hidden) {
  return {s.dim, s.dim + 4 * s.inputs_of(hidden), s.dim};
}
Kept plain_feed_forward(const Sizes& s) {
  return {s.dim, s.dim + 2 * s.inputs_of("ffn.proj_down.weight")};
}
Kept xlstm_feed_forward(const Sizes& s) {
  const auto& options = s.model.feed_forward;
  const double each = options.gated ? 4 : options.act_fn == "relu" ? 1 : 2;
  return {s.dim, s.dim + each * s.inputs_of("ffn.proj_down.weight")};
}

Kept mlstm_block(const Sizes& s) {
  const auto& options = s.model.mlstm;
  const double conv = options.conv1d_kernel_size > 0 ? 1 : 0,
               inner = s.inputs_of("mlstm.proj_down.weight");
  const bool igate = options.igate == "input", fgate = options.fgate == "input";
  // q, k and v side by side, for gates that read them; a fused model does without where both do.
  const bool concatenated = igate && fgate ? !s.model.fused : igate || fgate;
  return {s.dim + 3 * s.heads + s.stepwise * inner,
          s.dim + (7 + conv + (concatenated ? 3 : 0) + s.stepwise * (1 + conv)) * inner};
}

Kept post_mlstm_block(const Sizes& s) {
  const double conv = s.model.mlstm.conv1d_kernel_size > 0 ? 1 : 0;
  return Kept{s.dim * (1 + conv * (1 + s.stepwise)) + 3 * s.heads, (7 + s.stepwise) * s.dim,
              4 * s.dim} +
         xlstm_feed_forward(s);
}

Kept slstm_block(const Sizes& s) {
  const auto& options = s.model.slstm;
  const double conv = options.conv1d_kernel_size > 0 ? 1 : 0,
               states = options.cell == "lstm" ? 2 : 3;
  const double gates = 4 * s.dim;  // pre-activations, or activated, or what they are computed from
  Kept kept{s.dim * (1 + conv * (1 + s.stepwise) + states / 16), 2 * s.dim, 3 * s.dim};
  (options.recompute ? kept.narrow : kept.wide) += gates;
  return kept + xlstm_feed_forward(s);
}

Kept xlstm_large_block(const Sizes& s) {
  const double keys = s.outputs_of("mlstm_layer.q.weight"),
               values = s.inputs_of("mlstm_layer.out_proj.weight");
  const double capped = s.model.gate_soft_cap > 0 ? 2 * s.heads : 0;
  return Kept{s.dim + 3 * s.heads, s.dim + capped + 2 * keys + (4 + s.stepwise) * values,
              4 * s.dim} +
         swiglu(s, "ffn.proj_down.weight");
}

/// y, four gates, and one state in 16.
Kept lstm_cell(const Sizes& s) { return {s.dim * (4 + 2.0 / 16), s.dim}; }
Kept lstm_block(const Sizes& s) { return lstm_cell(s) + Kept{s.dim, s.dim}; }

/// Which keys a query sees is a matrix of numbers for attention: a row for each token.
Kept attention(const Sizes& s) {
  return {s.dim + s.heads, 5 * s.dim + (s.documents ? s.length : 0), 2 * s.dim};
}
Kept llama_block(const Sizes& s) {
  return attention(s) + Kept{2 * s.dim / s.heads, s.dim} + swiglu(s, "ffn.proj_down.weight");
}
Kept gpt_block(const Sizes& s) { return attention(s) + plain_feed_forward(s); }

Kept mamba_block(const Sizes& s) {
  const double inner = s.inputs_of("out_proj.weight");
  Kept kept{s.dim, s.dim + (8 + s.stepwise) * inner + s.outputs_of("x_proj.weight")};
  if (s.gpu) kept.wide += 2 * inner, kept.narrow -= 2 * inner;  // there softplus is in float32
  return kept;
}

Kept rwkv4_block(const Sizes& s) {
  return {6 * s.dim, 12 * s.dim + 2 * s.inputs_of("ffn_value.weight")};
}
Kept rwkv5_block(const Sizes& s) {
  return {6 * s.dim, (14 + 2 * s.stepwise) * s.dim + 2 * s.inputs_of("ffn_value.weight")};
}
Kept rwkv6_block(const Sizes& s) {
  return {14 * s.dim, (16 + 2 * s.stepwise) * s.dim + s.outputs_of("mix.down.weight") +
                          s.outputs_of("decay_down.weight") + 2 * s.inputs_of("ffn_value.weight")};
}

// What takes attention's place, with the norm in front of it.

Kept linear_attention(const Sizes& s) {
  return {s.dim + s.heads, 8 * s.dim + 3 * s.heads, 2 * s.dim};
}
Kept retention(const Sizes& s) {
  return {s.dim + 2 * s.dim / s.heads + s.heads, (11 + 4 * s.stepwise) * s.dim, 3 * s.dim};
}
Kept gated_linear_attention(const Sizes& s) {
  return {2.5 * s.dim, (6 + 2 * s.stepwise) * s.dim + s.outputs_of("mixer.decay_down.weight"),
          4 * s.dim};
}
Kept hgrn(const Sizes& s) { return {6 * s.dim, (5 + 2 * s.stepwise) * s.dim, 3 * s.dim}; }
Kept hgrn2(const Sizes& s) { return {7 * s.dim, 6 * s.dim, 2 * s.dim}; }

/// Numbers per token in the padded transform of a sequence, which csrc/nn/long_convolution.cpp makes: 2^a or 3 * 2^a.
double transformed(const Sizes& s, double padding) {
  double size = 4;
  while (size < 2 * s.length + padding) size *= 2;
  if (size / 4 * 3 >= 2 * s.length + padding) size = size / 4 * 3;
  return size / s.length;
}
/// Input and product of the transforms of the shift, of every product of a key and a value, these products themselves.
Kept h3(const Sizes& s) {
  const double products = s.dim * s.dim / s.heads;
  const double shift = transformed(s, 2 * static_cast<double>(s.model.state_size - 1) - 1);
  return {s.dim * (5 + 2 * shift) + products * (2 + 2 * transformed(s, -1)), 2 * s.dim, 2 * s.dim};
}
Kept hyena(const Sizes& s) { return {s.dim * (6 + 2 * transformed(s, -1)), 5 * s.dim}; }

using Count = std::function<Kept(const Sizes&)>;

Count with_swiglu(Kept (*mixer)(const Sizes&)) {
  return [mixer](const Sizes& s) { return mixer(s) + swiglu(s, "ffn.proj_down.weight"); };
}

Kept block_of(const Sizes& s, bool slstm) {
  static const std::map<std::string, Count> counts = {
      {"xlstm_large", xlstm_large_block},
      {"lstm", lstm_cell},
      {"lstm_residual", lstm_block},
      {"lstm_block", [](const Sizes& t) { return lstm_block(t) + plain_feed_forward(t); }},
      {"llama", llama_block},
      {"gpt", gpt_block},
      {"mamba", mamba_block},
      {"rwkv4", rwkv4_block},
      {"rwkv5", rwkv5_block},
      {"rwkv6", rwkv6_block},
      {"linear_attention", with_swiglu(linear_attention)},
      {"retnet", with_swiglu(retention)},
      {"gla", with_swiglu(gated_linear_attention)},
      {"hgrn", with_swiglu(hgrn)},
      {"hgrn2", with_swiglu(hgrn2)},
      {"h3", with_swiglu(h3)},
      {"hyena", with_swiglu(hyena)}};
  if (s.model.kind != "xlstm") return counts.at(s.model.kind)(s);
  if (slstm) return slstm_block(s);
  return s.model.mlstm.up_projection == "post" ? post_mlstm_block(s) : mlstm_block(s);
}

/// Masks of dropout.
Kept dropped(const Sizes& s) { return {0, s.drops() ? s.kind.dropped_branches * s.dim : 0}; }

/// Bytes that the loss keeps of a token's logits where all are held at once, in float32; else 0.
double logits_bytes(const Sizes& s) {
  const bool held = !s.model.fused || models::predicts_numbers(s.model);
  const double copies = s.model.output_logit_soft_cap > 0 ? 2 : 1;
  return held ? 4 * copies * static_cast<double>(s.model.vocab_size) : 0;
}

/// Tokens and what lies outside of the blocks: the last norm, the head and the loss.
double bytes_around(const Sizes& s, double narrow_bytes) {
  const double tokens =
      s.model.input_features > 0 ? 4 * static_cast<double>(s.model.input_features) : 8;
  const double wide = (s.model.add_out_norm ? 1 : 0) + (s.kind.norms_embedding ? 1 : 0) +
                      (s.drops() && s.model.add_embedding_dropout ? 1 : 0);
  const double logits = logits_bytes(s);
  return tokens + (4 * wide + narrow_bytes) * s.dim + (logits > 0 ? logits : 4 * s.dim);
}

/// Bytes behind the last states of an H3 block, which wait for the end of the forward pass although nothing needs them.
double state_bytes(const Sizes& s) {
  if (s.model.kind != "h3") return 0;
  const double steps = static_cast<double>(s.model.state_size) / std::sqrt(s.length);
  return 4 * s.dim * s.dim / s.heads * (2 + steps);
}

}  // namespace

std::optional<int64_t> activation_bytes(const config::Config& config, bool gpu, int64_t processes) {
  const Sizes s(config, gpu);
  const models::ModelOptions& model = config.model;
  if (gpu && !s.documents && s.kind.may_use_cudnn) return std::nullopt;
  const double narrow = s.bf16 ? 2 : 4;
  const auto bytes = [&](bool slstm) {
    const Kept kept = block_of(s, slstm) + dropped(s);
    return 4 * kept.wide + narrow * kept.narrow + (s.bf16 ? 2 * kept.copies : 0);
  };
  const auto slstm_blocks = static_cast<double>(model.slstm_at.size()),
             blocks = static_cast<double>(model.num_blocks);
  const double slstm = slstm_blocks > 0 ? bytes(true) : 0,
               other = slstm_blocks < blocks ? bytes(false) : 0;
  const double largest = std::max(slstm, other);
  // Gradients on their way through a block, those of the stream and of a branch; FFTs of H3's products have more.
  const double moving = model.kind == "h3" ? largest / 2 : 16 * s.dim;
  const double loss = bytes_around(s, narrow) + std::max(moving, logits_bytes(s));
  // A block that is recomputed keeps its input until then; one at a time is there in full, the loss no more.
  const double input = 4 * s.dim;
  const double peak =
      model.activation_checkpointing
          ? blocks * input + std::max(loss, largest - input + state_bytes(s) + moving)
          : slstm_blocks * slstm + (blocks - slstm_blocks) * other + blocks * state_bytes(s) + loss;
  return static_cast<int64_t>(peak * static_cast<double>(micro_batch(config, processes)) *
                              s.length);
}

}  // namespace xlstm::train
