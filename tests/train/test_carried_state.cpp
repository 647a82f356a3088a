// train.carry_state: sequences that go on in one another.
#include "train/carried_state.h"

#include <cmath>
#include <limits>
#include <vector>

#include "csrc/core/error.h"
#include "csrc/models/model_kinds.h"
#include "csrc/nn/random_state.h"
#include "tests/support/catch.h"
#include "train/autocast.h"
#include "train/optimizer.h"
#include "train/train_step.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

config::Config carrying_config(const std::string& kind = "xlstm") {
  config::Config config;
  config.model.kind = kind;
  config.model.vocab_size = 32;
  config.model.embedding_dim = 16;
  config.model.num_blocks = 2;
  config.model.num_heads = 2;
  if (kind == "xlstm") config.model.slstm_at = {1};
  if (kind == "h3") config.model.state_size = 4;
  config.train.global_batch_size = 4;
  config.train.max_steps = 10;
  config.train.carry_state = true;
  return config;
}

std::shared_ptr<models::LanguageModel> make_model(const config::Config& config) {
  nn::seed_random_state(at::kCPU, 3);
  auto model = models::make_language_model(config.model);
  model->to(at::kDouble);
  const at::NoGradGuard
      no_grad;  // some first weights are zeros, behind which a state would not be seen
  for (at::Tensor& parameter : model->parameters()) parameter.add_(at::randn_like(parameter), 0.1);
  return model;
}

/// Tokens (4,T) of no meaning, with the next ones as targets; a document starts at token 5 of sequence 2.
data::Batch whole_batch(int64_t length) {
  data::Batch batch(4, length);
  for (int64_t i = 0; i < 4 * length; ++i) {
    batch.input[static_cast<size_t>(i)] = (i * 7 + i / 9) % 32;
    batch.target[static_cast<size_t>(i)] = (i * 5 + 3) % 32;
  }
  batch.num_targets = 4 * length;
  batch.reset[static_cast<size_t>(2 * length + 5)] = 1;
  return batch;
}

/// Columns [first, first + count) of it.
TrainBatch piece_of(const data::Batch& whole, int64_t first, int64_t count) {
  data::Batch batch(4, count);
  for (int64_t row = 0; row < 4; ++row) {
    for (int64_t t = 0; t < count; ++t) {
      const auto from = static_cast<size_t>(row * whole.seq_len + first + t);
      const auto to = static_cast<size_t>(row * count + t);
      batch.input[to] = whole.input[from];
      batch.target[to] = whole.target[from];
      batch.reset[to] = whole.reset[from];
    }
  }
  batch.num_targets = 4 * count;
  return TrainBatch(std::move(batch));
}

NamedTensors gradients_of(const models::LanguageModel& model) {
  NamedTensors gradients;
  for (const auto& [name, parameter] : named_parameters(model))
    if (parameter.grad().defined()) gradients.emplace_back(name, parameter.grad().clone());
  return gradients;
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

TEST_CASE("steps that carry the state see what one long sequence sees, in every kind of model") {
  for (const models::ModelKind& kind : models::kModelKinds) {
    if (kind.state_grows) continue;
    INFO(kind.name);
    config::Config config = carrying_config(std::string(kind.name));
    const auto model = make_model(config);
    AdamW optimizer(named_parameters(*model), config.optim);
    const data::Batch whole = whole_batch(21);
    const TrainBatch all = piece_of(whole, 0, 21);
    const double expected = model->loss(all.ids, all.targets, all.reset).item<double>();
    for (const int64_t micro : {0, 2, 3}) {
      config.train.micro_batch_size = micro;
      TrainStep step(*model, optimizer, config);
      double sum = 0;
      for (const int64_t first : {0, 7, 14})
        sum += step.accumulate_gradients(piece_of(whole, first, 7));
      optimizer.zero_grad();
      CHECK(sum / 3 == Approx(expected).epsilon(1e-9));
    }
    config.train.carry_state = false;  // the state does matter
    TrainStep step(*model, optimizer, config);
    CHECK(step.carried() == nullptr);
    double sum = 0;
    for (const int64_t first : {0, 7, 14})
      sum += step.accumulate_gradients(piece_of(whole, first, 7));
    CHECK(std::abs(sum / 3 - expected) > 1e-6);
  }
}

TEST_CASE("with autocast, states are carried in the types they have") {
  for (const models::ModelKind& kind : models::kModelKinds) {
    if (kind.state_grows) continue;
    INFO(kind.name);
    config::Config config = carrying_config(std::string(kind.name));
    config.train.dtype = "bfloat16";
    const auto model = make_model(config);
    model->to(at::kFloat);
    AdamW optimizer(named_parameters(*model), config.optim);
    TrainStep step(*model, optimizer, config);
    const data::Batch whole = whole_batch(14);
    for (const int64_t first : {0, 7})
      CHECK(std::isfinite(step.accumulate_gradients(piece_of(whole, first, 7))));
    const TrainBatch batch = piece_of(whole, 7, 7);
    const AutocastGuard autocast(at::kCPU, true);
    const auto next = model->forward(batch.ids, step.carried()->rows(0, 4)).second;
    for (const auto& [name, tensor] : step.carried()->tensors()) {
      const size_t dot = name.find('.');
      const at::Tensor& like = next[std::stoul(name)][std::stoul(name.substr(dot + 1))];
      CHECK(tensor.scalar_type() == like.scalar_type());
      CHECK(tensor.sizes() == like.sizes());
    }
  }
}

TEST_CASE("gradients end where a step began") {
  config::Config config = carrying_config();
  config.train.micro_batch_size = 2;
  const auto model = make_model(config);
  AdamW optimizer(named_parameters(*model), config.optim);
  const data::Batch whole = whole_batch(14);
  TrainStep step(*model, optimizer, config);
  step.accumulate_gradients(piece_of(whole, 0, 7));
  optimizer.zero_grad();
  step.accumulate_gradients(piece_of(whole, 7, 7));
  const NamedTensors found = gradients_of(*model);
  optimizer.zero_grad();

  const TrainBatch first = piece_of(whole, 0, 7), second = piece_of(whole, 7, 7);
  auto [loss, state] = model->loss_and_state(first.ids, first.targets, {}, first.reset);
  for (auto& block : state)
    for (at::Tensor& tensor : block) tensor = tensor.detach();
  model->loss_and_state(second.ids, second.targets, state, {}).first.backward();
  const NamedTensors expected = gradients_of(*model);
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    INFO(found[i].first);
    CHECK(distance(found[i].second, expected[i].second) < 1e-12);
  }
}

