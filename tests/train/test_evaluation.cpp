// Evaluation against a plain double loop over every window's logits.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <fstream>

#include "csrc/core/error.h"
#include "csrc/data/dataset.h"
#include "csrc/data/prepare.h"
#include "csrc/data/task_source.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"
#include "train/evaluation.h"
#include "train/token_frequency.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

const std::string kFirst = "The quick brown fox jumps over the lazy dog. ";
const std::string kSecond = "Pack my box with five dozen liquor jugs!";

std::shared_ptr<const data::TokenFile> make_file(const testing::TemporaryFolder& folder) {
  std::ofstream(folder / "a.txt") << kFirst;
  std::ofstream(folder / "b.txt") << kSecond;
  data::PrepareOptions options;
  options.inputs = {(folder / "a.txt").string(), (folder / "b.txt").string()};
  options.output_prefix = (folder / "tokens").string();
  data::prepare(options);
  return std::make_shared<const data::TokenFile>(options.output_prefix);
}

std::shared_ptr<models::LanguageModel> tiny_model() {
  models::ModelOptions options;
  options.embedding_dim = 16;
  options.num_blocks = 2;
  options.num_heads = 2;
  options.slstm_at = {1};
  options.dropout = 0.5;  // must be off during evaluation
  auto model = models::make_language_model(options);
  model->to(at::kDouble);
  return model;
}

/// Nats and scored tokens by the definition: each window on its own, documents kept apart, log-softmax in a loop.
std::pair<double, int64_t> plain_loss(models::LanguageModel& model, const data::TokenFile& file,
                                      int64_t seq_len) {
  const at::NoGradGuard no_grad;
  std::vector<int64_t> ids(static_cast<size_t>(file.num_tokens()));
  file.read(0, file.num_tokens(), ids.data());
  double nats = 0;
  int64_t scored = 0;
  for (int64_t document = 0; document < file.num_documents(); ++document) {
    const int64_t begin = file.document_start(document), end = file.document_start(document + 1);
    int64_t first = begin;  // where the state was empty
    std::vector<int64_t> context;
    for (int64_t t = begin; t + 1 < end; ++t) {
      if (t % seq_len == 0) {
        first = t;
        context.clear();
      }
      context.push_back(ids[static_cast<size_t>(t)]);
      REQUIRE(first + static_cast<int64_t>(context.size()) == t + 1);
      const at::Tensor logits =
          model.forward(at::tensor(context, at::kLong).unsqueeze(0)).first[0][-1].to(at::kDouble);
      double total = 0;
      for (int64_t v = 0; v < logits.size(0); ++v) total += std::exp(logits[v].item<double>());
      nats += std::log(total) - logits[ids[static_cast<size_t>(t + 1)]].item<double>();
      ++scored;
    }
  }
  return {nats, scored};
}

}  // namespace

TEST_CASE("evaluation is the token-weighted mean over the whole set") {
  const testing::TemporaryFolder folder;
  const auto file = make_file(folder);
  const auto model = tiny_model();
  for (const int64_t seq_len : {7, 32, 200}) {
    data::DatasetOptions options;
    options.seq_len = seq_len;
    const data::EvalSet data(file, options);
    model->eval();
    const auto [nats, scored] = plain_loss(*model, *file, seq_len);
    model->train();
    for (const int64_t batch_size : {1, 3, 64}) {
      const EvaluationResult result = evaluate(*model, data, batch_size);
      CHECK(result.tokens == scored);
      CHECK(result.loss == Approx(nats / static_cast<double>(scored)).epsilon(1e-9));
      CHECK(result.perplexity == Approx(std::exp(result.loss)));
      const auto text = static_cast<double>(scored - file->num_documents());  // without their ends
      CHECK(result.bits_per_byte == Approx(nats / std::log(2.0) / text));
      CHECK(model->is_training());
    }
  }
}

