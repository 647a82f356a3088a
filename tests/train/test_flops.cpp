// Operations per token against the count written out for small models.
#include "tests/support/catch.h"
#include "train/flops.h"

using namespace xlstm;

namespace {

models::ModelOptions small(const char* kind) {
  models::ModelOptions options;
  options.kind = kind;
  options.vocab_size = 11, options.embedding_dim = 16, options.num_blocks = 2,
  options.num_heads = 2;
  return options;
}

}  // namespace

TEST_CASE("operations of a token: two per weight, four per number of a matrix memory") {
  models::ModelOptions options = small("xlstm");
  options.slstm_at = {1};
  const double inner = 64;  // 2 * 16 rounded up to a multiple of 64
  const double mlstm = 16 * 2 * inner + inner * 4 + 3 * inner * 4 + 2 * 2 * 3 * inner + inner * 16;
  const double memory = 2 * (inner / 2) * (inner / 2);
  const double slstm = 16 * 4 + 4 * 16 * 8 + 4 * 2 * 8 * 8 + 16 * 2 * 64 + 64 * 16;
  for (const int64_t seq_len : {1, 100}) {
    options.tie_weights = seq_len == 100;
    CHECK(train::forward_flops_per_token(options, seq_len) ==
          2 * (mlstm + slstm + 11 * 16) + 4 * memory);
  }
  options.slstm_at = {0, 1};
  CHECK(train::forward_flops_per_token(options, 100) == 2 * (2 * slstm + 11 * 16));
}

TEST_CASE("operations of a token: attention over half a sequence on average") {
  const models::ModelOptions options = small("llama");
  const double one = train::forward_flops_per_token(options, 1);
  const double weights = 2 * (4 * 16 * 16 + 3 * 16 * 64) + 11 * 16;
  // Scores and weighted sum, two operations each per channel and token seen: 1 to seq_len of them.
  CHECK(one == 2 * weights + 2 * (2 + 2) * 16);
  CHECK(train::forward_flops_per_token(options, 100) - one == 2 * (2 + 2) * 16 * (50.5 - 1));
}

TEST_CASE("operations of a token: every kind of model") {
  for (const char* kind : {"xlstm", "xlstm_large", "llama", "gpt", "mamba", "rwkv4", "rwkv5",
                           "rwkv6", "linear_attention", "retnet", "gla", "hgrn", "hgrn2", "h3",
                           "hyena", "lstm", "lstm_residual", "lstm_block"}) {
    models::ModelOptions options = small(kind);
    options.embedding_dim = 64;
    INFO(kind);
    CHECK(train::forward_flops_per_token(options, 64) >= 2.0 * 11 * 64);
  }
  models::ModelOptions odd = small("xlstm");  // no mLSTM of this width has five heads
  odd.embedding_dim = 100, odd.num_heads = 5, odd.slstm_at = {0, 1};
  CHECK(train::forward_flops_per_token(odd, 64) > 0);
  models::ModelOptions numbers = small("xlstm");
  numbers.input_features = 3, numbers.vocab_size = 1;
  CHECK(train::forward_flops_per_token(numbers, 64) > 0);
}
