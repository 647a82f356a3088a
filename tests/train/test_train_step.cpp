// A training step: exact accumulation, the guard before the update, and its random streams.
#include <ATen/CPUGeneratorImpl.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <set>

#include "csrc/nn/random_state.h"
#include "tests/support/catch.h"
#include "tests/train/tiny_training.h"
#include "train/random_streams.h"
#include "train/train_step.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

std::string sha256_of_parameters(const models::LanguageModel& model) {
  std::string all;
  for (const auto& [name, parameter] : named_parameters(model)) {
    const at::Tensor dense = parameter.detach().contiguous();
    all.append(static_cast<const char*>(dense.const_data_ptr()), dense.nbytes());
  }
  return sha256_hex(all);
}

}  // namespace

TEST_CASE("micro batches give the gradient of the whole batch, masked targets or not") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.model.dropout = 0;
  nn::seed_random_state(at::kCPU, 1);
  const auto model = models::make_language_model(config.model);
  model->to(at::kDouble);
  AdamW optimizer(named_parameters(*model), config.optim);
  data::Batch host;
  host.batch_size = 4;
  host.seq_len = 6;
  host.reset.assign(24, 0);
  for (int64_t i = 0; i < 24; ++i) {
    host.input.push_back(i * 7 % 256);
    host.target.push_back(i < 11 ? -100 : i * 5 % 256);  // the first micro batch has one target
  }
  host.num_targets = 13;
  host.reset[14] = 1;
  const TrainBatch batch(std::move(host));

  const auto gradients = [&](int64_t micro, double& loss) {
    config.train.micro_batch_size = micro;
    TrainStep step(*model, optimizer, config);
    loss = step.accumulate_gradients(batch);
    std::map<std::string, at::Tensor> result;
    for (const auto& [name, p] : named_parameters(*model)) {
      if (p.grad().defined()) result[name] = p.grad().clone();
    }
    optimizer.zero_grad();
    return result;
  };
  // The mean over targets by definition, through autograd alone.
  const at::Tensor mean = model->loss(batch.ids, batch.targets, batch.reset, "mean");
  double whole = 0, split = 0;
  const auto one = gradients(0, whole);
  const auto two = gradients(2, split);
  const auto odd = gradients(3, split);
  CHECK(whole == Approx(mean.item<double>()).epsilon(1e-12));
  CHECK(split == Approx(whole).epsilon(1e-12));
  for (const auto& [name, gradient] : one) {
    INFO(name);
    CHECK((gradient - two.at(name)).abs().max().item<double>() < 1e-12);
    CHECK((gradient - odd.at(name)).abs().max().item<double>() < 1e-12);
  }
}

TEST_CASE("a batch without a target has the loss 0 and gradients of 0") {
  const testing::TemporaryFolder folder;
  const config::Config config = tiny_config(folder);
  const auto model = models::make_language_model(config.model);
  AdamW optimizer(named_parameters(*model), config.optim);
  data::Batch host(2, 5);
  host.input.assign(10, 7);
  CHECK(TrainStep(*model, optimizer, config).accumulate_gradients(TrainBatch(std::move(host))) ==
        0);
  for (const auto& [name, parameter] : named_parameters(*model))
    if (parameter.grad().defined()) CHECK(parameter.grad().abs().max().item<double>() == 0);
}

TEST_CASE("a random stream is not touched while another thread has it") {
  TrainerState state;
  store_random_streams(at::kCPU, state);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  for (const std::function<void()>& touch :
       {std::function<void()>([] { seed_random_streams(at::kCPU, 1); }),
        std::function<void()>([&] { store_random_streams(at::kCPU, state); }),
        std::function<void()>([&] { restore_random_streams(at::kCPU, state); })}) {
    std::unique_lock lock(generator.mutex());
    auto done = std::async(std::launch::async, touch);
    CHECK(done.wait_for(std::chrono::milliseconds(50)) == std::future_status::timeout);
    lock.unlock();
    done.get();
  }
}

/// A GPU runs ahead of the host: what follows a bad step must do nothing until the host has seen it.
TEST_CASE("with nonfinite=stop nothing is updated after a bad step") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  const auto model = models::make_language_model(config.model);
  AdamW optimizer(named_parameters(*model), config.optim);
  TrainStep step(*model, optimizer, config);
  const auto batch = [] {
    data::Batch host;
    host.batch_size = 1, host.seq_len = 5, host.num_targets = 5;
    host.input = {1, 2, 3, 4, 5}, host.target = {2, 3, 4, 5, 6}, host.reset.assign(5, 0);
    return TrainBatch(std::move(host));
  };
  CHECK(step.run(batch(), 1, 10)->finite);
  ::setenv("XLSTM_FAILPOINT", "trainer.nan_grad:2", 1);
  const std::string before = sha256_of_parameters(*model);
  const auto bad = step.run(batch(), 2, 11);
  ::unsetenv("XLSTM_FAILPOINT");
  CHECK(!bad->finite);
  CHECK(bad->step == 2);
  CHECK(bad->first_sample == 11);
  CHECK(bad->last_sample == 11);
  CHECK(step.run(batch(), 3)->finite);
  CHECK(sha256_of_parameters(*model) == before);
  CHECK(optimizer.steps() == 1);
  CHECK(!step.finish().has_value());
}

TEST_CASE("a batch in which no target counts changes nothing and is no failure") {
  const testing::TemporaryFolder folder;
  config::Config config = tiny_config(folder);
  config.train.nonfinite = GENERATE("stop", "skip");
  const auto model = models::make_language_model(config.model);
  AdamW optimizer(named_parameters(*model), config.optim);
  TrainStep step(*model, optimizer, config);
  const auto batch = [](bool counts) {
    data::Batch host(1, 5);
    host.input = {1, 2, 3, 4, 5};
    if (counts) host.target = {2, 3, 4, 5, 6}, host.num_targets = 5;
    return TrainBatch(std::move(host));
  };
  const auto all = [&] {
    std::string hashes = sha256_of_parameters(*model);
    for (const auto& [name, tensor] : optimizer.state())
      hashes += sha256_hex({static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()});
    return hashes;
  };
  CHECK(step.run(batch(true), 1)->targets == 5);  // momentum and decay would move the weights now
  const std::string before = all();
  const auto result = step.run(batch(false), 2);
  CHECK(result->targets == 0);
  CHECK(result->finite);
  CHECK(all() == before);
  CHECK(step.run(batch(true), 3)->finite);
  CHECK(all() != before);
  CHECK(optimizer.steps() == 2);
}

TEST_CASE("every process and step draws from a stream of its own, a single process from one") {
  std::set<double> drawn;
  for (const int64_t rank : {0, 1, 2}) {
    for (const int64_t step : {1, 2, 3}) {
      seed_step_of_process(at::kCPU, 42, step, {rank, 3});
      drawn.insert(at::rand({}, at::kDouble).item<double>());
    }
  }
  CHECK(drawn.size() == 9);
  seed_random_streams(at::kCPU, 1);
  const at::Tensor wanted = at::rand({4});
  seed_random_streams(at::kCPU, 1);
  seed_step_of_process(at::kCPU, 42, 5, {});
  CHECK(at::equal(at::rand({4}), wanted));
}
