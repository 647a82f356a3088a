#pragma once
// The kinds of models, a row each: what the code around a kind's own blocks asks about it. Plain values, no torch header
// (the configuration layer reads them). What a block is made from stands in blocks.cpp, what it keeps for the backward
// pass in train/activation_memory.cpp.
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>

namespace xlstm::models {

struct ModelKind {
  std::string_view name;  ///< model.kind

  // settings
  /// Those of this kind alone, or whole sections of them, as the configuration names them.
  std::array<std::string_view, 5> own_settings = {};
  bool has_feed_forward = false;     ///< model.feed_forward applies
  bool has_heads = true;             ///< model.num_heads applies
  std::string_view even_heads = "";  ///< why heads must have an even width; "": they need not

  // around the blocks
  bool learns_positions = false;   ///< model.max_positions of them, added to the embedding
  bool norms_embedding = false;    ///< a LayerNorm in front of the first block
  bool learns_bounds = false;      ///< of the forget gates, in one parameter for all blocks
  bool has_rms_norms = false;      ///< the norm behind the last block is RMSNorm, else LayerNorm
  bool out_norm_has_bias = false;  ///< that norm

  bool state_grows = false;  ///< with every token, as that of attention does

  // memory
  int dropped_branches = 2;    ///< of a block: each has a mask of dropout
  bool may_use_cudnn = false;  ///< on a GPU, which keeps for the backward pass what it decides
};

inline constexpr std::string_view kRotary = "the rotary embedding turns pairs";

inline constexpr ModelKind kModelKinds[] = {
    {.name = "xlstm",
     .own_settings = {"model.mlstm", "model.slstm", "model.slstm_at", "model.bias",
                      "model.feed_forward.gated"},
     .has_feed_forward = true,
     .dropped_branches = 1},
    {.name = "xlstm_large",
     .own_settings = {"model.qk_dim_factor", "model.v_dim_factor", "model.gate_soft_cap"},
     .has_feed_forward = true,
     .has_rms_norms = true},
    {.name = "lstm", .has_heads = false, .dropped_branches = 1, .may_use_cudnn = true},
    {.name = "lstm_residual", .has_heads = false, .dropped_branches = 1, .may_use_cudnn = true},
    {.name = "lstm_block", .has_feed_forward = true, .has_heads = false, .may_use_cudnn = true},
    {.name = "llama",
     .has_feed_forward = true,
     .even_heads = kRotary,
     .has_rms_norms = true,
     .state_grows = true},
    {.name = "gpt",
     .own_settings = {"model.max_positions"},
     .has_feed_forward = true,
     .learns_positions = true,
     .out_norm_has_bias = true,
     .state_grows = true},
    {.name = "mamba", .has_heads = false, .has_rms_norms = true, .dropped_branches = 1},
    {.name = "rwkv4", .has_heads = false, .norms_embedding = true, .out_norm_has_bias = true},
    {.name = "rwkv5", .norms_embedding = true, .out_norm_has_bias = true},
    {.name = "rwkv6", .norms_embedding = true, .out_norm_has_bias = true},
    {.name = "linear_attention", .has_feed_forward = true, .has_rms_norms = true},
    {.name = "retnet", .has_feed_forward = true, .even_heads = kRotary, .has_rms_norms = true},
    {.name = "gla",
     .has_feed_forward = true,
     .even_heads = "queries and keys have half of it",
     .has_rms_norms = true},
    {.name = "hgrn",
     .has_feed_forward = true,
     .has_heads = false,
     .learns_bounds = true,
     .has_rms_norms = true},
    {.name = "hgrn2", .has_feed_forward = true, .learns_bounds = true, .has_rms_norms = true},
    {.name = "h3",
     .own_settings = {"model.state_size"},
     .has_feed_forward = true,
     .has_rms_norms = true},
    {.name = "hyena",
     .own_settings = {"model.filter_length"},
     .has_feed_forward = true,
     .has_heads = false,
     .has_rms_norms = true,
     .state_grows = true},
};

/// Null for a name that no kind has.
constexpr const ModelKind* find_kind(std::string_view name) {
  for (const ModelKind& kind : kModelKinds)
    if (kind.name == name) return &kind;
  return nullptr;
}

/// The row of a name that has been checked. Throws std::invalid_argument for another one.
inline const ModelKind& kind_named(std::string_view name) {
  if (const ModelKind* kind = find_kind(name)) return *kind;
  throw std::invalid_argument("model.kind: \"" + std::string(name) + "\" is unknown");
}

}  // namespace xlstm::models