TEST_CASE("where the loss is not finite sequences begin anew") {
  const config::Config config = carrying_config();
  const auto model = make_model(config);
  CarriedState carried(*model, config, nullptr);
  const NamedTensors empty = carried.tensors();
  const TrainBatch batch = piece_of(whole_batch(7), 0, 7);
  auto [loss, next] = model->loss_and_state(batch.ids, batch.targets, {}, {});
  carried.store(0, next, loss);
  const NamedTensors filled = carried.tensors();
  for (size_t i = 0; i < filled.size(); ++i)
    CHECK_FALSE(at::equal(filled[i].second, empty[i].second));

  for (auto& block : next)
    for (at::Tensor& tensor : block)
      tensor = at::full_like(tensor.narrow(0, 0, 2), std::numeric_limits<double>::quiet_NaN());
  carried.store(1, next, at::log(at::sub(loss, loss + 1)));  // NaN
  const NamedTensors after = carried.tensors();
  for (size_t i = 0; i < after.size(); ++i) {
    INFO(after[i].first);
    for (const int64_t row : {0, 3}) CHECK(at::equal(after[i].second[row], filled[i].second[row]));
    for (const int64_t row : {1, 2}) CHECK(at::equal(after[i].second[row], empty[i].second[row]));
  }
}

TEST_CASE("carried states are taken back from what was kept of them, and from nothing else") {
  const config::Config config = carrying_config();
  const auto model = make_model(config);
  CarriedState carried(*model, config, nullptr);
  const TrainBatch batch = piece_of(whole_batch(7), 0, 7);
  auto [loss, next] = model->loss_and_state(batch.ids, batch.targets, {}, {});
  carried.store(0, next, loss);
  const NamedTensors kept = carried.tensors();
  CarriedState other(*model, config, nullptr);
  other.load({kept.rbegin(), kept.rend()});  // in any order
  const NamedTensors taken = other.tensors();
  for (size_t i = 0; i < kept.size(); ++i) CHECK(at::equal(kept[i].second, taken[i].second));
  CHECK(carried.bytes() == 2 * state_bytes(config.model, 4));  // of float64; there of float32

  const auto error_of = [&](NamedTensors tensors) -> std::string {
    try {
      other.load(tensors);
    } catch (const Error& error) {
      CHECK(error.code == ExitCode::kCheckpoint);
      return error.what();
    }
    return "";
  };
  NamedTensors wrong = kept;
  wrong.pop_back();
  CHECK(error_of(wrong).find("carried states lack " + kept.back().first) == 0);
  wrong = kept;
  wrong.emplace_back("7.0", kept[0].second);
  CHECK(error_of(wrong).find("carried states hold 7.0") == 0);
  wrong = kept;
  wrong[1].second = wrong[1].second.narrow(0, 0, 3);
  CHECK(error_of(wrong).find("carried state 0.1: expected Double [4, 2, ") == 0);
  wrong[1].second = kept[1].second.to(at::kFloat);
  CHECK(error_of(wrong).find("got Float [4, 2, ") != std::string::npos);
}
