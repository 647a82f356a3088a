#include "csrc/models/build.h"

#include <algorithm>
#include <initializer_list>
#include <string>

#include "csrc/models/model_kinds.h"
#include "csrc/nn/linear.h"

namespace xlstm::models {
namespace {

std::string kind_names() {
  std::string names;
  for (const ModelKind& kind : kModelKinds)
    names += (names.empty() ? "" : ", ") + std::string(kind.name);
  return names;
}

void one_of(const std::string& value, std::initializer_list<const char*> names,
            const char* option) {
  std::string expected;
  for (const char* name : names) expected += std::string(expected.empty() ? "" : ", ") + name;
  TORCH_CHECK(std::find(names.begin(), names.end(), value) != names.end(), "model.", option,
              ": expected one of ", expected, ", got \"", value, "\"");
}

/// The gates' own names are checked here, so that the message says which gate.
void check_gates(const ModelOptions& o) {
  one_of(o.mlstm.up_projection, {"pre", "post"}, "mlstm.up_projection");
  one_of(o.mlstm.igate, {"input", "bias", "fixed"}, "mlstm.igate");
  one_of(o.mlstm.fgate, {"input", "bias", "fixed"}, "mlstm.fgate");
  one_of(o.mlstm.igate_bias_init, {"normal", "zeros"}, "mlstm.igate_bias_init");
  one_of(o.mlstm.fgate_bias_init, {"linspace", "open"}, "mlstm.fgate_bias_init");
  TORCH_CHECK(o.mlstm.igate != "fixed" || o.mlstm.igate_bias_init == "zeros",
              "model.mlstm.igate_bias_init: expected zeros for a fixed input gate, got \"",
              o.mlstm.igate_bias_init, "\"");
  TORCH_CHECK(
      o.mlstm.fgate == "fixed" || o.mlstm.fgate_bias_init == "linspace",
      "model.mlstm.fgate_bias_init: expected linspace for a forget gate that learns, got \"",
      o.mlstm.fgate_bias_init, "\"");
}

}  // namespace

void adapt(torch::nn::Module& model, const ModelOptions::Lora& options) {
  const at::ScalarType base = options.base == "int8"       ? at::kChar
                              : options.base == "bfloat16" ? at::kBFloat16
                                                           : at::kFloat;
  nn::adapt_linear_maps(model, options.rank, options.alpha, base);
}

void check_options(const ModelOptions& o) {
  const auto positive = [](int64_t value, const char* name) {
    TORCH_CHECK(value > 0, "model.", name, ": expected a positive number, got ", value);
  };
  const auto kernel_size = [](int64_t value, const char* name) {
    TORCH_CHECK(value == 0 || (value >= 2 && value <= 8), "model.", name,
                ".conv1d_kernel_size: expected 0 or 2 to 8, ", "got ", value);
  };
  TORCH_CHECK(find_kind(o.kind) != nullptr, "model.kind: expected one of ", kind_names(),
              ", got \"", o.kind, "\"");
  positive(o.vocab_size, "vocab_size");
  TORCH_CHECK(o.input_features == 0 || !o.tie_weights,
              "model.input_features: works without tie_weights: there is no embedding");
  positive(o.embedding_dim, "embedding_dim");
  positive(o.num_blocks, "num_blocks");
  positive(o.num_heads, "num_heads");
  positive(o.mlstm.round_proj_up_to_multiple_of, "mlstm.round_proj_up_to_multiple_of");
  positive(o.feed_forward.round_up_to_multiple_of, "feed_forward.round_up_to_multiple_of");
  kernel_size(o.mlstm.conv1d_kernel_size, "mlstm");
  kernel_size(o.slstm.conv1d_kernel_size, "slstm");
  check_gates(o);
  one_of(o.lora.base, {"float32", "bfloat16", "int8"}, "lora.base");
  TORCH_CHECK(o.lora.rank > 0 || o.lora.base == "float32",
              "model.lora.base: expected float32 without adapters, got \"", o.lora.base, "\"");
  TORCH_CHECK(o.dropout >= 0 && o.dropout < 1, "model.dropout: expected 0 <= p < 1, got ",
              o.dropout);
  TORCH_CHECK(o.kind == "xlstm" || (!o.bias && o.slstm_at.empty()), "model.kind \"", o.kind,
              "\": expected bias false and an empty slstm_at, which only xlstm has");
  for (const int64_t at : o.slstm_at) {
    TORCH_CHECK(at >= 0 && at < o.num_blocks, "model.slstm_at: expected positions from 0 to ",
                o.num_blocks - 1, ", got ", at);
  }
}

}  // namespace xlstm::models
