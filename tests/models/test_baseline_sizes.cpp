// Parameter counts of the models that xLSTM is compared with: Tables 1, 2 and 7 of arXiv 2405.04517.
#include <cmath>

#include "csrc/models/language_model.h"
#include "tests/support/catch.h"

namespace xlstm::models {
namespace {

constexpr int64_t kVocabulary = 50304;

ModelOptions options_of(const char* kind, int64_t dim, int64_t blocks, int64_t heads = 1) {
  ModelOptions options;
  options.kind = kind;
  options.vocab_size = kVocabulary;
  options.embedding_dim = dim, options.num_blocks = blocks, options.num_heads = heads;
  if (options.kind == "llama") options.feed_forward.proj_factor = 8.0 / 3;
  if (options.kind == "gpt" || options.kind == "lstm_block") options.feed_forward.proj_factor = 4;
  return options;
}

/// Feed-forwards of the linear-attention models: 8/3 of the width, up to a multiple of 256.
ModelOptions linear_options(const char* kind, int64_t dim, int64_t blocks, int64_t heads) {
  ModelOptions options = options_of(kind, dim, blocks, heads);
  options.feed_forward.proj_factor = 8.0 / 3;
  options.feed_forward.round_up_to_multiple_of = 256;
  return options;
}

void check_millions(const ModelOptions& options, double millions) {
  INFO(options.kind << " " << options.embedding_dim);
  CHECK(static_cast<double>(count_parameters(options)) / 1e6 ==
        Approx(millions).margin(0.0501).epsilon(0));
}

TEST_CASE("parameter counts of the comparison's models are the paper's") {
  const int64_t dims[] = {768, 1024, 1536, 2048, 2560};
  const double llama[] = {162.2, 406.6, 834.1, 1420.4, 2779.5};
  const double mamba[] = {167.8, 423.1, 870.5, 1475.3, 2897.2};
  const double rwkv4[] = {169.4, 430.5, 891.0, 1515.2, 2984.8};
  const int64_t heads[] = {12, 16, 16, 16, 32}, blocks[] = {12, 24, 24, 24, 32};
  for (int i = 0; i < 5; ++i) {
    check_millions(options_of("llama", dims[i], blocks[i], heads[i]), llama[i]);
    check_millions(options_of("mamba", dims[i], 2 * blocks[i]), mamba[i]);
    check_millions(options_of("rwkv4", dims[i], blocks[i]), rwkv4[i]);
  }
  ModelOptions gpt = options_of("gpt", 1024, 24, 16);
  gpt.tie_weights = true;
  check_millions(gpt, 355.9);
}

TEST_CASE("parameter counts of RWKV-5, RWKV-6 and HGRN2 are the paper's") {
  const int64_t dims[] = {768, 1024, 1536, 2048, 2560};
  const double rwkv5[] = {176.5, 455.7, 947.8, 1616.0, 3194.7};
  const double rwkv6[] = {173.6, 441.6, 907.7, 1537.5, 3021.9};
  const double hgrn2[] = {162.2, 411.4, 834.2, 1439.4, 2795.4};
  const int64_t blocks[] = {12, 24, 24, 24, 32};
  for (int i = 0; i < 5; ++i) {
    check_millions(options_of("rwkv5", dims[i], blocks[i], dims[i] / 64), rwkv5[i]);
    check_millions(options_of("rwkv6", dims[i], blocks[i], dims[i] / 64), rwkv6[i]);
    check_millions(linear_options("hgrn2", dims[i], blocks[i], dims[i] / 128), hgrn2[i]);
  }
}

TEST_CASE(
    "parameter counts of HGRN, GLA and RetNet are the paper's, which gives them in whole "
    "millions") {
  const auto whole = [](const ModelOptions& options) {
    return std::llround(static_cast<double>(count_parameters(options)) / 1e6);
  };
  CHECK(whole(linear_options("hgrn", 1024, 24, 1)) == 411);
  CHECK(whole(linear_options("gla", 1024, 24, 4)) == 412);
  // The paper does not tell the width of RetNet's feed-forward: 5/3 of the model's gives its count.
  ModelOptions retnet = linear_options("retnet", 1024, 24, 4);
  retnet.feed_forward.proj_factor = 5.0 / 3, retnet.feed_forward.round_up_to_multiple_of = 16;
  CHECK(whole(retnet) == 431);
  // Linear attention has the shapes of Llama's.
  ModelOptions linear = options_of("llama", 1024, 24, 16);
  const int64_t llama = count_parameters(linear);
  linear.kind = "linear_attention";
  CHECK(count_parameters(linear) == llama);
}

TEST_CASE("parameter counts of H3 and Hyena are the paper's, in whole millions") {
  const auto whole = [](const ModelOptions& options) {
    return std::llround(static_cast<double>(count_parameters(options)) / 1e6);
  };
  // The paper does not tell how wide their feed-forwards are: these widths give its counts. Heads of one channel are H3's
  // own default.
  ModelOptions h3 = options_of("h3", 1024, 24, 1024);
  h3.feed_forward.proj_factor = 89.0 / 32, h3.feed_forward.round_up_to_multiple_of = 32;
  CHECK(whole(h3) == 420);
  ModelOptions hyena = options_of("hyena", 1024, 24);
  hyena.feed_forward.proj_factor = 97.0 / 32, hyena.feed_forward.round_up_to_multiple_of = 32;
  CHECK(whole(hyena) == 435);

  // In parts: four projections, two norms, SwiGLU, and what is their own; D = 1024, N = 64.
  const int64_t d = 1024, outside = 2 * kVocabulary * d + d, norms = 2 * d;
  const int64_t shift = 64 * d + d, diagonal = d + d + 2 * 32 * d + 2 * 64 * d;
  CHECK(count_parameters(h3) ==
        outside + 24 * (4 * d * d + norms + 3 * 2848 * d + shift + diagonal));
  const int64_t short_filter = 3 * d * 3 + 3 * d;
  const int64_t filter = (33 * 64 + 64) + 2 * (64 * 64 + 64) + 64 * d + 64;
  CHECK(count_parameters(hyena) ==
        outside + 24 * (4 * d * d + norms + 3 * 3104 * d + short_filter + filter + d));
}

TEST_CASE("parameter counts of the ablation's LSTMs are the paper's") {
  check_millions(options_of("lstm", 1536, 24), 607.8);
  check_millions(options_of("lstm_residual", 1024, 48), 506.1);
  check_millions(options_of("lstm_block", 1024, 24), 505.9);
}

}  // namespace
}  // namespace xlstm::models
