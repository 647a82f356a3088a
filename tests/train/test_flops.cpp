// Operations per token against the count written out for one small model of each kind.
#include "tests/support/catch.h"
#include "train/flops.h"

using namespace xlstm;

TEST_CASE("operations of a token: two per weight, four per number of a matrix memory") {
  models::ModelOptions options;
  options.vocab_size = 11, options.embedding_dim = 16, options.num_blocks = 2,
  options.num_heads = 2;
  options.slstm_at = {1};
  const auto count = [&] {
    return train::forward_flops_per_token(*models::make_language_model(options));
  };
  const double inner = 64;  // 2 * 16 rounded up to a multiple of 64
  const double mlstm = 16 * 2 * inner + inner * 4 + 3 * inner * 4 + 2 * 2 * 3 * inner + inner * 16;
  const double memory = 2 * (inner / 2) * (inner / 2);
  const double slstm = 16 * 4 + 4 * 16 * 8 + 4 * 2 * 8 * 8 + 16 * 2 * 64 + 64 * 16;
  CHECK(count() == 2 * (mlstm + slstm + 11 * 16) + 4 * memory);
  options.tie_weights = true;
  CHECK(count() == 2 * (mlstm + slstm + 11 * 16) + 4 * memory);
}