TEST_CASE("sets that are combined count by their tokens and bytes") {
  // 10 tokens of 2 bits at 2 bytes each and 30 of 1 bit at 4: 50 bits, 140 bytes.
  const double bit = std::log(2.0);
  EvaluationResult a, b;
  a.loss = 2 * bit, a.tokens = 10, a.bits_per_byte = 1.0, a.groups = {{8, 4}, {12, 6}};
  b.loss = bit, b.tokens = 30, b.bits_per_byte = 0.25, b.groups = {{1, 10}, {29, 20}};
  const EvaluationResult all = combined({{"a", a}, {"b", b}});
  CHECK(all.tokens == 40);
  CHECK(all.loss == Approx(50 * bit / 40));
  CHECK(all.perplexity == Approx(std::exp(all.loss)));
  CHECK(all.bits_per_byte == Approx(50.0 / 140));
  REQUIRE(all.groups.size() == 2);
  CHECK((all.groups[0].nats == 9 && all.groups[0].tokens == 14));
  CHECK((all.groups[1].nats == 41 && all.groups[1].tokens == 26));
  b.bits_per_byte = 0;  // unknown
  CHECK(combined({{"a", a}, {"b", b}}).bits_per_byte == 0);
  CHECK(combined({{"b", b}, {"a", a}}).bits_per_byte == 0);
}

TEST_CASE("the last error is that of each sample's last number that counts") {
  struct Numbers : data::HeldOutSet {
    int64_t num_windows() const override { return 2; }
    data::Batch batch(int64_t first, int64_t count) const override {
      data::Batch batch(count, 3);
      batch.num_features = 1;
      for (int64_t window = first; window < first + count; ++window) {
        batch.features.insert(batch.features.end(), {0.5f, -1.0f, 2.0f});
        batch.values.insert(batch.values.end(), {3, window == 0 ? 5.0f : NAN, NAN});
        batch.num_targets += window == 0 ? 2 : 1;
      }
      return batch;
    }
    std::string name() const override { return "numbers"; }
  };
  models::ModelOptions options;
  options.vocab_size = options.input_features = 1;
  options.embedding_dim = 8, options.num_blocks = 1, options.num_heads = 2;
  const auto model = models::make_language_model(options);
  const at::NoGradGuard no_grad;
  const at::Tensor inputs = at::tensor({0.5f, -1.0f, 2.0f}).view({1, 3, 1});
  const at::Tensor found = model->forward(inputs).first.flatten().to(at::kDouble);
  const double first = std::pow(found[0].item<double>() - 3, 2),
               second = std::pow(found[1].item<double>() - 5, 2);
  const EvaluationResult result = evaluate(*model, Numbers(), 2);
  CHECK(result.tokens == 3);
  CHECK(result.loss == Approx((2 * first + second) / 3).epsilon(1e-5));
  REQUIRE(result.last_error);
  CHECK(*result.last_error == Approx((first + second) / 2).epsilon(1e-5));
}

TEST_CASE("tokens are judged by how often they occur in other text") {
  const testing::TemporaryFolder folder;
  const auto file = make_file(folder);
  std::ofstream(folder / "train.txt") << "ttttttttttoooooo,,e";
  data::PrepareOptions options;
  options.inputs = {(folder / "train.txt").string()};
  options.output_prefix = (folder / "train").string();
  data::prepare(options);
  const auto training = std::make_shared<const data::TokenFile>(options.output_prefix);
  const std::vector<int64_t> counts = count_tokens({training, training}, 256);
  CHECK((counts['t'] == 20 && counts['o'] == 12 && counts[','] == 4 && counts['e'] == 2));
  CHECK(counts['x'] == 0);
  CHECK_THROWS_AS(count_tokens({training}, 100), Error);

  // Edges belong to the bucket that begins there.
  const TokenGroups groups = frequency_buckets(counts, {0, 2, 12, 13});
  const auto model = tiny_model();
  data::DatasetOptions windows;
  windows.seq_len = 16;
  const data::EvalSet data(file, windows);
  std::vector<GroupLoss> want(4);
  model->eval();
  for (int64_t w = 0; w < data.num_windows(); ++w) {
    const data::Batch batch = data.batch(w, 1);
    const at::NoGradGuard no_grad;
    const at::Tensor reset = at::tensor(batch.reset, at::kByte).to(at::kBool).unsqueeze(0);
    const at::Tensor log_p = model->forward(at::tensor(batch.input).unsqueeze(0), {}, reset)
                                 .first[0]
                                 .to(at::kDouble)
                                 .log_softmax(1);
    for (int64_t t = 0; t < 16; ++t) {
      const int64_t target = batch.target[static_cast<size_t>(t)];
      if (target == data::kIgnored) continue;
      const bool few = target == ',' || target == 'e' || target == 0;  // 0 ends documents
      const size_t bucket = target == 't' ? 3 : target == 'o' ? 2 : few ? 1 : 0;
      want[bucket].nats -= log_p[t][target].item<double>();
      ++want[bucket].tokens;
    }
  }
  const EvaluationResult all = evaluate(*model, data, 3);
  CHECK(all.groups.empty());
  for (const int64_t batch_size : {1, 4}) {
    const EvaluationResult result = evaluate(*model, data, batch_size, {.groups = &groups});
    CHECK(result.loss == Approx(all.loss).epsilon(1e-9));
    CHECK(result.tokens == all.tokens);
    REQUIRE(result.groups.size() == 4);
    for (size_t i = 0; i < 4; ++i) {
      CHECK(want[i].tokens > 0);
      CHECK(result.groups[i].tokens == want[i].tokens);
      CHECK(result.groups[i].nats == Approx(want[i].nats).epsilon(1e-9));
    }
  }
}

