// Parameter counts of the papers, names of the tensors, options that do not fit.
#include <cmath>
#include <set>

#include "csrc/models/language_model.h"
#include "tests/support/catch.h"

namespace xlstm::models {
namespace {

constexpr int64_t kVocabulary = 50304;  // GPT-2's 50257, padded

struct Size {
  const char* name;
  int64_t dim, num_blocks;
  double only_mlstm, mixed;       ///< millions, xLSTM[1:0] and xLSTM[7:1]; 0: the paper gives none
  std::vector<int64_t> slstm_at;  ///< of xLSTM[7:1]
};

ModelOptions paper_options(const Size& size) {
  ModelOptions options;
  options.vocab_size = kVocabulary;
  options.embedding_dim = size.dim;
  options.num_blocks = size.num_blocks;
  return options;
}

/// Written out from figures 10 and 11 of arXiv 2405.04517, u = 2d, NH = 4.
int64_t formula(int64_t d, int64_t num_mlstm, int64_t num_slstm) {
  const int64_t u = 2 * d;
  const auto ffn = static_cast<int64_t>(std::ceil(1.3 * static_cast<double>(d) / 64)) * 64;
  const int64_t mlstm = 2 * u * d + u * d + 12 * u + 5 * u + 2 * (12 * u + 4) + u + u + d;
  const int64_t slstm = d * d + d * d + 4 * d + 5 * d + d + 2 * d + 3 * d * ffn;
  return num_mlstm * mlstm + num_slstm * slstm + 2 * kVocabulary * d + d;
}

TEST_CASE("parameter counts of xLSTM[1:0] and xLSTM[7:1] are the paper's") {
  const std::vector<int64_t> in_48 = {3, 5, 7, 40, 42, 44};
  // The paper names no sLSTM positions for 64 blocks: the rule of its 48, eight of them.
  const std::vector<int64_t> in_64 = {3, 5, 7, 9, 54, 56, 58, 60};
  const std::vector<Size> sizes = {
      {"125M", 768, 24, 163.8, 163.7, {3, 20}},
      {"350M", 1024, 48, 409.3, 408.4, in_48},
      {"760M", 1536, 48, 840.4, 839.7, in_48},
      {"1.3B", 2048, 48, 1422.6, 1420.1, in_48},
      {"2.7B", 2560, 64, 2788.35, 0, in_64}};  // 2788.3 there, 2788.4 by the formula
  for (const Size& size : sizes) {
    INFO(size.name);
    ModelOptions options = paper_options(size);
    const int64_t only_mlstm = count_parameters(options);
    CHECK(only_mlstm == formula(size.dim, size.num_blocks, 0));
    CHECK(static_cast<double>(only_mlstm) / 1e6 ==
          Approx(size.only_mlstm).margin(0.0501).epsilon(0));
    options.slstm_at = size.slstm_at;
    const auto num_slstm = static_cast<int64_t>(size.slstm_at.size());
    const int64_t mixed = count_parameters(options);
    CHECK(mixed == formula(size.dim, size.num_blocks - num_slstm, num_slstm));
    if (size.mixed > 0)
      CHECK(static_cast<double>(mixed) / 1e6 == Approx(size.mixed).margin(0.0501).epsilon(0));
  }
}

void check_millions(const ModelOptions& options, double millions) {
  CHECK(static_cast<double>(count_parameters(options)) / 1e6 ==
        Approx(millions).margin(0.0501).epsilon(0));
}

ModelOptions ablation_options() { return paper_options({"350M", 1024, 48, 0, 0, {}}); }

TEST_CASE("parameter counts of the ablation from LSTM to xLSTM are the paper's (table 2, top)") {
  // The LSTMs of its first rows: test_baseline_sizes.cpp.
  ModelOptions exponential = ablation_options();
  exponential.num_blocks = 24;
  for (int64_t i = 0; i < 24; ++i) exponential.slstm_at.push_back(i);
  exponential.slstm.gate_proj = "dense";
  exponential.feed_forward.proj_factor = 2.6;
  check_millions(exponential, 427.3);
  // Exponential gating alone adds nothing.
  const int64_t with = count_parameters(exponential);
  exponential.slstm.cell = "lstm";
  CHECK(count_parameters(exponential) == with);

  ModelOptions matrix = ablation_options();
  matrix.slstm_at = {3, 5, 7, 40, 42, 44};
  check_millions(matrix, 408.4);
}

TEST_CASE("the ablation of the gates takes away what they would have learned (table 2, bottom)") {
  constexpr int64_t kBlocks = 48, kHeads = 4, kWeights = 3 * 2 * 1024 * kHeads;
  struct Row {
    const char *fgate, *fgate_bias, *igate, *igate_bias;
    int64_t learned;  ///< numbers of both gates in one block
  };
  const std::vector<Row> rows = {
      {"fixed", "open", "fixed", "zeros", 0},
      {"fixed", "linspace", "fixed", "zeros", 0},
      {"input", "linspace", "fixed", "zeros", kWeights + kHeads},
      {"fixed", "linspace", "input", "normal", kWeights + kHeads},
      {"bias", "linspace", "fixed", "zeros", kHeads},
      {"bias", "linspace", "bias", "normal", 2 * kHeads},
      {"input", "linspace", "bias", "normal", kWeights + 2 * kHeads},
      {"input", "linspace", "input", "normal", 2 * kWeights + 2 * kHeads},
  };
  const int64_t without = formula(1024, kBlocks, 0) - kBlocks * rows.back().learned;
  for (const Row& row : rows) {
    INFO(row.fgate << " " << row.igate);
    ModelOptions options = ablation_options();
    options.mlstm.fgate = row.fgate, options.mlstm.fgate_bias_init = row.fgate_bias;
    options.mlstm.igate = row.igate, options.mlstm.igate_bias_init = row.igate_bias;
    CHECK(count_parameters(options) == without + kBlocks * row.learned);
  }
}

TEST_CASE("parameter counts of the ablation of the mLSTM block are the paper's (table 8)") {
  check_millions(ablation_options(), 409.3);
  ModelOptions no_convolution = ablation_options();
  no_convolution.mlstm.conv1d_kernel_size = 0;
  check_millions(no_convolution, 408.8);
  // The paper tells the feed-forward (ReLU squared, no gate) and 24 blocks; full matrices for q, k, v, o, gates from the
  // input, no convolution and a width of 4 give its count.
  ModelOptions post = ablation_options();
  post.num_blocks = 24;
  post.mlstm.up_projection = "post", post.mlstm.conv1d_kernel_size = 0;
  post.feed_forward.proj_factor = 4, post.feed_forward.gated = false;
  post.feed_forward.act_fn = "relu2";
  check_millions(post, 430.4);
}

TEST_CASE("the 7B configuration has the released model's 6,865,424,896 parameters") {
  ModelOptions options;
  options.kind = "xlstm_large";
  options.vocab_size = kVocabulary;
  options.embedding_dim = 4096;
  options.num_blocks = 32;
  options.num_heads = 8;
  options.feed_forward.proj_factor = 2.667;
  CHECK(count_parameters(options) == 6865424896);
}

std::set<std::string> names_of(const ModelOptions& options) {
  std::set<std::string> names;
  for (const auto& item : make_language_model(options, at::kMeta)->named_parameters())
    names.insert(item.key());
  return names;
}

TEST_CASE("names are the canonical ones, in which checkpoints are written") {
  ModelOptions options;
  options.num_blocks = 2;
  options.slstm_at = {1};
  const std::set<std::string> expected = {
      "embedding.weight",
      "blocks.0.norm.weight",
      "blocks.0.mlstm.proj_up.weight",
      "blocks.0.mlstm.conv.weight",
      "blocks.0.mlstm.conv.bias",
      "blocks.0.mlstm.q_proj.weight",
      "blocks.0.mlstm.k_proj.weight",
      "blocks.0.mlstm.v_proj.weight",
      "blocks.0.mlstm.igate.weight",
      "blocks.0.mlstm.igate.bias",
      "blocks.0.mlstm.fgate.weight",
      "blocks.0.mlstm.fgate.bias",
      "blocks.0.mlstm.out_norm.weight",
      "blocks.0.mlstm.skip",
      "blocks.0.mlstm.proj_down.weight",
      "blocks.1.norm.weight",
      "blocks.1.slstm.conv.weight",
      "blocks.1.slstm.conv.bias",
      "blocks.1.slstm.igate.weight",
      "blocks.1.slstm.fgate.weight",
      "blocks.1.slstm.zgate.weight",
      "blocks.1.slstm.ogate.weight",
      "blocks.1.slstm.recurrent",
      "blocks.1.slstm.bias",
      "blocks.1.slstm.out_norm.weight",
      "blocks.1.ffn_norm.weight",
      "blocks.1.ffn.proj_up.weight",
      "blocks.1.ffn.proj_down.weight",
      "out_norm.weight",
      "lm_head.weight",
  };
  CHECK(names_of(options) == expected);
  options.tie_weights = true;
  CHECK(names_of(options).count("lm_head.weight") == 0);
  options.add_out_norm = false;
  CHECK(names_of(options).count("out_norm.weight") == 0);

  ModelOptions large;
  large.kind = "xlstm_large";
  large.num_blocks = 1;
  const std::set<std::string> expected_large = {
      "embedding.weight",
      "blocks.0.norm_mlstm.weight",
      "blocks.0.mlstm_layer.q.weight",
      "blocks.0.mlstm_layer.k.weight",
      "blocks.0.mlstm_layer.v.weight",
      "blocks.0.mlstm_layer.ogate_preact.weight",
      "blocks.0.mlstm_layer.igate_preact.weight",
      "blocks.0.mlstm_layer.igate_preact.bias",
      "blocks.0.mlstm_layer.fgate_preact.weight",
      "blocks.0.mlstm_layer.fgate_preact.bias",
      "blocks.0.mlstm_layer.multihead_norm.weight",
      "blocks.0.mlstm_layer.out_proj.weight",
      "blocks.0.norm_ffn.weight",
      "blocks.0.ffn.proj_up_gate.weight",
      "blocks.0.ffn.proj_up.weight",
      "blocks.0.ffn.proj_down.weight",
      "out_norm.weight",
      "lm_head.weight",
  };
  CHECK(names_of(large) == expected_large);
}

template <class Change>
void check_refused(const std::string& part, const Change& change) {
  ModelOptions options;
  change(options);
  std::string message;
  try {
    make_language_model(options, at::kMeta);
  } catch (const c10::Error& e) {
    message = e.what();
  }
  INFO(part << " in: " << message);
  CHECK(message.find(part) != std::string::npos);
}

TEST_CASE("options that do not fit are refused by name") {
  check_refused("model.kind: expected", [](ModelOptions& o) { o.kind = "gru"; });
  check_refused("model.vocab_size: expected a positive", [](ModelOptions& o) { o.vocab_size = 0; });
  check_refused("model.num_blocks: expected a positive",
                [](ModelOptions& o) { o.num_blocks = -1; });
  check_refused("model.dropout: expected", [](ModelOptions& o) { o.dropout = 1; });
  check_refused("model.slstm_at: expected", [](ModelOptions& o) { o.slstm_at = {4}; });
  check_refused("num_heads: expected a divisor", [](ModelOptions& o) { o.num_heads = 3; });
  check_refused("qkv_proj_blocksize: expected a divisor",
                [](ModelOptions& o) { o.mlstm.qkv_proj_blocksize = 5; });
  check_refused("mlstm.conv1d_kernel_size: expected",
                [](ModelOptions& o) { o.mlstm.conv1d_kernel_size = 9; });
  check_refused("mlstm.up_projection: expected",
                [](ModelOptions& o) { o.mlstm.up_projection = "none"; });
  check_refused("mlstm.igate: expected", [](ModelOptions& o) { o.mlstm.igate = "exp"; });
  check_refused("mlstm.fgate: expected", [](ModelOptions& o) { o.mlstm.fgate = "none"; });
  check_refused("mlstm.igate_bias_init: expected zeros for a fixed",
                [](ModelOptions& o) { o.mlstm.igate = "fixed"; });
  check_refused("mlstm.fgate_bias_init: expected linspace",
                [](ModelOptions& o) { o.mlstm.fgate_bias_init = "open"; });
  check_refused("slstm.gate_proj: expected", [](ModelOptions& o) {
    o.slstm_at = {0};
    o.slstm.gate_proj = "full";
  });
  check_refused("xlstm_large\": expected bias false", [](ModelOptions& o) {
    o.kind = "xlstm_large";
    o.bias = true;
  });
}

}  // namespace
}  // namespace xlstm::models
