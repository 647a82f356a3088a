// Sequences that several processes compute, a segment each: the loss, the gradients and the state of whole ones.
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "csrc/core/error.h"
#include "csrc/nn/random_state.h"
#include "tests/support/catch.h"
#include "tests/train/processes_here.h"
#include "tests/train/small_options.h"
#include "train/sequence_relay.h"
#include "train/train_step.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

constexpr int64_t kSegments = 3, kLength = 7;

std::shared_ptr<models::LanguageModel> make(const models::ModelOptions& options) {
  nn::seed_random_state(at::kCPU, 1);
  auto model = models::make_language_model(options);
  model->to(at::kDouble);
  return model;
}

std::vector<at::Tensor> gradients_of(const models::LanguageModel& model) {
  std::vector<at::Tensor> gradients;
  for (const auto& [name, parameter] : named_parameters(model))
    gradients.push_back(parameter.grad().clone());
  return gradients;
}

std::string refusal(int64_t segments, int64_t batch, const ProcessPlace& place) {
  config::Config config;
  config.train.sequence_parallel = segments;
  config.train.global_batch_size = batch;
  try {
    share_of_batch(config, place);
  } catch (const Error& error) {
    CHECK(error.code == ExitCode::kConfig);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("segments of sequences have the loss and the gradients of whole ones") {
  const ProcessesHere here;
  for (const char* const kind :
       {"xlstm", "xlstm_large", "lstm_block", "mamba", "gla", "hgrn2", "rwkv4", "rwkv6", "h3"}) {
    for (const bool recomputed : {false, true}) {
      INFO(kind << (recomputed ? ", recomputed" : ""));
      models::ModelOptions options = small_options(kind);
      options.activation_checkpointing = recomputed;
      nn::seed_random_state(at::kCPU, 2);
      const at::Tensor tokens =
          at::randint(kSmallVocabulary, {4, kSegments * kLength + 1}, at::kLong);
      const at::Tensor ids = tokens.narrow(1, 0, kSegments * kLength),
                       targets = tokens.narrow(1, 1, kSegments * kLength);
      const at::Tensor reset = at::zeros(ids.sizes(), at::kBool);
      reset[0][kLength].fill_(true);  // where a segment begins
      reset[1][kLength + 3].fill_(true);
      const auto whole = make(options);
      const at::Tensor loss = whole->loss(ids, targets, reset, "sum");
      loss.backward();
      const auto expected = gradients_of(*whole);

      std::array<std::shared_ptr<models::LanguageModel>, kSegments> models{
          make(options), make(options), make(options)};
      std::array<double, kSegments> losses{}, difference{};
      config::Config config;
      config.train.sequence_parallel = kSegments;
      here.run(kSegments, [&](ProcessGroup& group) {
        const int64_t rank = group.place().rank;
        models::LanguageModel& model = *models[rank];
        SequenceRelay relay(model, config, group);
        for (const int64_t rows : {0, 2}) {  // micro batches
          const SequenceRelay::Scope segments(&relay);
          const auto part = [&](const at::Tensor& tensor) {
            return tensor.narrow(0, rows, 2).narrow(1, rank * kLength, kLength);
          };
          const at::Tensor own =
              relay.with_sent(model.loss(part(ids), part(targets), part(reset), "sum"));
          own.backward();
          relay.finish();
          losses[rank] += own.item<double>();
        }
        // Passes outside the scope are those of whole sequences.
        model.loss(ids, targets, reset, "sum");
        const auto parameters = named_parameters(model);
        for (size_t i = 0; i < parameters.size(); ++i) {
          const at::Tensor& gradient = parameters[i].second.grad();
          group.sum(gradient);
          difference[rank] =
              std::max(difference[rank], (gradient - expected[i]).abs().max().item<double>());
        }
      });
      CHECK(losses[0] + losses[1] + losses[2] == Approx(loss.item<double>()).epsilon(1e-12));
      for (const double of_rank : difference) CHECK(of_rank < 1e-10);
    }
  }
}

TEST_CASE("which part of a batch a process has") {
  config::Config config;
  config.train.sequence_parallel = 2;
  config.train.global_batch_size = 6;
  for (int64_t rank = 0; rank < 6; ++rank) {
    const BatchShare share = share_of_batch(config, {rank, 6, 0});
    CHECK(share.first == rank / 2 * 2);
    CHECK(share.sequences == 2);
    CHECK(share.segment == rank % 2);
    CHECK(share.segments == 2);
  }
  CHECK(refusal(2, 6, {}).find("start them by torchrun") != std::string::npos);
  CHECK(refusal(2, 6, {0, 3, 0}).find("but there are 3 processes") != std::string::npos);
  CHECK(refusal(2, 6, {0, 8, 0}).find("cannot be shared by 4 times 2 processes") !=
        std::string::npos);
  CHECK(refusal(1, 6, {0, 4, 0}).find("cannot be shared by 4 processes; make it a multiple of 4") !=
        std::string::npos);
}