TEST_CASE("bits per byte counts the bytes of what is judged") {
  const testing::TemporaryFolder folder;
  const auto model = tiny_model();
  data::DatasetOptions windows;
  windows.seq_len = 4;
  const auto judge = [&](const data::PrepareOptions& options, int64_t most = 0) {
    data::prepare(options);
    const data::EvalSet set(std::make_shared<const data::TokenFile>(options.output_prefix),
                            windows);
    const EvaluationResult result = evaluate(*model, set, 3, {.max_windows = most});
    return std::pair(result.tokens, result.loss * static_cast<double>(result.tokens) /
                                        std::log(2.0) / result.bits_per_byte);
  };
  std::ofstream text(folder / "pairs.jsonl");
  for (int i = 0; i < 50; ++i) text << "{\"text\": \"" << i % 10 << "x\"}\n";
  text.close();
  data::PrepareOptions options;
  options.inputs = {(folder / "pairs.jsonl").string()};
  options.output_prefix = (folder / "pairs").string();
  options.overwrite = true;
  // Of two bytes and an end the first byte is not judged, and the end is no text.
  const auto [tokens, bytes] = judge(options);
  CHECK(tokens == 100);
  CHECK(bytes == Approx(50));
  // Of a part: targets 1 to 12, of which 3, 6, 9 and 12 begin a document.
  const auto [part_tokens, part_bytes] = judge(options, 3);
  CHECK(part_tokens == 8);
  CHECK(part_bytes == Approx(4));
  options.append_eos = false;
  CHECK(judge(options).second == Approx(50));
}

TEST_CASE("the accuracy of a task is that of its answers") {
  data::TaskOptions options;
  options.name = "reverse_string";
  options.eval_samples = 21;
  const auto data = data::make_task_data(options, 20, 1, true, 256);
  const auto model = tiny_model();
  model->eval();
  double correct = 0, answers = 0, nats = 0;
  for (int64_t i = 0; i < 21; ++i) {
    const data::Batch batch = data.held_out->batch(i, 1);
    const at::Tensor ids = at::tensor(batch.input).unsqueeze(0);
    const at::Tensor logits = model->forward(ids).first[0];
    for (int64_t t = 0; t < 20; ++t) {
      const int64_t target = batch.target[static_cast<size_t>(t)];
      if (target == data::kIgnored) continue;
      ++answers;
      correct += logits[t].argmax().item<int64_t>() == target;
      nats -= logits[t].log_softmax(0)[target].item<double>();
    }
  }
  for (const int64_t batch_size : {1, 4, 64}) {
    const EvaluationResult result = evaluate(*model, *data.held_out, batch_size);
    CHECK(static_cast<double>(result.tokens) == answers);
    CHECK(result.loss == Approx(nats / answers).epsilon(1e-5));
    CHECK(result.accuracy.value() == Approx(correct / answers));
    CHECK(result.scaled_accuracy.value() == Approx((correct / answers - 0.1) / 0.9));
  }
}

TEST_CASE("max_windows takes the first windows alone; bad sizes are refused") {
  const testing::TemporaryFolder folder;
  const auto file = make_file(folder);
  data::DatasetOptions options;
  options.seq_len = 8;
  const data::EvalSet data(file, options);
  const auto model = tiny_model();
  const EvaluationResult part = evaluate(*model, data, 2, {.max_windows = 4});
  CHECK(part.tokens <= 32);
  CHECK(part.tokens >= 30);
  for (const int64_t batch_size : {1, 3, 5})  // which decides the memory alone
    CHECK(evaluate(*model, data, batch_size, {.max_windows = 4}).loss ==
          Approx(part.loss).epsilon(1e-9));
  CHECK(evaluate(*model, data, 2, {.max_windows = 10000}).tokens ==
        evaluate(*model, data, 5).tokens);
  CHECK_THROWS_AS(evaluate(*model, data, 0), Error);
}
